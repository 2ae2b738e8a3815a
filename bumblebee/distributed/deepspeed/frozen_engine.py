"""FrozenEngine: a second model that a run calls and never trains, such as DPO's reference."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from bumblebee.distributed.deepspeed.compiled_blocks import gather_compiled_blocks_whole
from bumblebee.distributed.deepspeed.ds_config import EngineOptions
from bumblebee.distributed.deepspeed.operators import import_deepspeed, quiet_initialization, usable_config
from bumblebee.distributed.deepspeed.zero_init import fill_sharded_copy


class _DeepSpeedEngine(Protocol):
    def __call__(self, *args: object, **kwargs: object) -> Tensor: ...

    def destroy(self) -> None: ...


class FrozenEngine:
    """A model in evaluation mode and without gradients, in the precision of the training engine.

    At stage 3 it is sharded over the ranks like the trained model; at lower stages it is a plain module on the device.

    Args:
        model: whole, built under ``sharded_init``, or a ``copy.deepcopy`` of such a model, whose parameters are empty.
        device: where to run.
        options: those of the training engine.
        copy_of: the sharded model that fills such a copy.
    """

    def __init__(self, model: nn.Module, device: torch.device, options: EngineOptions, copy_of: nn.Module) -> None:
        self._device = device
        self._autocast = options.half_dtype if options.zero_stage == 0 else None
        self._engine: _DeepSpeedEngine | None = None
        self.model = model.requires_grad_(False)
        if options.zero_stage < 3:
            model.to(device=device, dtype=options.weights_dtype)
        else:
            deepspeed = import_deepspeed(device)
            config = usable_config(options)
            config["zero_optimization"].pop("offload_optimizer", None)
            gather_compiled_blocks_whole(deepspeed, model)
            with quiet_initialization(deepspeed, options.overrides):
                fill_sharded_copy(model, copy_of, deepspeed.zero.Init(config_dict_or_path=config))
                self._engine = deepspeed.initialize(model=model, config=config, dist_init_required=False)[0]
        model.eval()

    @torch.no_grad()
    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        """The model's forward. Collective at stage 3."""
        with torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None):
            return (self._engine or self.model)(*args, **kwargs)

    def close(self) -> None:
        """Release the weights and DeepSpeed's hooks. A second call does nothing."""
        if self._engine is not None:
            self._engine.destroy()
        self._engine = self.model = None  # type: ignore[assignment]
