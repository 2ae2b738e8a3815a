"""Hyperparameter sweeps: ``bumblebee sweep``.

sweep_file     the search space, in the vocabulary of W&B sweep files
parameter      one parameter: what a sampler draws, and the value that a draw means
study          samplers, pruners and storage; the only module that imports Optuna
trial_process  a trial's ``bumblebee fit`` process: starting, stopping, finding it again
trial_log      reading a trial's metrics.jsonl while it is written
runner         the loop: starts trials, reports their metric, stops those that are pruned
display        the live table
report         the tables, plots and best.yaml of a sweep
"""
