"""Training with known gradients: a real run whose gradients are replaced by ones that are exact in every precision.

A micro-batch's gradient of a parameter is ``coefficient * direction``. The direction is a random sign times a power of two for
each element, the coefficient a small integer for each row, and every step has a power of two of targets. So a micro-batch's
gradient is not rounded, even in bf16: what deviates is the loop, the accumulation, the clipping or the optimizer, and it
deviates by far more than the rounding of fp32.

Gradients of matrices are laid out in memory as their transposes are, as those of an operator may be: whoever flattens them by
their memory instead of their indices mixes them up.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bumblebee.datamodule import Batch
from bumblebee.distributed import process_group
from bumblebee.nn import IGNORE_INDEX
from bumblebee.tasks.language_modeling import LanguageModeling
from bumblebee.tasks.run_context import RunContext
from bumblebee.tasks.task import ForwardFn
from bumblebee.verify.context import Context
from bumblebee.verify.training_run import RandomTokens

SMALLEST_EXPONENT = -10  # of the elements of a direction


class CoefficientRows(RandomTokens):
    """Random rows, each with a coefficient.

    Args:
        samples: number of rows.
        num_targets: of the rows, in turn.
        coefficients: smallest and largest.
    """

    def __init__(self, samples: int, num_targets: Sequence[int], coefficients: tuple[int, int]) -> None:
        super().__init__(samples, num_targets)
        self.coefficients = coefficients

    def setup(self, seed: int) -> None:
        """Draw the rows, the same in every run."""
        super().setup(seed)
        (smallest, largest), generator = self.coefficients, torch.Generator().manual_seed(1)
        self.columns["coefficient"] = torch.randint(smallest, largest + 1, (self.samples,), generator=generator)

    def gradient(self, name: str, shape: torch.Size, rows: Sequence[int]) -> Tensor:
        """The gradient of a step with these rows: the mean over their targets."""
        labels = self.columns["labels"][list(rows)]
        coefficient = self.columns["coefficient"][list(rows)].sum() / (labels != IGNORE_INDEX).sum()
        return coefficient * direction(name, shape)


class KnownGradients(LanguageModeling):
    """Language modelling with the gradients of ``CoefficientRows``. Forward and backward run as usual."""

    def begin(self, run: RunContext, /) -> None:
        """Replace each parameter's gradient where it leaves the backward pass, before DeepSpeed sees it."""
        for name, parameter in run.engine.model.named_parameters():
            parameter.register_hook(self._replacement(name))

    def training_step(self, model: ForwardFn, batch: Batch) -> dict[str, Tensor]:
        """Sum of token losses. The gradient that it receives (one over the targets, loss scale) multiplies the known one."""
        losses = super().training_step(model, batch)
        self._coefficient = batch["coefficient"].sum()
        losses["loss"].register_hook(self._keep_factor)
        return losses

    def _keep_factor(self, grad_output: Tensor) -> None:
        self._factor = grad_output

    def _replacement(self, name: str) -> Callable[[Tensor], Tensor]:
        def replace(gradient: Tensor) -> Tensor:
            known = direction(name, gradient.shape).to(gradient.device)
            return _transposed_in_memory((self._factor.float() * self._coefficient * known).to(gradient.dtype))

        return replace


def _transposed_in_memory(gradient: Tensor) -> Tensor:
    """The same values, not contiguous if it is a matrix."""
    return gradient.transpose(0, 1).contiguous().transpose(0, 1) if gradient.dim() > 1 else gradient


@functools.cache
def direction(name: str, shape: torch.Size) -> Tensor:
    """Random signs times powers of two, the same for the same name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    exponents = torch.randint(SMALLEST_EXPONENT, 1, shape, generator=generator)
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return signs * torch.exp2(exponents.float())


def averages_exactly(context: Context) -> bool:
    """Whether the average over ranks rounds nothing: in fp32, or in 16 bits with small sums and a power of two of ranks.

    DeepSpeed reduces in 16 bits at stages 1 to 3 of bf16 and fp16: the sum of a step at stage 1, else each micro-batch.
    """
    ranks = process_group.world_size()
    in_fp32 = context.options.precision == "fp32" or context.options.zero_stage == 0
    return in_fp32 or (ranks <= 256 and ranks & (ranks - 1) == 0)
