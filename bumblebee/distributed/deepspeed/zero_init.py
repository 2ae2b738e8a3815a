"""Building a model under ZeRO-3: each parameter is sharded over the ranks as soon as it is created."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Protocol

import torch
from torch import nn

from bumblebee.distributed.deepspeed.ds_config import EngineOptions
from bumblebee.distributed.deepspeed.operators import import_deepspeed, quiet_initialization, usable_config
from bumblebee.distributed.deepspeed.sharded_parameters import is_sharded
from bumblebee.models.load_context import load_context


@contextmanager
def sharded_init(device: torch.device, options: EngineOptions) -> Iterator[None]:
    """Build modules sharded: no rank ever holds a whole model. Collective."""
    import_module("torch._dynamo")  # it compares functions of torch that zero.Init replaces, so it cannot be imported later
    deepspeed = import_deepspeed(device)
    with quiet_initialization(deepspeed, options.overrides):
        zero_init = deepspeed.zero.Init(config_dict_or_path=usable_config(options))
    with load_context(sharded=True), zero_init:
        yield


@contextmanager
def unsharded_init() -> Iterator[None]:
    """Inside ``sharded_init``, build modules whole on every rank. The engine shards them when training begins."""
    from deepspeed.runtime.zero import partition_parameters

    partition_parameters.shutdown_init_context()
    try:
        yield
    finally:
        partition_parameters.restore_init_context()


class ZeroInit(Protocol):
    """What we use of ``deepspeed.zero.Init``."""

    def _convert_to_zero_parameters(self, param_list: list[nn.Parameter]) -> None: ...


def fill_sharded_copy(copy: nn.Module, original: nn.Module, zero_init: ZeroInit) -> None:
    """Fill a ``copy.deepcopy`` of a sharded model, whose parameters are empty, and shard it. Collective.

    One whole parameter is in memory at a time.

    Args:
        copy: the copy.
        original: the sharded model.
        zero_init: a ``deepspeed.zero.Init`` that shards the copy's parameters.
    """
    from deepspeed.runtime.zero import GatheredParameters

    sources = dict(original.named_parameters())
    for name, parameter in copy.named_parameters():
        if is_sharded(parameter) or parameter.numel() > 0:
            continue
        with GatheredParameters([sources[name]]):
            parameter.data = sources[name].detach().clone()
        zero_init._convert_to_zero_parameters([parameter])
