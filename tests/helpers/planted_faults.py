"""Faults that ``bumblebee verify`` must find, each planted where a real one would be.

Used by the tests in their own process and, as a script, on several ranks: ``planted_faults.py FAULT OPTIONS`` plants one,
perhaps none, and runs the command without the measured rates.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable

import pytest
import torch

from bumblebee import trainer
from bumblebee.distributed import process_group
from bumblebee.distributed.deepspeed import training_engine
from bumblebee.inference import attention_metadata
from bumblebee.nn import attention_kernels, linear_cross_entropy
from bumblebee.tasks.language_modeling import LanguageModeling
from bumblebee.tasks.task import Task
from bumblebee.trainer import Trainer
from bumblebee.training import loader, training_state
from bumblebee.verify import check, gradient_check, rank_messages

Patch = pytest.MonkeyPatch


def nothing(patch: Patch) -> None:
    pass


def attention_too_large(patch: Patch) -> None:
    patch.setitem(attention_kernels.KERNELS, "sdpa", lambda *args: 1.01 * attention_kernels.sdpa(*args))


def attention_sees_the_next_token(patch: Patch) -> None:
    """In packed windows only."""
    right = attention_kernels.AttentionMask._build

    def wrong(self, queries, keys, device, window):
        seen = right(self, queries, keys, device, window)
        following = torch.eye(keys + 1, dtype=torch.bool)[1 : queries + 1, :keys]
        return seen if self.documents is None else seen | following

    patch.setattr(attention_kernels.AttentionMask, "_build", wrong)


def cache_forgets_a_block(patch: Patch) -> None:
    """Where growing texts share a call."""
    right = attention_metadata._padded_decode

    def wrong(spans, size):
        slots, valid = right(spans, size)
        return slots, valid & (torch.arange(valid.shape[1]) // size != 1)

    patch.setattr(attention_metadata, "_padded_decode", wrong)


def gradient_of_the_loss_too_large(patch: Patch) -> None:
    right = linear_cross_entropy._LinearCrossEntropy.backward

    def wrong(ctx, *grads):
        hidden, weight, labels = right(ctx, *grads)
        return hidden, 1.01 * weight, labels

    patch.setattr(linear_cross_entropy._LinearCrossEntropy, "backward", staticmethod(wrong))


def divided_by_micro_batches(patch: Patch) -> None:
    right = Task.total
    patch.setattr(Task, "total", lambda *args: right(*args) / gradient_check.ACCUMULATE)


def means_of_means(patch: Patch) -> None:
    """Each micro-batch's mean, averaged over micro-batches and ranks."""
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


def averaged_once_too_often(patch: Patch) -> None:
    """The factor that undoes DeepSpeed's average over ranks is forgotten."""
    right = Task.total
    patch.setattr(Task, "total", lambda *args: right(*args) / process_group.world_size())


def no_fp32_weights(patch: Patch) -> None:
    """The optimizer's own weights are rounded to bf16."""
    right = training_engine.Engine.step

    def wrong(self):
        right(self)
        for group in self.parameter_groups:
            for parameter in group["params"]:
                parameter.data.copy_(parameter.data.bfloat16())

    patch.setattr(training_engine.Engine, "step", wrong)


def schedule_is_ignored(patch: Patch) -> None:
    patch.setattr(trainer, "set_learning_rate", lambda groups, factor: groups[0]["lr"])


def optimizer_state_is_lost(patch: Patch) -> None:
    right = training_engine.restore

    def wrong(spans, optimizer, reader):
        right(spans, optimizer, reader)
        for entries in getattr(optimizer, "optimizer", optimizer).state.values():
            entries["exp_avg"].zero_()

    patch.setattr(training_engine, "restore", wrong)


def resume_skips_a_micro_batch(patch: Patch) -> None:
    right = loader.train_windows

    def wrong(data, plan, seed, rank, first_step, *others, **options):
        windows = right(data, plan, seed, rank, first_step, *others, **options)
        if first_step:
            yield next(windows)[1:]
        yield from windows

    patch.setattr(loader, "train_windows", wrong)


def random_numbers_are_lost(patch: Patch) -> None:
    patch.setattr(training_state, "load_random_state", lambda folder, rank: None)


def runs_differ(patch: Patch) -> None:
    """As with kernels that add up in any order."""
    right = training_engine.Engine.step
    count = itertools.count()

    def wrong(self):
        right(self)
        vector = next(iter(self._optimizer.param_groups))["params"][0]
        vector.data.view(-1)[0] += 1e-6 * next(count)

    patch.setattr(training_engine.Engine, "step", wrong)


def signal_in_training(patch: Patch) -> None:
    """What Ctrl-C or a launcher sends."""
    right = LanguageModeling.training_step

    def wrong(self, model, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return right(self, model, batch)

    patch.setattr(LanguageModeling, "training_step", wrong)


def loss_check_breaks(patch: Patch) -> None:
    def broken(*args):
        raise RuntimeError("no kernel image is available")

    patch.setattr(check.loss, "measures", broken)


def every_step_breaks(patch: Patch) -> None:
    def broken(self, model, batch):
        raise RuntimeError("out of memory")

    patch.setattr(LanguageModeling, "training_step", broken)


def one_rank_breaks(patch: Patch) -> None:
    """In the middle of a step."""
    right = LanguageModeling.training_step

    def broken(self, model, batch):
        if process_group.rank() == 1:
            raise RuntimeError("uncorrectable ECC error")
        return right(self, model, batch)

    patch.setattr(LanguageModeling, "training_step", broken)
    patch.setattr(rank_messages, "GRACE", 8.0)


def one_rank_hangs(patch: Patch) -> None:
    """In the middle of a step, and no one says anything."""
    right = LanguageModeling.training_step

    def hangs(self, model, batch):
        if process_group.rank() == 1:
            time.sleep(600)
        return right(self, model, batch)

    patch.setattr(LanguageModeling, "training_step", hangs)
    patch.setattr(rank_messages, "LIMIT", 30.0)
    patch.setattr(rank_messages, "GRACE", 3.0)


def one_rank_dies(patch: Patch) -> None:
    """As a process does that the system takes for too large."""
    right = LanguageModeling.training_step

    def dies(self, model, batch):
        if process_group.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return right(self, model, batch)

    patch.setattr(LanguageModeling, "training_step", dies)


def only(patch: Patch, *names: str) -> None:
    """Leave only these checks."""
    chosen = [one for one in check.CHECKS if one.name in names]
    assert len(chosen) == len(names)
    patch.setattr(check, "CHECKS", tuple(chosen))


def main() -> None:
    from bumblebee.cli.main import main as command

    fault: Callable[[Patch], None] = globals()[sys.argv[1]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "CHECKS", check.KERNELS + check.TRAINING)
        fault(patch)
        command(["verify", *sys.argv[2:]])


if __name__ == "__main__":
    main()
