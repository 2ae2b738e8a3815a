"""Sampling from the model in training, for GRPO and for on-policy distillation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn

from bumblebee.inference.generator import Generator
from bumblebee.tasks.reference import evaluation_mode
from bumblebee.tasks.run_context import RunContext
from bumblebee.tasks.weight_gathering import Gathering
from bumblebee.tokenizer.tokenizer import Tokenizer


@contextmanager
def policy_generator(
    model: nn.Module,
    tokenizer: Tokenizer | None,
    stop_ids: Sequence[int],
    run: RunContext | None,
    gathering: Gathering | None = None,
) -> Iterator[Generator]:
    """A generator with the current weights, in evaluation mode.

    Collective in a run: at stage 3 the weights are gathered. Inside, nothing else may be collective.

    Args:
        model: the model in training.
        tokenizer: of its data.
        stop_ids: token ids that end a completion.
        run: the run's context; None outside of a training run.
        gathering: how the weights are gathered at stage 3; None for all at once.
    """
    with _gathered(run, gathering), evaluation_mode(model):
        yield Generator(model, tokenizer, stop_ids)  # type: ignore[arg-type]


def _gathered(run: RunContext | None, gathering: Gathering | None) -> AbstractContextManager[object]:
    if run is None:
        return nullcontext()
    return run.engine.model_by_layer() if gathering is not None and gathering.layers else run.engine.whole_model()


def check_room(model: nn.Module, max_new_tokens: int, tokens: int, place: str = "") -> None:
    """Check that the longest prompt leaves room for a completion.

    Args:
        model: that samples it.
        max_new_tokens: maximum tokens of a completion.
        tokens: of the longest prompt.
        place: where that prompt is, such as " (FILE:LINE)".

    Raises:
        ValueError: both together may exceed the model's positions.
    """
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", math.inf)
    if tokens + max_new_tokens > positions:
        raise ValueError(
            f"task.max_new_tokens: {max_new_tokens} and the longest prompt's {tokens} tokens{place} exceed the model's"
            f" {positions} positions; set a smaller max_new_tokens or data.max_length"
        )
