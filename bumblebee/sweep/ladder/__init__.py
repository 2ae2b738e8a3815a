"""Size ladders: the same recipe at growing sizes, and the scaling law that predicts the next one."""
