"""Whether an optimizer works with ZeRO, which hands it flat pieces of the parameters instead of the parameters.

At stages 1 to 3, each rank's optimizer sees one long vector per parameter group: this rank's part of all parameters. An
elementwise optimizer, such as Adam, computes the same as before. One that looks at the shape of a parameter (Adafactor, Muon)
or at a norm of it (LAMB, LARS) computes something else, without an error. No list of classes can tell the two apart, since a
recipe may name any class. So the optimizer is tried: a few steps on small parameters with the shapes of the model, and the same
steps on the pieces that the ranks would have.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from bumblebee.distributed.deepspeed.operators import reported_compilation
from bumblebee.distributed.deepspeed.optimizer_types import BaseOptimizer, ParamGroup
from bumblebee.distributed.deepspeed.sharded_parameters import full_shape
from bumblebee.distributed.deepspeed.zero_shards import unsharded_state

_STEPS = 4
_LR = 1e-2
_SIDE = 136  # of a matrix: some optimizers factor a matrix only if both sides are at least 128
_DEPTH = 4  # largest size of the dimensions before the last two
_OF_A_KIND = 2  # parameters with the same number of dimensions in a group
_TOLERANCE = 1e-3  # of the largest change; elementwise optimizers differ by rounding, about 1e-6
_UNUSABLE = {"LBFGS": "it evaluates the loss several times in a step", "SparseAdam": "it needs sparse gradients"}


class _Optimizer(BaseOptimizer, Protocol):
    def step(self) -> object: ...


OptimizerFactory = Callable[[list[ParamGroup]], object]


def check_optimizer(
    optimizer: OptimizerFactory, groups: Sequence[ParamGroup], device: torch.device, stage: int, ranks: int
) -> None:
    """Check that an optimizer computes the same on ZeRO's pieces as on whole parameters, and that its state can be sharded.

    Args:
        optimizer: from parameter groups to an optimizer.
        groups: those of the model, whose parameters are not touched.
        device: of the optimizer's tensors.
        stage: of ZeRO.
        ranks: number of ranks.

    Raises:
        ValueError: it does not, it is an optimizer that the training loop cannot step, or its constructor raises one.
    """
    probe = _Probe(optimizer, groups, device)
    own_operators = reported_compilation() if "deepspeed" in sys.modules else nullcontext()  # those of its optimizers
    with torch.random.fork_rng([device] if device.type == "cuda" else []), own_operators:
        try:
            whole = probe.build()
        except ValueError as error:
            raise ValueError(f"optimizer: {error}") from error
        if whole is None:
            return
        name = class_path(type(whole))
        if (reason := _UNUSABLE.get(type(whole).__name__)) and name.startswith("torch.optim."):
            raise ValueError(f"{name} cannot be used: {reason}. Use another one, such as torch.optim.AdamW")
        if stage > 0 and (problem := probe.problem(whole, min(ranks, 2))):
            raise ValueError(
                f"{name} does not work with trainer.zero_stage {stage}, which flattens and splits parameters:"
                f" {problem}. Set trainer.zero_stage to 0, or use an elementwise optimizer such as torch.optim.AdamW"
            )


def class_path(kind: type) -> str:
    """The shortest path that a class can be imported by, such as torch.optim.AdamW."""
    parts = kind.__module__.split(".")
    modules = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    exporting = (name for name in modules if getattr(sys.modules.get(name), kind.__name__, None) is kind)
    return f"{next(exporting, kind.__module__)}.{kind.__qualname__}"


@dataclass
class _Probe:
    """Trains small parameters in place of the model's; see ``check_optimizer`` for the arguments."""

    optimizer: OptimizerFactory
    groups: Sequence[ParamGroup]
    device: torch.device

    def build(self) -> _Optimizer | None:
        """Create an optimizer of small parameters; None if the factory ignores its argument."""
        groups = [cast("ParamGroup", {**group, "params": _small(group["params"], self.device)}) for group in self.groups]
        built = cast("_Optimizer", self.optimizer(groups))
        same = _ids(getattr(built, "param_groups", [])) == _ids(groups)
        return built if same else None

    def problem(self, whole: _Optimizer, ranks: int) -> str | None:
        """What goes wrong at stages 1 to 3, or None."""
        if isinstance(whole, torch.optim.Adagrad):  # cannot be tried: its constructor creates its state
            alone = type(whole) is torch.optim.Adagrad and all(set(group) == {"params"} for group in self.groups)
            return None if alone else "DeepSpeed creates torch.optim.Adagrad anew, without the options of parameter groups"
        before = _flat(_parameters(whole))
        try:
            expected = _train(whole, _gradients(before))
        except Exception:  # the user's class fails on whole parameters too: training raises that with its traceback
            return None
        states = ((p, whole.state.get(p, {})) for group in _parameters(whole) for p in group)
        if kind := next((kind for p, state in states for kind in unsharded_state(state, p)), None):
            return f"its state {kind!r} is neither one value nor a tensor with a number per element of the parameter"
        try:
            actual = self._train_in_pieces(ranks)
        except Exception as error:  # of any class, as it is the user's code
            return f"{type(error).__name__}: {error}"
        if _close(actual, expected, before) or not _close(self._train_again(), expected, before):  # or it draws random numbers
            return None
        return "its update of an element depends on the parameter's shape or on other elements"

    def _train_again(self) -> list[Tensor]:
        whole = self._rebuild()
        return _train(whole, _gradients(_flat(_parameters(whole))))

    def _train_in_pieces(self, ranks: int) -> list[Tensor]:
        """The groups after the same steps, in which each rank's optimizer updates its piece of each group."""
        of_ranks = []
        for rank in range(ranks):
            optimizer = self._rebuild()
            before = _flat(_parameters(optimizer))
            for group, flat in zip(optimizer.param_groups, before, strict=True):
                group["params"] = [nn.Parameter(flat.tensor_split(ranks)[rank].clone())]  # as DeepSpeed does
            gradients = [[flat.tensor_split(ranks)[rank] for flat in step] for step in _gradients(before)]
            of_ranks.append(_train(optimizer, gradients))
        return [torch.cat(pieces) for pieces in zip(*of_ranks, strict=True)]

    def _rebuild(self) -> _Optimizer:
        optimizer = self.build()
        assert optimizer is not None
        return optimizer


