"""Hyperparameter sweeps: ``bumblebee sweep``.

sweep_file     the search space, in the vocabulary of W&B sweep files
parameter      one parameter: what a sampler draws, and the value that a draw means
recipe         the command of a trial, and the recipe of the best one
study          samplers, pruners and storage; the only module that imports Optuna
runner         the loop: starts trials, reports their metric, stops those that are pruned
display        the live table
report         the tables, plots and best.yaml of a sweep
sweep          all of them together
trials/        a trial's process, which can be found again after a kill, and its metrics while they are written
ladder/        the same recipe at growing sizes, and the law that predicts the next loss
"""
