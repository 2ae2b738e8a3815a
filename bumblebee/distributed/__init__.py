"""Process group, and everything that touches DeepSpeed."""
