"""Which optimizers work on ZeRO's flat pieces of parameters, and saving the state of those that do not at stage 0."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import shaped_optimizers
from helpers.training_runs import small_model, train, weight_bytes

from bumblebee.distributed.deepspeed.optimizer_probe import check_optimizer
from bumblebee.optim import parameter_groups

CPU = torch.device("cpu")
EACH = {"checkpoint": ("Checkpoint", {"every": 2, "keep": None})}
ELEMENTWISE = ("Adadelta", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")


def check(kind: type, stage: int = 1, ranks: int = 2, groups: list | None = None, **options: object) -> None:
    groups = parameter_groups(small_model()) if groups is None else groups
    check_optimizer(functools.partial(kind, lr=1e-9, **options), groups, CPU, stage, ranks)


def matrices() -> list:
    return [{"params": [p for p in small_model().parameters() if p.dim() == 2]}]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_optimizers_work_at_every_stage(name):
    check(getattr(torch.optim, name))


@pytest.mark.parametrize("options", [{"momentum": 0.9, "nesterov": True}, {"maximize": True}, {"foreach": True}])
def test_options_do_not_make_sgd_depend_on_shapes(options):
    check(torch.optim.SGD, **options)


def test_elementwise_classes_of_users_work_at_every_stage():
    check(shaped_optimizers.Flipping)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (torch.optim.Adafactor, "its state 'row_var' is neither"),
        (shaped_optimizers.Whitened, "its state 'matrices' is neither"),
        (shaped_optimizers.Trust, "its update of an element depends on the parameter's shape"),
        (torch.optim.Adagrad, "without the options of parameter groups"),
    ],
)
def test_optimizers_that_see_shapes_are_refused_by_name(kind, reason):
    with pytest.raises(ValueError, match=rf"^[\w.]+\.{kind.__name__} .*zero_stage 1.*{reason}.*Set trainer.zero_stage to 0"):
        check(kind)
    check(kind, stage=0)


def test_muon_of_matrices_alone_is_refused():
    with pytest.raises(ValueError, match=r"torch\.optim\.Muon does not work with trainer\.zero_stage 2.*2D"):
        check(torch.optim.Muon, stage=2, groups=matrices())
    check(torch.optim.Muon, stage=0, groups=matrices())


@pytest.mark.parametrize("stage", [0, 1])
def test_optimizers_that_need_another_loop_are_refused(stage):
    with pytest.raises(ValueError, match=r"torch\.optim\.SparseAdam cannot be used: it needs sparse gradients"):
        check(torch.optim.SparseAdam, stage)
    with pytest.raises(ValueError, match=r"torch\.optim\.LBFGS cannot be used"):
        check(torch.optim.LBFGS, stage, groups=matrices())


def test_the_probe_touches_neither_model_nor_random_state():
    groups = parameter_groups(small_model())
    before = [p.clone() for group in groups for p in group["params"]]
    state = torch.get_rng_state()
    check(torch.optim.AdamW, groups=groups)
    check_optimizer(lambda _: torch.optim.AdamW(groups), groups, CPU, 1, 2)  # of the model, whatever it is given
    assert all(map(torch.equal, before, (p for group in groups for p in group["params"])))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "optimizer",
    [
        "Adafactor",
        "helpers.shaped_optimizers.Whitened",
        "helpers.shaped_optimizers.Trust",
        "helpers.shaped_optimizers.Flipping",
        "helpers.shaped_optimizers.Growing",
    ],
)
def test_any_state_is_saved_and_resumed_exactly_at_stage_0(optimizer, tmp_path):
    job = {"optimizer": (optimizer, {"lr": 1e-2}), "max_steps": 4, "callbacks": EACH, "zero_stage": 0}
    train(tmp_path / "whole", **job)
    train(tmp_path / "resumed", **job, resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert weight_bytes(tmp_path / "resumed") == weight_bytes(tmp_path / "whole")
