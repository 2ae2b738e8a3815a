"""Trials as processes: what is known about one, its folder, its metrics, its devices."""
