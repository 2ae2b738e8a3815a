"""Reward functions for reinforcement learning.

A reward is a callable ``reward(prompts, completions, records) -> list[float]``. It gets for each completion the text of the
question, the completion without special tokens, and the record of the data file that the question comes from. A function works:

    def brief(prompts: list[str], completions: list[str], records: list[dict]) -> list[float]:
        return [1.0 if len(completion) < 200 else 0.0 for completion in completions]
"""

from bumblebee.rewards.answers import ExactAnswer, NumericAnswer
from bumblebee.rewards.form import Brevity, Matches
from bumblebee.rewards.in_workers import InWorkers
from bumblebee.rewards.judge import Judge
from bumblebee.rewards.math_answer import MathAnswer
from bumblebee.rewards.reward import InputReward, Record, RewardError, RewardFunction, RewardInput
from bumblebee.rewards.reward_model import RewardModel

__all__ = [
    "Brevity",
    "ExactAnswer",
    "InWorkers",
    "InputReward",
    "Judge",
    "Matches",
    "MathAnswer",
    "NumericAnswer",
    "Record",
    "RewardError",
    "RewardFunction",
    "RewardInput",
    "RewardModel",
]
