"""What the training loop is built on: plan, loader, run folder, training state, metrics."""
