"""The parts a model is assembled from. They import torch and each other, nothing else."""

IGNORE_INDEX = -100  # the label of a position that is no target, as everywhere in the field