def _small(parameters: Sequence[nn.Parameter], device: torch.device) -> list[nn.Parameter]:
    """Parameters with the shapes of a group's first ones of each number of dimensions, but no larger than necessary."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[int, list[tuple[int, ...]]] = {}
    for shape in map(full_shape, parameters):
        similar = shapes.setdefault(len(shape), [])
        if len(similar) < _OF_A_KIND:
            similar.append((*(min(size, _DEPTH) for size in shape[:-2]), *(min(size, _SIDE) for size in shape[-2:])))
    flat = [shape for similar in shapes.values() for shape in similar]
    # Their norms differ, so that a norm over several of them equals none of theirs.
    values = [torch.randn(shape, generator=generator) * 0.02 * 3**number for number, shape in enumerate(flat)]
    return [nn.Parameter(value.to(device)) for value in values]


def _gradients(flats: Sequence[Tensor]) -> list[list[Tensor]]:
    """The gradient of each flat group in each step: of uneven size, and similar from step to step."""
    generator = torch.Generator().manual_seed(1)
    means = [torch.randn(flat.shape, generator=generator) * torch.linspace(0.1, 3, flat.numel()) for flat in flats]
    noise = [[0.3 * torch.randn(mean.shape, generator=generator) for mean in means] for _ in range(_STEPS)]
    return [[(m + n).to(f) for m, n, f in zip(means, step, flats, strict=True)] for step in noise]


def _train(optimizer: _Optimizer, gradients: list[list[Tensor]]) -> list[Tensor]:
    """Take a step with each of the flat gradients; returns the groups' flat parameters."""
    for group in optimizer.param_groups:
        if isinstance(group.get("lr"), float):  # a small one of the recipe's would change less than rounding does
            group["lr"] = _LR
    for step in gradients:
        for parameters, flat in zip(_parameters(optimizer), step, strict=True):
            for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.grad = piece.reshape(p.shape).clone()
        optimizer.step()
    return _flat(_parameters(optimizer))


def _parameters(optimizer: _Optimizer) -> list[list[nn.Parameter]]:
    return [group["params"] for group in optimizer.param_groups]


def _flat(groups: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The concatenated elements of each group."""
    return [torch.cat([p.detach().reshape(-1) for p in group]) for group in groups]


def _ids(groups: Sequence[ParamGroup]) -> list[list[int]]:
    return [[id(p) for p in group["params"]] for group in groups]


def _close(actual: Sequence[Tensor], expected: Sequence[Tensor], before: Sequence[Tensor]) -> bool:
    """Whether two results differ by rounding only, compared to how far they are from the start."""
    triples = zip(actual, expected, before, strict=True)
    return all(float((a - e).abs().max()) <= _TOLERANCE * float((e - b).abs().max()) for a, e, b in triples)
