"""Renamed commands and options, and names from other projects: the error says which name to use instead."""

from __future__ import annotations

COMMANDS = {"answer": "evaluate"}
OPTIONS: dict[str, str] = {}  # dotted keys as written in a recipe, without init_args
# Options of other libraries whose meaning has another form here, and that form.
ELSEWHERE = {
    "do_sample": "use temperature; 0 always takes the most likely token, above 0 samples",
    "reward_funcs": "use rewards",
    "num_generations": "use group_size",
    "num_iterations": "use rollout_epochs",
    "steps_per_generation": "use steps_per_rollout",
    "max_completion_length": "use max_new_tokens",
    "importance_sampling_level": "use ratio; token or sequence",
    "scale_rewards": "use advantages; group_mean does not scale, group_std and batch_std do",
}
# The same, where the other option belongs to GRPO: other tasks have a loss_type elsewhere, too.
ELSEWHERE_IN_GRPO = {
    "loss_type": "use normalise, advantages, ratio and surrogate; their values for dapo, dr_grpo, gspo, rloo and others are in"
    " docs/rl.md, Published variants",
}
