"""Faults that ``bumblebee verify`` must detect, each injected where a real one would be.

Imported by in-process tests. As a script, for several ranks, ``planted_faults.py FAULT OPTIONS`` injects one fault and runs the
command with five checks.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from bumblebee import trainer
from bumblebee.distributed import process_group
from bumblebee.distributed.deepspeed import engine, engine_state
from bumblebee.inference import attention_metadata
from bumblebee.nn import attention_kernels, linear_cross_entropy
from bumblebee.tasks.language_modeling import LanguageModeling
from bumblebee.tasks.task import Task
from bumblebee.trainer import Trainer
from bumblebee.training import loader, random_state
from bumblebee.verify import check, watchdog
from bumblebee.verify.checks import gradient_check
from helpers.verify_rows import ATTENTION, CURVE, GRADIENT, LOSS, RESUME

Patch = pytest.MonkeyPatch


def attention_too_large(patch: Patch) -> None:
    patch.setitem(attention_kernels.KERNELS, "sdpa", lambda *args: 1.01 * attention_kernels.sdpa(*args))


def attention_sees_next_token(patch: Patch) -> None:
    """In packed rows only."""
    original = attention_kernels.AttentionMask._build

    def wrong(self, queries, keys, device, window):
        seen = original(self, queries, keys, device, window)
        following = torch.eye(keys + 1, dtype=torch.bool)[1 : queries + 1, :keys]
        return seen if self.documents is None else seen | following

    patch.setattr(attention_kernels.AttentionMask, "_build", wrong)


def cache_skips_a_block(patch: Patch) -> None:
    """Where decoding sequences share a call."""
    original = attention_metadata._padded_decode

    def wrong(spans, size):
        slots, valid = original(spans, size)
        return slots, valid & (torch.arange(valid.shape[1]) // size != 1)

    patch.setattr(attention_metadata, "_padded_decode", wrong)


def loss_gradient_too_large(patch: Patch) -> None:
    original = linear_cross_entropy._LinearCrossEntropy.backward

    def wrong(ctx, *grads):
        hidden, weight, *others = original(ctx, *grads)
        return hidden, 1.01 * weight, *others

    patch.setattr(linear_cross_entropy._LinearCrossEntropy, "backward", staticmethod(wrong))


def divided_by_micro_batches(patch: Patch) -> None:
    original = Task.total
    patch.setattr(Task, "total", lambda *args: original(*args) / gradient_check.ACCUMULATE)


def means_of_means(patch: Patch) -> None:
    """The mean of each micro-batch, averaged over micro-batches and ranks."""
    step = LanguageModeling.training_step

    def wrong(self, model, batch):
        return {name: loss / max(int(self.counts(batch)[name]), 1) for name, loss in step(self, model, batch).items()}

    patch.setattr(LanguageModeling, "training_step", wrong)
    averaged = gradient_check.ACCUMULATE * process_group.world_size()
    patch.setattr(Task, "total", lambda self, losses, counts: sum(losses.values()) / averaged)


def counts_of_one_rank(patch: Patch) -> None:
    def wrong(self, window):
        return {"loss": float(sum(int(self.task.counts(batch)["loss"]) for batch in window))}

    patch.setattr(Trainer, "count_targets", wrong)


def averaged_twice(patch: Patch) -> None:
    """DeepSpeed's average over ranks is not undone."""
    original = Task.total
    patch.setattr(Task, "total", lambda *args: original(*args) / process_group.world_size())


def no_fp32_weights(patch: Patch) -> None:
    """The optimizer keeps its weights in bf16."""
    original = engine.TrainingEngine.step

    def wrong(self):
        original(self)
        for group in self.parameter_groups:
            for parameter in group["params"]:
                parameter.data.copy_(parameter.data.bfloat16())

    patch.setattr(engine.TrainingEngine, "step", wrong)


def schedule_is_ignored(patch: Patch) -> None:
    patch.setattr(trainer, "set_learning_rate", lambda groups, factor: groups[0]["lr"])


def optimizer_state_is_lost(patch: Patch) -> None:
    original = engine_state.restore_shards

    def wrong(shards, optimizer, reader):
        original(shards, optimizer, reader)
        for entries in getattr(optimizer, "optimizer", optimizer).state.values():
            entries["exp_avg"].zero_()

    patch.setattr(engine_state, "restore_shards", wrong)


def resume_skips_a_micro_batch(patch: Patch) -> None:
    original = loader.train_windows

    def wrong(data, plan, seed, rank, first_step, *others, **options):
        windows = original(data, plan, seed, rank, first_step, *others, **options)
        if first_step:
            yield next(windows)[1:]
        yield from windows

    patch.setattr(loader, "train_windows", wrong)


def random_state_is_lost(patch: Patch) -> None:
    patch.setattr(random_state, "load_random_state", lambda folder, rank: None)


def not_deterministic(patch: Patch) -> None:
    """Like kernels with a non-deterministic order of summation."""
    original = engine.TrainingEngine.step
    count = itertools.count()

    def wrong(self):
        original(self)
        vector = next(iter(self._optimizer.param_groups))["params"][0]
        vector.data.view(-1)[0] += 1e-6 * next(count)

    patch.setattr(engine.TrainingEngine, "step", wrong)


def signal_in_training(patch: Patch) -> None:
    """As sent by Ctrl-C or a launcher."""
    original = LanguageModeling.training_step

    def wrong(self, model, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, model, batch)

    patch.setattr(LanguageModeling, "training_step", wrong)


def loss_check_raises(patch: Patch) -> None:
    def run(context):
        raise RuntimeError("no kernel image is available")

    checks = tuple(replace(one, run=run) if one.name == LOSS else one for one in check.CHECKS)
    patch.setattr(check, "CHECKS", checks)


def every_step_raises(patch: Patch) -> None:
    def raises(self, model, batch):
        raise RuntimeError("out of memory")

    patch.setattr(LanguageModeling, "training_step", raises)


def one_rank_raises(patch: Patch) -> None:
    """In the middle of a step."""
    original = LanguageModeling.training_step

    def raises(self, model, batch):
        if process_group.rank() == 1:
            raise RuntimeError("uncorrectable ECC error")
        return original(self, model, batch)

    patch.setattr(LanguageModeling, "training_step", raises)
    patch.setattr(watchdog, "GRACE", 8.0)


def one_rank_hangs(patch: Patch) -> None:
    """In the middle of a step, without an error."""
    original = LanguageModeling.training_step

    def hangs(self, model, batch):
        if process_group.rank() == 1:
            time.sleep(600)
        return original(self, model, batch)

    patch.setattr(LanguageModeling, "training_step", hangs)
    patch.setattr(watchdog, "LIMIT", 30.0)
    patch.setattr(watchdog, "GRACE", 3.0)


def one_rank_dies(patch: Patch) -> None:
    """Like a process ended by the OOM killer."""
    original = LanguageModeling.training_step

    def dies(self, model, batch):
        if process_group.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, model, batch)

    patch.setattr(LanguageModeling, "training_step", dies)


def only(patch: Patch, *names: str) -> None:
    """Run only these checks."""
    selected = tuple(one for one in check.CHECKS if one.name in names)
    assert len(selected) == len(names)
    patch.setattr(check, "CHECKS", selected)


def main() -> None:
    from bumblebee.cli.main import main as cli

    fault: Callable[[Patch], None] = globals()[sys.argv[1]]
    with pytest.MonkeyPatch.context() as patch:
        only(patch, ATTENTION, LOSS, GRADIENT, CURVE, RESUME)
        fault(patch)
        cli(["verify", *sys.argv[2:]])


if __name__ == "__main__":
    main()
