"""Transforms that modify a model in place before training, listed in a recipe under ``task.transforms``.

A transform is a callable that takes the model; a function works too. State-dict keys do not change, so model folders do not
depend on transforms. LoRA, in ``bumblebee.lora``, is also a transform.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from bumblebee.models.base import LanguageModel
from bumblebee.models.float8_layers import MULTIPLE, check_float8, use_float8
from bumblebee.nn.block_forward import BlockForward
from bumblebee.nn.moe import ROUTERS

logger = logging.getLogger(__name__)


def apply_transforms(model: nn.Module, transforms: Sequence[Callable[[nn.Module], object]] | None) -> Sequence[Callable]:
    """Apply transforms to a model in order, and return them."""
    for transform in transforms or ():
        transform(model)
    return transforms or ()


class ActivationCheckpointing:
    """Recompute blocks in the backward pass instead of storing their activations (arXiv 1604.06174).

    Args:
        every: 1 checkpoints all blocks, 2 every second block, and so on: saves less memory and costs less time.
        keep_attention: keep the results of attention, whose recomputation takes longest in long windows, and recompute the
            rest. Has no effect with attention ``naive``, which is not one operator.

    Raises:
        ValueError: every is less than 1.
    """

    def __init__(self, every: int = 1, keep_attention: bool = False) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.every, self.keep_attention = every, keep_attention

    def __call__(self, model: nn.Module) -> None:
        _language_model(model, type(self).__name__).checkpoint_activations(self.every, self.keep_attention)


class Freeze:
    """Freeze parameters: they get no gradient and are not passed to the optimizer.

    Args:
        patterns: regular expressions that are searched for in parameter names, such as ``embed_tokens``, or ``layers.[0-3].``
            for the first four layers.
        train: exceptions that stay trainable: ``patterns: [.], train: [norm]`` trains only norms.

    Raises:
        ValueError: an invalid regular expression.
    """

    def __init__(self, patterns: list[str], train: list[str] | None = None) -> None:
        self.patterns, self.train = patterns, train or []
        for pattern in (*self.patterns, *self.train):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"task.transforms: Freeze {pattern!r} is not a regular expression: {error}") from error

    def __call__(self, model: nn.Module) -> None:
        """Freeze parameters in place.

        Raises:
            ValueError: a pattern matches no parameter, or no trainable parameter is left.
        """
        parameters = dict(model.named_parameters())
        for pattern in (*self.patterns, *self.train):
            if not any(re.search(pattern, name) for name in parameters):
                raise ValueError(
                    f"task.transforms: Freeze {pattern!r} matches no parameter; an example of a name is {min(parameters)}"
                )
        for name, parameter in parameters.items():
            if any(re.search(p, name) for p in self.patterns) and not any(re.search(p, name) for p in self.train):
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in parameters.values()):
            raise ValueError(f"task.transforms: Freeze {self.patterns} leaves no trainable parameter")


class Float8:
    """Train the linear layers of the blocks with fp8 matmuls (arXiv 2209.05433), through torchao.

    Weights, gradients and optimizer stay as they are; the operands of the three matmuls of a layer are scaled and rounded to
    fp8. Not in fp8: the head, routers, routed experts, subclasses of nn.Linear, frozen layers, and layers whose sizes are not
    multiples of 16. Without ``Compile`` after it, scaling costs more time than the matmuls save.

    Args:
        scaling: tensorwise (one scale per tensor, the fastest), rowwise, or rowwise_with_gw_hp (rowwise, and the weight's
            gradient in bf16, the most accurate).
        emulate: round to fp8 but multiply in the layer's own dtype: slow, on any device, to try what fp8 does to a loss.

    Raises:
        ValueError: an unknown scaling.
    """

    def __init__(self, scaling: str = "tensorwise", emulate: bool = False) -> None:
        scalings = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
        if scaling not in scalings:
            raise ValueError(f"scaling must be one of {', '.join(scalings)}, got {scaling!r}")
        self.scaling, self.emulate = scaling, emulate

    def __call__(self, model: nn.Module) -> None:
        """Replace layers in place.

        Raises:
            ValueError: fp8 cannot run here, the model has LoRA adapters, or no layer fits.
        """
        blocks = _language_model(model, type(self).__name__).blocks
        check_float8(self.emulate)
        if any(hasattr(module, "lora_A") for module in model.modules()):
            raise ValueError("task.transforms: Float8 trains whole weights and cannot be combined with LoRA")
        linear = {name: module for name, module in _linear_layers(model, blocks) if module.weight.requires_grad}
        names = {
            name for name, module in linear.items() if not (module.in_features % MULTIPLE or module.out_features % MULTIPLE)
        }
        if not names:
            raise ValueError(f"task.transforms: Float8 found no trainable layer whose sizes are multiples of {MULTIPLE}")
        use_float8(model, names, self.scaling, self.emulate)
        skipped = sorted(linear.keys() - names)
        logger.info("Float8: %d layers in fp8; %d skipped by size%s", len(names), len(skipped), _example(skipped))


def _linear_layers(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Linear]]:
    """Plain linear layers of the blocks with their names, without routers."""
    inside = {id(module) for block in blocks for module in block.modules()}
    for name, module in model.named_modules():
        if id(module) in inside and type(module) is nn.Linear and name.rpartition(".")[2] not in ROUTERS:
            yield name, module


def _example(names: Sequence[str]) -> str:
    return f", such as {names[0]}" if names else ""


class Compile:
    """Compile each block with torch.compile. Blocks share one graph; the first step is slow.

    Args:
        mode: mode of torch.compile: default, reduce-overhead or max-autotune.
    """

    def __init__(self, mode: str = "default") -> None:
        modes = ("default", "reduce-overhead", "max-autotune")
        if mode not in modes:
            raise ValueError(f"mode must be one of {', '.join(modes)}, got {mode!r}")
        self.mode = mode

    def __call__(self, model: nn.Module) -> None:
        for block in _language_model(model, type(self).__name__).blocks:
            BlockForward.of(block).compile(self.mode)


def _language_model(model: nn.Module, name: str) -> LanguageModel:
    if not isinstance(model, LanguageModel):
        raise ValueError(f"task.transforms: {name} supports Bumblebee and HuggingFaceModel, got {type(model).__name__}")
    return model
