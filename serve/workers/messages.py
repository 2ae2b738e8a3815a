"""Messages between the server process and a worker process, over one pipe for each worker.

To the worker: the engine's ``EngineRequest``, ``CancelRequest`` and, at the end, ``None``. From the worker: one ``WorkerReady``
or ``WorkerFailed``, then ``StepOutputs`` after each engine step and a ``Heartbeat`` at regular intervals.
"""

from __future__ import annotations

from dataclasses import dataclass

from bumblebee.inference.engine_config import EngineStats
from bumblebee.inference.request import EngineRequest, RequestOutput
from bumblebee.inference.sampling.sampling_params import SamplingParams


@dataclass
class CancelRequest:
    """Stop computing a request."""

    id: str


@dataclass
class WorkerReady:
    """The model is loaded.

    Args:
        device: device of the model, or a list of devices if its layers are spread.
        dtype: dtype of the weights, and how they are quantized.
        parameters: number of parameters.
        vocab_size: number of token ids the model accepts.
        cache_tokens: capacity of the KV cache in tokens.
        context_length: maximum of prompt and completion tokens together, limited by the model and the cache.
        defaults: sampling defaults from the model folder's generation_config.json.
        stats: the engine's statistics before the first request.
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
class WorkerFailed:
    """The model could not be loaded.

    Args:
        message: the error for the user; None for an internal error, whose traceback has been printed.
    """

    message: str | None


@dataclass
class StepOutputs:
    """The result of one engine step.

    Args:
        outputs: one output for each request that has new tokens or has finished.
        rejected: (id, reason) of requests that can never run.
        stats: the engine's statistics after the step.
    """

    outputs: list[RequestOutput]
    rejected: list[tuple[str, str]]
    stats: EngineStats


@dataclass
class Heartbeat:
    """The worker process is running.

    Args:
        step_seconds: for how long the loop has been in its current step; 0 between steps.
    """

    step_seconds: float


ToWorker = EngineRequest | CancelRequest | None
FromWorker = WorkerReady | WorkerFailed | StepOutputs | Heartbeat
