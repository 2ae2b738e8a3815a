"""Linear layers that multiply in fp8 (torchao's float8 training), the only file that imports torchao."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import nn

from bumblebee.models.load_context import current_load_context

MULTIPLE = 16  # of both sizes of a layer: what the fp8 matmul of NVIDIA GPUs takes
MIN_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0


def check_float8(emulate: bool) -> None:
    """Check that fp8 training can run here.

    Raises:
        ValueError: torchao is missing, parameters are sharded, or no device multiplies in fp8.
    """
    if current_load_context().sharded:
        raise ValueError("task.transforms: Float8 needs whole weights: set trainer.zero_stage to 0, 1 or 2")
    problem = None if emulate else _device_problem()
    if problem is not None:
        raise ValueError(f"task.transforms: Float8 needs a GPU of compute capability 8.9 or above (H100, L40S), but {problem}")
    if find_spec("torchao") is None:
        raise ValueError("task.transforms: Float8 needs torchao: pip install bumblebee[fp8]")


def _device_problem() -> str | None:
    if not torch.cuda.is_available():
        return "CUDA is not available"
    capability = torch.cuda.get_device_capability()
    return None if capability >= MIN_CAPABILITY else f"this one has {capability[0]}.{capability[1]}"


def use_float8(model: nn.Module, names: set[str], scaling: str, emulate: bool) -> None:
    """Replace linear layers, in place. Parameters stay the same objects, so that state dicts do not change.

    Args:
        model: any.
        names: of the layers.
        scaling: name of torchao's recipe.
        emulate: round to fp8 and multiply in the layer's dtype.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = replace(Float8LinearConfig.from_recipe_name(scaling), pad_inner_dim=True, emulate=emulate)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name in names)
