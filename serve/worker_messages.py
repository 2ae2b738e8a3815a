"""What the server's process and a worker say to each other, over one pipe for each worker.

To the worker go the engine's ``EngineRequest``, ``Cancel`` and, at the end, ``None``. Back come one ``Ready`` or ``Failed``,
and then a ``Step`` after each forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from bumblebee.inference.engine_config import EngineStats
from bumblebee.inference.request import RequestOutput
from bumblebee.inference.sampling_params import SamplingParams


@dataclass
class Cancel:
    """Nobody waits for this request any more."""

    id: str


@dataclass
class Ready:
    """The model is loaded.

    Args:
        device: where it is; several, where its layers are spread.
        dtype: of its weights.
        parameters: how many it has.
        vocab_size: token ids that it knows.
        cache_tokens: positions of its key-value cache.
        context_length: tokens that prompt and answer may have together: what the model takes, if the cache holds as many.
        defaults: how to sample, from the folder's generation_config.json.
        stats: the engine's, before any request.
    """

    device: str
    dtype: str
    parameters: int
    vocab_size: int
    cache_tokens: int
    context_length: int
    defaults: SamplingParams
    stats: EngineStats


@dataclass
class Failed:
    """The model could not be loaded.

    Args:
        message: why, for the user; None for a mistake of ours, whose traceback has been printed.
    """

    message: str | None


@dataclass
class Step:
    """What one forward pass brought.

    Args:
        outputs: one for each request that has grown or ended.
        refused: (id, why) of requests that can never run.
        stats: the engine's, after the pass.
    """

    outputs: list[RequestOutput]
    refused: list[tuple[str, str]]
    stats: EngineStats
