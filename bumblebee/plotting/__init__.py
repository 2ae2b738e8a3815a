"""Plots of metrics: the loss curve of a run, and several runs compared. Only ``curves`` imports matplotlib."""
