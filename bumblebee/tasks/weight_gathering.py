"""How the weights are gathered at ZeRO stage 3 while the model in training samples: all of them, or layer by layer.

    all       every device holds all weights while completions are sampled: they are gathered once per rollout batch
    layers    a device holds the weights of one transformer block at a time, and those outside of the blocks (embedding, head):
              the blocks are gathered for each token that is decoded, which needs little memory and is slow
    auto      all if they fit next to the KV cache, else layers

``bumblebee preview`` and training decide by the same arithmetic: what sampling needs with all weights may be 90 % of the memory
that is free. Preview adds its estimate of what training holds; in training that is allocated already.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from bumblebee.config import TransformerConfig
from bumblebee.distributed import process_group
from bumblebee.distributed.deepspeed.sharded_parameters import full_numel
from bumblebee.hardware.memory_stats import free_gpu_memory, memory_available
from bumblebee.inference.engine_config import EngineConfig
from bumblebee.inference.kv_cache import BLOCK_SIZE, bytes_per_position
from bumblebee.tasks.run_context import RunContext

GatherWeights = Literal["auto", "all", "layers"]
FRACTION = 0.9  # of the free memory that sampling may take: allocators fragment


@dataclass(frozen=True)
class Gathering:
    """A decision.

    Args:
        layers: whether weights are gathered layer by layer.
        reason: of the decision.
    """

    layers: bool
    reason: str

    def __str__(self) -> str:
        return f"{'layer by layer' if self.layers else 'all at once'} ({self.reason})"


def check_gathering(option: str, zero_stage: int) -> None:
    """Check the option ``gather_weights`` of a task.

    Raises:
        ValueError: it is unknown, or has no effect at this stage.
    """
    if option not in get_args(GatherWeights):
        raise ValueError(f"task.gather_weights must be auto, all or layers, got {option!r}")
    if option != "auto" and zero_stage < 3:
        raise ValueError(
            f"task.gather_weights: {option} has no effect at trainer.zero_stage {zero_stage}, where weights are not sharded;"
            " remove it, or set trainer.zero_stage to 3"
        )


def choose_gathering(option: GatherWeights, needed: float, free: float | None) -> Gathering:
    """Decide between ``all`` and ``layers``.

    Args:
        option: of the task.
        needed: bytes of a device that sampling with all weights takes of those that are free.
        free: bytes of a device; None if unknown.
    """
    if option != "auto":
        return Gathering(option == "layers", f"task.gather_weights is {option}")
    if free is None:
        return Gathering(False, "the free memory is not known")
    memory = f"needs {needed / 1e9:,.2f} GB of {free / 1e9:,.2f} GB that are free on each device"
    if needed <= FRACTION * free:
        return Gathering(False, memory)
    return Gathering(True, f"all at once {memory}")


def cache_bytes(config: TransformerConfig, sequences: int, positions: int, dtype: torch.dtype) -> int:
    """Bytes of the KV cache in whole blocks, and of logits and probabilities of a decoding step.

    Args:
        config: of the model.
        sequences: completions that are sampled at a time.
        positions: of each, with its prompt.
        dtype: of the weights and the cache.
    """
    in_blocks = sequences * -(-positions // BLOCK_SIZE) * BLOCK_SIZE
    return in_blocks * bytes_per_position(config, dtype) + 3 * 4 * sequences * config.vocab_size


def gathering_in_run(
    option: GatherWeights, model: nn.Module, run: RunContext, per_prompt: int, prompts: Sequence[int], max_new_tokens: int
) -> Gathering | None:
    """Decide for a run, at the end of ``Task.begin``; None below stage 3. Collective: all ranks decide alike.

    Args:
        option: of the task.
        model: in training.
        run: the run's context.
        per_prompt: completions of each prompt.
        prompts: lengths of the prompts in tokens.
        max_new_tokens: maximum tokens of a completion.
    """
    if run.zero_stage < 3:
        return None
    weights = list(model.parameters())
    sequences = min(per_prompt * run.prompts_per_rollout, EngineConfig().max_running)
    dtype = weights[0].dtype
    config: TransformerConfig = model.config  # type: ignore[assignment]
    cache = cache_bytes(config, sequences, max(prompts) + max_new_tokens, dtype)
    needed = dtype.itemsize * sum(map(full_numel, weights)) + cache
    gathering = choose_gathering(option, needed, free_per_rank(run.device, process_group.world_size()))
    if process_group.any_rank(gathering.layers) and not gathering.layers:
        return Gathering(True, "another rank has too little free memory for all")
    return gathering


def free_per_rank(device: torch.device, ranks: int) -> float | None:
    """Free bytes of a GPU, or each rank's share of those of a machine without; None if unknown.

    Args:
        device: of this rank.
        ranks: of the run; a launcher's ``LOCAL_WORLD_SIZE`` says how many of them are on this machine.
    """
    if device.type == "cuda":
        return free_gpu_memory(device)
    free = memory_available(device)
    return None if free is None else free / max(1, min(ranks, int(os.environ.get("LOCAL_WORLD_SIZE", ranks))))
