"""CUDA graphs of the decode step, one per batch bucket: a step launches one graph instead of a thousand kernels.

A graph repeats the kernels that were launched while it was captured, on the same addresses. So the inputs of a step are copied
to static buffers, batches are padded to a power of two, and graphs are dropped when what they read has moved. The steps of a
bucket run eagerly until it has been met a few times: most short runs need no graph.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bumblebee.inference.transfers import upload
from bumblebee.model import Bumblebee
from bumblebee.nn.moe import MixtureOfExperts

logger = logging.getLogger(__name__)

EAGER_STEPS = 8  # of a bucket before it is captured, which takes as long as some eager steps
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]  # computation -> (replay, its static output)


@dataclass
class _Graph:
    inputs: Tensor  # static: (3, bucket)
    output: Tensor  # static
    replay: Callable[[], None]


class DecodeGraphs:
    """Graphs by batch bucket.

    Args:
        compute: token ids, positions and rows of block tables, (3, bucket) int64, to logits (bucket, V). A position of -1 is
            padding.
        max_batch: sequences of a step at most.
        device: of the inputs.
        capture: records a computation.
        addresses: of whatever graphs read and write besides their inputs; when they change, graphs are captured anew.
    """

    def __init__(
        self,
        compute: Callable[[Tensor], Tensor],
        max_batch: int,
        device: torch.device,
        capture: Capture,
        addresses: Callable[[], Hashable],
    ) -> None:
        self._compute, self._device, self._capture, self._addresses = compute, device, capture, addresses
        self.buckets = sorted({min(2**power, max_batch) for power in range(max_batch.bit_length() + 1)})
        self._steps: Counter[int] = Counter()
        self._graphs: dict[int, _Graph] = {}
        self._captured_at: Hashable = None
        self._failed = False

    def run(self, token_ids: Sequence[int], positions: Sequence[int], rows: Sequence[int]) -> Tensor | None:
        """Logits (B, V) of B decode tokens, valid until the next call; None if this step is to run eagerly."""
        count = len(token_ids)
        bucket = next(size for size in self.buckets if size >= count)
        self._steps[bucket] += 1
        if self._failed or self._steps[bucket] <= EAGER_STEPS:
            return None
        padding = bucket - count
        inputs = upload([[*token_ids, *[0] * padding], [*positions, *[-1] * padding], [*rows, *[0] * padding]], self._device)
        if self._captured_at != (addresses := self._addresses()):
            self._graphs.clear()
            self._captured_at = addresses
        if bucket not in self._graphs and not self._record(bucket, inputs):
            return None
        graph = self._graphs[bucket]
        graph.inputs.copy_(inputs)
        graph.replay()
        return graph.output[:count]

    def _record(self, bucket: int, inputs: Tensor) -> bool:
        """Capture a bucket's graph. Computing the step several times writes the same keys and values to the same places."""
        static = inputs.clone()
        try:
            self._compute(static)  # compiles and loads kernels, which is impossible during capture
            replay, output = self._capture(lambda: self._compute(static))
        except RuntimeError as error:
            self._failed = True
            logger.warning("decoding runs without CUDA graphs: capture failed: %s", str(error).splitlines()[0])
            return False
        self._graphs[bucket] = _Graph(static, output, replay)
        logger.info("captured a CUDA graph for up to %d sequences", bucket)
        return True


def graph_capture(device: torch.device) -> Capture | None:
    """How computations are captured on a device; None if it has no graphs."""
    if device.type != "cuda":
        return None
    pool = torch.cuda.graph_pool_handle()  # shared, since only the output of the last graph is read

    def capture(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = compute()
        return graph.replay, output

    return capture


def can_capture(model: nn.Module, devices: Sequence[torch.device]) -> bool:
    """Whether the model's decode step is the same kernels each time, on one device, without hooks that run on the host."""
    hooks = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    sparse = any(isinstance(module, MixtureOfExperts) for module in model.modules())  # shapes depend on the router
    return isinstance(model, Bumblebee) and len(set(devices)) == 1 and not hooks and not sparse
