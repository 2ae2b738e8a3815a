"""What plots and the console show of a run that learns from rewards. Its loss is near 0 by construction."""

from __future__ import annotations

from bumblebee.plotting.panels import Panel, ShownMetric

_REWARD = ShownMetric("rl/reward", "reward", spread="rl/reward_spread")
_LENGTH = ShownMetric("rl/length", "length", axis="tokens per completion")
_TRUNCATED = ShownMetric("rl/truncated", "truncated", axis="share that is truncated", fraction=True)

PANELS = (
    Panel(_REWARD),
    Panel(_LENGTH, _TRUNCATED),
    Panel(
        ShownMetric("rl/entropy", "entropy", axis="entropy (nats per token)"),
        ShownMetric("rl/logprob_drift", "drift", axis="log-probability drift"),
    ),
    Panel(
        ShownMetric("rl/kl", "KL", axis="KL (nats per token)"),
        ShownMetric("rl/clipped", "clipped", axis="share that is clipped"),
    ),
)
HEADLINE = (
    _REWARD, _LENGTH, _TRUNCATED,
    ShownMetric("rl/time_sampling", "sampling", fraction=True), ShownMetric("rl/time_rewards", "scoring", fraction=True),
    ShownMetric("rl/time_training", "training", fraction=True),
)  # fmt: skip
