"""RolloutMeter: lengths of completions, speeds of sampling and training, and where the time of steps goes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from bumblebee.distributed import process_group

Phase = Literal["sampling", "rewards"]


class RolloutMeter:
    """Measures the steps since the last line of metrics. The time of a step that is not sampling or rewards is training.

    Args:
        max_new_tokens: maximum length of a completion.
    """

    def __init__(self, max_new_tokens: int) -> None:
        self.max_new_tokens = max_new_tokens
        self._clear()

    def _clear(self) -> None:
        self._lengths = torch.zeros(self.max_new_tokens + 1, dtype=torch.float64)  # number of completions by length
        self._seconds = {"sampling": 0.0, "rewards": 0.0, "steps": 0.0}
        self._trained = 0.0  # tokens, over all ranks
        self._began: float | None = None

    def begin_step(self) -> None:
        """Start the clock of a step, unless it runs already."""
        if self._began is None:
            self._began = time.perf_counter()

    @contextmanager
    def timed(self, phase: Phase) -> Iterator[None]:
        """Count the time inside."""
        began = time.perf_counter()
        yield
        self._seconds[phase] += time.perf_counter() - began

    def add(self, lengths: Sequence[int]) -> None:
        """Count completions that have been sampled, by their number of tokens."""
        for length in lengths:
            self._lengths[min(length, self.max_new_tokens)] += 1

    def add_trained(self, tokens: int) -> None:
        """Count tokens of all ranks that a step has trained on."""
        self._trained += tokens

    def end_step(self) -> None:
        """Stop the clock of a step."""
        if self._began is not None:
            self._seconds["steps"] += time.perf_counter() - self._began
        self._began = None

    def metrics(self) -> dict[str, float]:
        """The metrics since the last call, over all ranks; none without a step. Collective."""
        ranks = process_group.world_size()
        lengths, seconds, trained = self._lengths, self._seconds, self._trained
        self._clear()
        sums = process_group.host_sum([*lengths.tolist(), *seconds.values()])
        counts, (sampling, rewards, steps) = sums[: len(lengths)], sums[len(lengths) :]
        if not steps:
            return {}
        training, tokens = max(steps - sampling - rewards, 0.0), sum(length * count for length, count in enumerate(counts))
        sampled = (
            {
                "rl/length_max": max(length for length, count in enumerate(counts) if count),
                "rl/sampled_tokens_per_second": tokens * ranks / max(sampling, 1e-9),
            }
            if any(counts)
            else {}
        )
        return {
            **sampled,
            "rl/trained_tokens_per_second": trained * ranks / max(training, 1e-9),
            "rl/time_sampling": sampling / steps, "rl/time_rewards": rewards / steps, "rl/time_training": training / steps,
        }  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        """This rank's sums, for a checkpoint between two lines of metrics; empty after a line."""
        if not self._seconds["steps"]:
            return {}
        return {
            "rollout lengths": self._lengths,
            "trained tokens": torch.tensor([self._trained / process_group.world_size()], dtype=torch.float64),
            "rollout seconds": torch.tensor([*self._seconds.values()], dtype=torch.float64),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from ``state``."""
        if "rollout lengths" not in state:
            return
        self._lengths = state["rollout lengths"].cpu()
        if "trained tokens" in state:  # not in checkpoints of earlier versions
            self._trained = float(process_group.host_sum([float(state["trained tokens"])])[0])
        self._seconds = dict(zip(self._seconds, state["rollout seconds"].tolist(), strict=True))
