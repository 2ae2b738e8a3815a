"""Reinforcement learning: rollouts of the model in training, their rewards, and what the losses are computed from."""
