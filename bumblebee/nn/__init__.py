"""Building blocks of the models. They import torch and each other, nothing else."""

IGNORE_INDEX = -100  # label of a position without a target, as in PyTorch and transformers
