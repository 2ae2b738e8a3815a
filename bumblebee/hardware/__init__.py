"""FLOP counts and memory statistics of the devices a run uses."""
