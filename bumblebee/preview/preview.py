"""Preview: what a recipe would do, collected as plain values and told as lines.

The model is built without weights. Where it fits the machine, ``dry_run.py`` measures memory and time; elsewhere, and for
more ranks than one, ``memory_estimate.py`` and the FLOP count compute them. Each figure says which it is.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch import nn

from bumblebee.datamodule import Batch
from bumblebee.distributed import process_group
from bumblebee.distributed.deepspeed.ds_config import HALF_DTYPES, deepspeed_config, read_overrides
from bumblebee.hardware import flops, memory_stats
from bumblebee.nn import IGNORE_INDEX
from bumblebee.nn.attention_kernels import choose
from bumblebee.optim import Constant, parameter_groups
from bumblebee.preview.dry_run import MOST, Failed, Rehearsal, places, rehearse
from bumblebee.preview.memory_estimate import BUCKET, Memory, MicroBatch, ModelSize, Setup, estimate
from bumblebee.recipe import Run, dump
from bumblebee.training.run_folder import check_free, find_resume

QUICK = 60.0  # seconds that a rehearsal may be expected to take where nobody asked for it
_STEPS = 4  # of a rehearsal, at least


class Preview:
    """What there is to know before training. ``report`` prints it.

    Args:
        run: what the recipe describes; the model without weights.
        config: the parsed recipe.
        ranks: to plan for; None for those of the launcher.
        measure: "auto", "always" or "never".
        gpu: compute the memory of GPUs, wherever this runs.
        overwrite: the training may delete an earlier run.

    Raises:
        ValueError: data, folder or options that cannot be used, as in a training.
    """

    def __init__(
        self,
        run: Run,
        config: Namespace,
        ranks: int | None = None,
        measure: str = "auto",
        gpu: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.trainer, self.task, self.data = run.trainer, run.task, run.data
        self.schedule = run.schedule or Constant(warmup_ratio=0.0)
        self.output_dir, self.seed, self.config = Path(run.output_dir), run.seed, config
        self.device = process_group.pick_device(self.trainer.device_name)
        self.overwrite = overwrite
        self.kind = "cuda" if gpu else self.device.type
        if self.trainer.precision == "fp16" and self.kind == "cpu":
            raise ValueError("trainer.precision fp16 needs a GPU; on a CPU take bf16 or fp32")
        self.data.setup(self.seed)
        self.task.setup(self.data)
        self.ranks = ranks or process_group.world_size()
        self.plan = self.trainer.plan_for(self.data, self.seed, self.ranks, find_resume(self.trainer.resume, self.output_dir))
        self.learning_rate, self.optimizer_bytes = probed(run.optimizer, config.optimizer)
        self.size, self.beside = ModelSize.of(self.task.model), [ModelSize.of(model) for model in self.task.models_beside()]
        self._check_options()
        self.batch = self._largest_batch()
        self._check_targets()
        self.rate = self._matmul_rate()
        self.rehearsal: Rehearsal | None = None
        self.why_not = self._why_not(measure)
        if not self.why_not:
            self._rehearse()

    def _check_options(self) -> None:
        """Refuse what a training would refuse."""
        parameter_groups(self.task.model, self.trainer.groups)
        deepspeed_config(self.trainer.engine_options(getattr(self.size.config, "hidden_size", None)))

    # -- data ----------------------------------------------------------------------------------------------------------

    def _largest_batch(self) -> Batch:
        first = places(self.data, self.trainer.micro_batch_size, self.seed)[0]
        return self.data.collate([self.data.train[index] for index in first])

    def _check_targets(self) -> None:
        """Refuse data of which nothing is learned: every step would be left out."""
        if self._has_targets(self.batch):
            return
        print("looking for a sample with a target ...", file=sys.stderr, flush=True)
        samples = self.data.train
        if not any(self._has_targets(self.data.collate([samples[index]])) for index in range(len(samples))):
            raise ValueError(f"data: there is nothing to train on: none of {len(samples)} training samples has a target")

    def _has_targets(self, batch: Batch) -> bool:
        return any(int(count) > 0 for count in self.task.counts(batch).values())

    # -- memory --------------------------------------------------------------------------------------------------------

    @property
    def setup(self) -> Setup:
        """How it is trained."""
        zero = read_overrides(self.trainer.deepspeed).get("zero_optimization", {})
        return Setup(
            self.trainer.precision, self.trainer.zero_stage, self.ranks, self.kind, self.optimizer_bytes,
            offload_optimizer="device" in zero.get("offload_optimizer", {}),
            offload_weights="device" in zero.get("offload_param", {}),
            bucket=float(zero.get("reduce_bucket_size", BUCKET)),
        )  # fmt: skip

    @property
    def kernel(self) -> str | None:
        """Of attention; None for a model that is not ours."""
        wanted = getattr(self.task.model, "attention", None)
        return choose(wanted, HALF_DTYPES.get(self.trainer.precision, torch.float32)) if isinstance(wanted, str) else None

    def computed(self, setup: Setup) -> Memory:
        """By formula."""
        rows, length = self.batch["input_ids"].shape
        targets = int((self.batch["labels"] != IGNORE_INDEX).sum())
        return estimate(self.size, setup, MicroBatch(rows, length, targets, self.kernel or "sdpa"), self.beside)

    @property
    def memory(self) -> Memory:
        """By formula, on each of the ranks."""
        return self.computed(self.setup)

    @property
    def total(self) -> float:
        """Bytes on each device: measured, with what more ranks save by formula; or computed."""
        if self.rehearsal is None:
            return self.memory.total
        alone = self.computed(replace(self.setup, ranks=1)).total
        return max(self.rehearsal.peak + self.memory.total - alone, self.memory.lasting)

    # -- time ----------------------------------------------------------------------------------------------------------

    @property
    def micro_batches(self) -> float:
        """Of a step on one rank, on average: the last step of an epoch may have fewer."""
        across = self.plan.micro_batch_size * self.plan.world_size
        return -(-self.plan.samples // across) / self.plan.steps_per_epoch

    @property
    def operations(self) -> float:
        """Floating-point operations of one rank in a micro-batch like the largest one."""
        rows, length = self.batch["input_ids"].shape
        model = self.task.model
        each = flops.per_token(model) + flops.of_attention(model, length)
        looked_at = 4 / 3 if self.beside or getattr(self.task, "reference", None) == "adapters_off" else 1.0
        return rows * length * each * looked_at

    def _matmul_rate(self) -> float:
        """Operations a second in large matrix products; 0 where that cannot be told."""
        if self.kind != self.device.type:
            return 0.0
        if self.device.type == "cpu":
            return 1e12 * flops.measured_peak(HALF_DTYPES.get(self.trainer.precision, torch.float32))
        known = flops.peak_of(torch.cuda.get_device_name(self.device))
        return 1e12 * (known or 0.0) / (1 if self.trainer.precision in HALF_DTYPES else 8)

    @property
    def seconds_of_a_step(self) -> tuple[float, float] | None:
        """From, to; None where it cannot be told."""
        if self.rehearsal is not None:
            return 0.95 * min(self.rehearsal.seconds), 1.05 * max(self.rehearsal.seconds)
        if not self.rate:
            return None
        best = self.operations * self.micro_batches / self.rate
        return best / 0.6, best / 0.2

    # -- measuring -----------------------------------------------------------------------------------------------------

    def _why_not(self, measure: str) -> str:
        """Why nothing is measured; empty where it is."""
        if self.kind != self.device.type:
            return "no GPU is visible here"
        if measure != "auto":
            return "as asked for" if measure == "never" else ""
        alone, free = self.computed(replace(self.setup, ranks=1)).total, memory_stats.free(self.device)
        if free is not None and alone > 0.8 * free:
            return f"it needs {amount(alone)}, {amount(free)} are free"
        expected = min(self.micro_batches, MOST) * _STEPS * self.operations / 0.3 / self.rate if self.rate else 0.0
        return f"it would take about {expected:,.0f} seconds, see --measure" if expected > QUICK else ""

    def _rehearse(self) -> None:
        print("measuring a few steps in a process of its own ...", file=sys.stderr, flush=True)
        try:
            self.rehearsal = rehearse(dump(self.config), self.micro_batches)
        except Failed as error:
            self.why_not = str(error)

    @property
    def warnings(self) -> list[str]:
        """What a training would refuse, and no mistake of the recipe."""
        try:
            check_free(self.output_dir, self.trainer.resume, self.overwrite)
        except ValueError as error:
            return [str(error)]
        return []


def probed(optimizer: Any, described: Namespace) -> tuple[float | None, float]:
    """(learning rate, bytes kept for each weight) of an optimizer, tried on a matrix.

    DeepSpeed's own ones want a GPU or a compiler: they are taken for Adam.

    Args:
        optimizer: from parameters to an optimizer.
        described: what it was made of.
    """
    if described.class_path.startswith("deepspeed."):
        return described.init_args.get("lr"), 8.0
    weight = nn.Parameter(torch.zeros(64, 64))
    made = optimizer([weight])
    weight.grad = torch.ones_like(weight)
    made.step()
    kept = sum(value.nbytes for value in made.state[weight].values() if torch.is_tensor(value) and value.dim())
    return made.param_groups[0]["lr"], kept / weight.numel()


def amount(count: float) -> str:
    """Bytes as MB (10^6) or GB (10^9)."""
    return f"{count / 1e6:,.0f} MB" if count < 999.5e6 else f"{count / 1e9:,.2f} GB"


def report(preview: Preview, samples: int) -> None:
    """Print everything."""
    from bumblebee.preview.preview_report import lines

    print("\n".join(lines(preview, samples)), flush=True)
