"""Faults of the loop, the optimizer, checkpoints and methods: one function each, which plants it where a real one would be.

``FAULTS`` has for each the check of ``bumblebee verify`` that must fail, its measurements that do, and where to plant it.
As a script, ``loop_faults.py FOLDER [CHECK ...]`` plants those of some or all checks one after another on the ranks of a
launcher, and writes FOLDER/results.json.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bumblebee import trainer as trainer_module
from bumblebee.checkpoint.model_files import ModelFiles
from bumblebee.checkpoint.sharded_state import WEIGHTS
from bumblebee.distributed import process_group
from bumblebee.distributed.deepspeed import engine, engine_state, operators
from bumblebee.distributed.deepspeed.zero_shards import base_optimizer
from bumblebee.lora import peft_layers
from bumblebee.nn import attention, block_forward, lm_head
from bumblebee.optim import Constant, Cosine
from bumblebee.recipe import Run
from bumblebee.tasks.dpo import DPO
from bumblebee.tasks.language_modeling import LanguageModeling
from bumblebee.tasks.reference import FrozenReference, PolicyReference
from bumblebee.tasks.task import Task
from bumblebee.tokenizer.tokenizer import Tokenizer
from bumblebee.trainer import Trainer
from bumblebee.training import checkpointing, loader, setup
from bumblebee.training.plan import Position
from bumblebee.verify import check
from bumblebee.verify.check_result import CheckResult
from bumblebee.verify.checks import resume_check
from bumblebee.verify.checks.data_check import BORDERS
from bumblebee.verify.context import Context
from bumblebee.verify.rank_messages import RankMessages
from bumblebee.verify.small_model import FAMILY_CONFIGS
from bumblebee.verify.subject import Subject
from bumblebee.verify.training_run import build_model
from bumblebee.verify.verify_options import VerifyOptions
from bumblebee.verify.verify_report import verdict
from datamodules import Pretrain, pretrain
from helpers import planted_faults as planted
from helpers.verify_rows import ACCUMULATION, CURVE, DATA, GRADIENT, LORA, LOSS, MODEL, OPTIMIZER, RECOMPUTATION, RESUME
from helpers.verify_rows import DPO as DPO_ROW

Patch = pytest.MonkeyPatch

# -- loss and gradient -----------------------------------------------------------------------------------------------------


def not_averaged_over_ranks(patch: Patch) -> None:
    original = Task.total
    patch.setattr(Task, "total", lambda *args: original(*args) * process_group.world_size())


def counts_all_tokens(patch: Patch) -> None:
    """Padding and prompts are counted as targets."""
    patch.setattr(LanguageModeling, "counts", lambda self, batch: {"loss": batch["labels"].numel()})


def last_micro_batch_is_dropped(patch: Patch) -> None:
    original = Trainer.train_step
    patch.setattr(Trainer, "train_step", lambda self, window: original(self, window[:-1]))


def ranks_read_the_same_data(patch: Patch) -> None:
    original = loader.train_windows

    def wrong(data, plan, seed, rank, *others, **options):
        return original(data, plan, seed, 0, *others, **options)

    patch.setattr(loader, "train_windows", wrong)


def ranks_shuffle_differently(patch: Patch) -> None:
    original = loader.train_windows

    def wrong(data, plan, seed, rank, *others, **options):
        return original(data, plan, seed + rank, rank, *others, **options)

    patch.setattr(loader, "train_windows", wrong)


def weights_of_one_rank_drift(patch: Patch) -> None:
    original = engine.TrainingEngine.step

    def wrong(self):
        original(self)
        for parameter in self.model.parameters():
            parameter.data += 0.01 * process_group.rank()

    patch.setattr(engine.TrainingEngine, "step", wrong)


def _loss(patch: Patch, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Replace the loss of training by one of logits and labels."""

    def wrong(hidden, weight, labels, weighting=None, positions=None):
        losses = loss(nn.functional.linear(hidden, weight).float(), labels)
        return losses if positions is None else losses.new_zeros(positions.size).index_copy(0, positions.index, losses)

    patch.setattr(lm_head, "linear_cross_entropy", wrong)


def labels_are_smoothed(patch: Patch) -> None:
    _loss(patch, lambda logits, labels: cross_entropy(logits, labels, reduction="none", label_smoothing=0.1))


def z_loss_is_added(patch: Patch) -> None:
    _loss(patch, lambda logits, labels: cross_entropy(logits, labels, reduction="none") + 1e-3 * logits.logsumexp(-1).square())


def loss_is_in_bits(patch: Patch) -> None:
    _loss(patch, lambda logits, labels: cross_entropy(logits, labels, reduction="none") / math.log(2))


# -- accumulation ----------------------------------------------------------------------------------------------------------


def accumulates_in_16_bits(patch: Patch) -> None:
    original = operators.deepspeed_config

    def wrong(options):
        return {**original(options), "data_types": {"grad_accum_dtype": options.precision}}

    patch.setattr(operators, "deepspeed_config", wrong)


def gradients_are_read_in_memory_order(patch: Patch) -> None:
    """A gradient that is not contiguous is flattened as if it was."""
    original = engine.TrainingEngine.backward

    def misread(gradient):
        return gradient.as_strided(gradient.shape, torch.empty(gradient.shape, device="meta").stride())

    def wrong(self, loss):
        if not hasattr(self, "misread"):  # after the hooks of the check, so that they see its gradients
            self.misread = [parameter.register_hook(misread) for parameter in self.model.parameters()]
        original(self, loss)

    patch.setattr(engine.TrainingEngine, "backward", wrong)


def every_second_backward_is_lost(patch: Patch) -> None:
    original = engine.TrainingEngine.backward

    def wrong(self, loss):
        self.backwards = getattr(self, "backwards", 0) + 1
        original(self, loss * (self.backwards % 2))

    patch.setattr(engine.TrainingEngine, "backward", wrong)


# -- optimizer -------------------------------------------------------------------------------------------------------------


def _decays(patch: Patch, chosen: Callable[[str], bool]) -> None:
    """Give parameters by name the optimizer's weight decay."""
    original = setup.parameter_groups

    def wrong(model, rules=()):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = []
        for group in original(model, rules):
            for decayed in (False, True):
                params = [p for p in group["params"] if chosen(names[id(p)]) == decayed]
                options = {key: value for key, value in group.items() if not (decayed and key == "weight_decay")}
                groups += [{**options, "params": params}] if params else []
        return groups

    patch.setattr(setup, "parameter_groups", wrong)


def embeddings_decay(patch: Patch) -> None:
    _decays(patch, lambda name: "embed" in name)


def norms_decay(patch: Patch) -> None:
    _decays(patch, lambda name: "norm" in name)


def biases_decay(patch: Patch) -> None:
    _decays(patch, lambda name: "bias" in name)


def _optimizer(patch: Patch, **options: object) -> None:
    """Change options of the optimizer's groups after it is built."""
    original = engine.TrainingEngine.__init__

    def wrong(self, model, optimizer, *others):
        def build(groups):
            built = optimizer(groups)
            for group in built.param_groups:
                group.update(options)
            return built

        original(self, model, build, *others)

    patch.setattr(engine.TrainingEngine, "__init__", wrong)


def nothing_decays(patch: Patch) -> None:
    _optimizer(patch, weight_decay=0.0)


def decay_is_part_of_the_gradient(patch: Patch) -> None:
    """Adam with L2 regularization."""
    _optimizer(patch, decoupled_weight_decay=False)


def eps_is_the_default(patch: Patch) -> None:
    _optimizer(patch, eps=1e-8)


def first_beta_is_the_default(patch: Patch) -> None:
    _optimizer(patch, betas=(0.9, 0.95))


def second_beta_is_the_default(patch: Patch) -> None:
    _optimizer(patch, betas=(0.8, 0.999))


def _before_step(patch: Patch, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    original = engine.TrainingEngine.step

    def wrong(self):
        for state in base_optimizer(self._optimizer).state.values():
            change(state)
        original(self)

    patch.setattr(engine.TrainingEngine, "step", wrong)


def no_bias_correction(patch: Patch) -> None:
    _before_step(patch, lambda state: state["step"].fill_(1e6))


def second_moments_are_reset(patch: Patch) -> None:
    _before_step(patch, lambda state: state["exp_avg_sq"].zero_())


def moments_are_rounded(patch: Patch) -> None:
    """Optimizer state in bf16."""
    _before_step(patch, lambda state: state["exp_avg"].copy_(state["exp_avg"].bfloat16()))


def clipping_is_ignored(patch: Patch) -> None:
    original = setup.engine_options
    patch.setattr(setup, "engine_options", lambda *args: replace(original(*args), gradient_clip=None))


def clips_before_unscaling(patch: Patch) -> None:
    """With a loss scale of 2^8, every gradient is above the threshold."""
    original = setup.engine_options

    def wrong(*args):
        options = original(*args)
        return replace(options, gradient_clip=options.gradient_clip and options.gradient_clip / 2**8)

    patch.setattr(setup, "engine_options", wrong)


def clips_each_micro_batch(patch: Patch) -> None:
    """On each rank, before the average over ranks."""
    original = engine.TrainingEngine.backward

    def wrong(self, loss):
        original(self, loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.options.gradient_clip)

    patch.setattr(engine.TrainingEngine, "backward", wrong)


def clips_each_tensor(patch: Patch) -> None:
    def wrong(self):
        for parameter in self._engine.module.parameters():
            nn.utils.clip_grad_norm_(parameter, self.options.gradient_clip)

    patch.setattr(engine.TrainingEngine, "_clip_at_stage_0", wrong)


def gradient_is_kept(patch: Patch) -> None:
    """It is not zeroed after the step."""
    import deepspeed

    patch.setattr(deepspeed.DeepSpeedEngine, "zero_grad", lambda self: None)
    patch.setattr(torch.optim.Optimizer, "zero_grad", lambda self, set_to_none=True: None)


def schedule_is_a_step_ahead(patch: Patch) -> None:
    original = Cosine.factor
    patch.setattr(Cosine, "factor", lambda self, step, total: original(self, step + 1, total))


def schedule_ends_late(patch: Patch) -> None:
    """As if steps had been counted by micro-batches."""
    original = Cosine.factor
    patch.setattr(Cosine, "factor", lambda self, step, total: original(self, step, 2 * total))


def groups_share_a_learning_rate(patch: Patch) -> None:
    original = trainer_module.set_learning_rate

    def wrong(groups, factor):
        rate = original(groups, factor)
        for group in groups:
            group["lr"] = rate
        return rate

    patch.setattr(trainer_module, "set_learning_rate", wrong)


# -- data order and metrics --------------------------------------------------------------------------------------------------


def epochs_are_not_shuffled(patch: Patch) -> None:
    patch.setattr(loader, "epoch_order", lambda samples, seed, epoch, lengths=None: torch.arange(samples).numpy())


def epochs_repeat_the_first_order(patch: Patch) -> None:
    original = loader.epoch_order
    patch.setattr(loader, "epoch_order", lambda samples, seed, epoch, lengths=None: original(samples, seed, 0, lengths))


def logs_the_clipped_norm(patch: Patch) -> None:
    original = engine.TrainingEngine.gradient_norm
    patch.setattr(engine.TrainingEngine, "gradient_norm", lambda self: min(original(self), self.options.gradient_clip))


# -- checkpoints -------------------------------------------------------------------------------------------------------------


def _after_restore(patch: Patch, change: Callable[[torch.Tensor, dict[str, torch.Tensor]], object]) -> None:
    original = engine_state.restore_shards

    def wrong(shards, optimizer, reader):
        original(shards, optimizer, reader)
        for flat, state in base_optimizer(optimizer).state.items():
            change(flat, state)

    patch.setattr(engine_state, "restore_shards", wrong)


def second_moments_are_not_restored(patch: Patch) -> None:
    _after_restore(patch, lambda flat, state: state["exp_avg_sq"].zero_())


def optimizer_steps_are_not_restored(patch: Patch) -> None:
    _after_restore(patch, lambda flat, state: state.update(step=torch.zeros(())))


def resumes_from_16_bit_weights(patch: Patch) -> None:
    _after_restore(patch, lambda flat, state: flat.data.copy_(flat.data.bfloat16()))


def resume_restarts_the_epoch(patch: Patch) -> None:
    patch.setattr(checkpointing, "resumed_position", lambda *args: Position(resume_check.INTERRUPT_AT, 0, 0))


def resume_restarts_the_schedule(patch: Patch) -> None:
    original = checkpointing.load_checkpoint

    def wrong(run, path):
        original(run, path)
        first, factor = run.step, run.schedule.factor
        run.schedule.factor = lambda step, total: factor(step - first, total)

    patch.setattr(checkpointing, "load_checkpoint", wrong)


def resume_counts_one_step_more(patch: Patch) -> None:
    original = checkpointing.load_checkpoint

    def wrong(run, path):
        original(run, path)
        factor = run.schedule.factor
        run.schedule.factor = lambda step, total: factor(step + 1, total)

    patch.setattr(checkpointing, "load_checkpoint", wrong)


def _saved(patch: Patch, change: Callable[[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    original = engine_state.saved_shards

    def wrong(*args):
        return (replace(shard, tensors=change(shard.name, shard.tensors)) for shard in original(*args))

    patch.setattr(engine_state, "saved_shards", wrong)


def weights_are_saved_in_16_bits(patch: Patch) -> None:
    _saved(patch, lambda name, tensors: {**tensors, WEIGHTS: tensors[WEIGHTS].bfloat16().float()})


def shard_lacks_a_moment(patch: Patch) -> None:
    lost = ("exp_avg_sq", "model.layers.1.mlp.up_proj.weight")
    _saved(patch, lambda name, tensors: {kind: t for kind, t in tensors.items() if (kind, name) != lost})


def shard_lacks_a_tensor(patch: Patch) -> None:
    original = engine_state.saved_shards
    patch.setattr(engine_state, "saved_shards", lambda *args: (s for s in original(*args) if "layers.1.mlp.up" not in s.name))


def _model_folder(patch: Patch, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    original = ModelFiles.write

    def wrong(self, folder, tensors, *others):
        changed = ((name, change(name, tensor)) for name, tensor in tensors)
        return original(self, folder, ((name, tensor) for name, tensor in changed if tensor is not None), *others)

    patch.setattr(ModelFiles, "write", wrong)


def model_folder_lacks_a_tensor(patch: Patch) -> None:
    _model_folder(patch, lambda name, tensor: None if "layers.1.mlp.up" in name else tensor)


def model_folder_is_rounded(patch: Patch) -> None:
    _model_folder(patch, lambda name, tensor: tensor.bfloat16().to(tensor.dtype))


def ranks_draw_the_same_numbers(patch: Patch) -> None:
    original = setup._seed_everything
    patch.setattr(setup, "_seed_everything", lambda seed: original(seed - process_group.rank()))


# -- methods -----------------------------------------------------------------------------------------------------------------


def recomputation_drops_others(patch: Patch) -> None:
    original = block_forward.checkpoint
    patch.setattr(block_forward, "checkpoint", functools.partial(original, preserve_rng_state=False))


def lora_is_not_scaled(patch: Patch) -> None:
    original = peft_layers.create_config
    patch.setattr(
        peft_layers, "create_config", lambda base, **options: original(base, **{**options, "lora_alpha": options["r"]})
    )


def lora_is_scaled_by_the_root(patch: Patch) -> None:
    original = peft_layers.create_config
    patch.setattr(peft_layers, "create_config", lambda base, **options: original(base, **{**options, "use_rslora": True}))


def lora_trains_the_base(patch: Patch) -> None:
    original = peft_layers.inject

    def wrong(model, config):
        original(model, config)
        model.requires_grad_(True)

    patch.setattr(peft_layers, "inject", wrong)


def lora_skips_the_mlp(patch: Patch) -> None:
    """Its adapters exist and are never trained."""
    original = peft_layers.inject

    def wrong(model, config):
        original(model, config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "mlp" not in name)

    patch.setattr(peft_layers, "inject", wrong)


def _pair_loss(patch: Patch, change: Callable[[Callable[..., torch.Tensor], DPO, torch.Tensor], torch.Tensor]) -> None:
    original = DPO._sigmoid
    patch.setattr(DPO, "_sigmoid", lambda self, h: change(original, self, h))


def dpo_prefers_the_rejected(patch: Patch) -> None:
    _pair_loss(patch, lambda loss, task, h: loss(task, -h))


def dpo_ignores_beta(patch: Patch) -> None:
    _pair_loss(patch, lambda loss, task, h: loss(task, h / task.pref_beta))


def dpo_smooths_labels(patch: Patch) -> None:
    _pair_loss(patch, lambda loss, task, h: 0.9 * loss(task, h) + 0.1 * loss(task, -h))


def dpo_averages_tokens(patch: Patch) -> None:
    original = DPO.__init__
    patch.setattr(
        DPO, "__init__", lambda self, *args, **options: original(self, *args, **{**options, "length_normalised": True})
    )


def dpo_reference_drops_activations(patch: Patch) -> None:
    original = FrozenReference.__call__

    def wrong(self, model, batch, split):
        self.model.model.train()
        return original(self, model, batch, split)

    patch.setattr(FrozenReference, "__call__", wrong)


def dpo_reference_follows_the_policy(patch: Patch) -> None:
    patch.setattr(DPO, "_open_reference", lambda self, run: PolicyReference(self.model, lambda model: nullcontext()))


def dpo_has_no_reference(patch: Patch) -> None:
    original = DPO._margins
    patch.setattr(DPO, "_margins", lambda self, tokens, reference, batch: original(self, tokens, 0 * reference, batch))


# -- model and data of one rank --------------------------------------------------------------------------------------------


def last_rank_rotates_backwards(patch: Patch) -> None:
    original = attention.apply_rotary
    if process_group.rank() == process_group.world_size() - 1:
        patch.setattr(attention, "apply_rotary", lambda x, cos, sin: original(x, cos, -sin))


def last_rank_trains_on_the_next_document(patch: Patch) -> None:
    """The last label of a document is the first token of the next."""
    original = pretrain.collate_rows

    def wrong(rows, width, pad_token_id):
        batch = original(rows, width, pad_token_id)
        last = batch["position_ids"].roll(-1, 1) == 0
        last[:, -1] = False
        return {**batch, "labels": batch["labels"].where(~last, batch["input_ids"].roll(-1, 1))}

    if process_group.rank() == process_group.world_size() - 1:
        patch.setattr(pretrain, "collate_rows", wrong)


# -- the list ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """Where a fault is planted, and what must name it.

    Args:
        plant: plants it.
        check: the check that must fail.
        measurements: those of the check that must fail; empty for an error or for any of them.
        precision: of the run.
        stage: of ZeRO.
        ranks: numbers of ranks on which it exists.
        loads: changes loading a checkpoint only, so that the checkpoints of a correct run serve.
    """

    plant: Callable[[Patch], None]
    check: str
    measurements: tuple[str, ...] = ()
    precision: str = "fp32"
    stage: int = 1
    ranks: tuple[int, ...] = (1, 2)
    loads: bool = False

    @property
    def name(self) -> str:
        return f"{self.plant.__name__}-{self.check.replace(' ', '_')}-{self.precision}-{self.stage}"


def _half(plant: Callable[[Patch], None], *measurements: str, stage: int = 2) -> Fault:
    """A fault of the optimizer in bf16, where rounding used to hide it."""
    return Fault(plant, OPTIMIZER, measurements, "bf16", stage)


def _resume(plant: Callable[[Patch], None], *measurements: str, precision: str = "fp32", loads: bool = True) -> Fault:
    return Fault(plant, RESUME, measurements, precision, stage=2, loads=loads)


BYTES = "differing bytes of "
FAULTS = (
    Fault(planted.means_of_means, GRADIENT),
    Fault(planted.divided_by_micro_batches, GRADIENT),
    Fault(planted.averaged_twice, GRADIENT, ranks=(2,)),
    Fault(planted.counts_of_one_rank, GRADIENT, ranks=(2,)),
    Fault(not_averaged_over_ranks, GRADIENT, ranks=(2,)),
    Fault(counts_all_tokens, GRADIENT),
    Fault(ranks_read_the_same_data, GRADIENT, ranks=(2,)),
    Fault(ranks_shuffle_differently, GRADIENT, ranks=(2,)),
    Fault(weights_of_one_rank_drift, GRADIENT, stage=0, ranks=(2,)),
    Fault(labels_are_smoothed, LOSS, ("worst target", "mean", "gradients", "gradient scale")),
    Fault(z_loss_is_added, LOSS, precision="bf16"),
    Fault(loss_is_in_bits, LOSS, precision="bf16"),
    Fault(accumulates_in_16_bits, ACCUMULATION, precision="bf16", stage=1),
    Fault(accumulates_in_16_bits, ACCUMULATION, precision="bf16", stage=2),
    Fault(gradients_are_read_in_memory_order, ACCUMULATION),
    Fault(gradients_are_read_in_memory_order, ACCUMULATION, precision="bf16", stage=3),
    Fault(last_micro_batch_is_dropped, ACCUMULATION, precision="bf16", stage=2),
    Fault(every_second_backward_is_lost, ACCUMULATION, precision="bf16"),
    _half(embeddings_decay, "embeddings", stage=1),
    _half(norms_decay, "norms"),
    _half(biases_decay, "biases", stage=3),
    _half(nothing_decays, "matrices"),
    _half(decay_is_part_of_the_gradient, "matrices", "first moments", "second moments"),
    _half(eps_is_the_default, "matrices", "embeddings", "norms", "biases"),
    _half(first_beta_is_the_default, "matrices", "embeddings", "norms", "biases", "first moments"),
    _half(second_beta_is_the_default),
    _half(no_bias_correction, "matrices", "embeddings", "norms", "biases"),
    _half(second_moments_are_reset),
    _half(moments_are_rounded),
    _half(clipping_is_ignored, "matrices", "embeddings", "norms", "biases", "first moments", "second moments"),
    _half(clips_before_unscaling),
    _half(clips_each_micro_batch, stage=0),
    _half(clips_each_tensor, stage=0),
    _half(gradient_is_kept, stage=0),
    _half(schedule_is_a_step_ahead, "matrices", "embeddings", "norms", "biases"),
    _half(schedule_ends_late, "matrices", "embeddings", "norms", "biases"),
    _half(planted.schedule_is_ignored, "matrices", "embeddings", "norms", "biases"),
    _half(groups_share_a_learning_rate, "norms"),
    _half(planted.no_fp32_weights),
    Fault(epochs_are_not_shuffled, CURVE),
    Fault(epochs_repeat_the_first_order, CURVE),
    Fault(logs_the_clipped_norm, CURVE, ("gradient norms",)),
    _resume(planted.optimizer_state_is_lost, BYTES + "weights", BYTES + "optimizer state"),
    _resume(second_moments_are_not_restored, BYTES + "weights", BYTES + "optimizer state"),
    _resume(optimizer_steps_are_not_restored, BYTES + "weights", BYTES + "optimizer state"),
    _resume(resumes_from_16_bit_weights, precision="bf16"),
    _resume(resume_restarts_the_epoch),
    _resume(planted.resume_skips_a_micro_batch),
    _resume(resume_restarts_the_schedule),
    _resume(resume_counts_one_step_more),
    _resume(planted.random_state_is_lost),
    _resume(weights_are_saved_in_16_bits, loads=False),
    _resume(shard_lacks_a_moment, loads=False),
    _resume(shard_lacks_a_tensor, loads=False),
    _resume(model_folder_lacks_a_tensor, "wrong tensors of the model folder", loads=False),
    _resume(model_folder_is_rounded, "wrong tensors of the model folder", loads=False),
    Fault(ranks_draw_the_same_numbers, RESUME, ("ranks with another rank's random state",), ranks=(2,)),
    Fault(recomputation_drops_others, RECOMPUTATION),
    Fault(lora_is_not_scaled, LORA, ("adapters",)),
    Fault(lora_is_scaled_by_the_root, LORA, ("adapters",)),
    Fault(lora_trains_the_base, LORA, ("adapters", "changed base tensors")),
    Fault(lora_skips_the_mlp, LORA, ("adapters",)),
    Fault(dpo_prefers_the_rejected, DPO_ROW),
    Fault(dpo_ignores_beta, DPO_ROW),
    Fault(dpo_smooths_labels, DPO_ROW),
    Fault(dpo_averages_tokens, DPO_ROW),
    Fault(dpo_reference_drops_activations, DPO_ROW),
    Fault(dpo_reference_follows_the_policy, DPO_ROW),
    Fault(dpo_has_no_reference, DPO_ROW),
    Fault(last_rank_rotates_backwards, MODEL, ranks=(2,)),
    Fault(last_rank_trains_on_the_next_document, DATA, (BORDERS,), ranks=(2,)),
    Fault(ranks_read_the_same_data, DATA, ranks=(2,)),
    Fault(ranks_shuffle_differently, DATA, ranks=(2,)),
)


def assert_named(fault: Fault, result: CheckResult, line: str) -> None:
    """The check fails, and the report names what is above its bound and what not to rely on."""
    failed = tuple(measurement.name for measurement in result.measurements if not measurement.passed)
    assert not result.passed, [str(measurement) for measurement in result.measurements]
    assert fault.measurements in ((), failed)
    consequence = next(one.consequence for one in check.CHECKS if one.name == fault.check)
    assert line.startswith(f"FAIL {fault.check}: ") and line.endswith(consequence)
    assert all(name in line for name in failed)


# -- running a check ---------------------------------------------------------------------------------------------------------


class Runner:
    """Runs single checks on this process's ranks, and keeps the checkpoints of correct runs for faults that only load."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.messages, self.count = folder, RankMessages(), 0
        self.baselines: dict[tuple[str, int], Path] = {}

    def run(self, fault: Fault) -> tuple[CheckResult, str]:
        """Merged result over all ranks, and the line that reports a failure."""
        row = next(one for one in check.CHECKS if one.name == fault.check)
        self.count += 1
        topic = f"fault-{self.count}"
        with pytest.MonkeyPatch.context() as patch, self._folder(topic) as folder:
            options = VerifyOptions(precision=fault.precision, zero_stage=fault.stage, device="cpu")  # type: ignore[arg-type]
            context = Context(options, torch.device("cpu"), folder, self._subject(fault.check))
            fault.plant(patch)
            if fault.loads:
                self._reuse_correct_runs(patch, fault)
            try:
                own = row.run(context)
            except Exception as error:
                traceback.print_exc()
                own = CheckResult(error=f"{type(error).__name__}: {error}")
            if self.messages.world_size > 1:
                self.messages.post(topic, own.to_json())
                result = CheckResult.merge([CheckResult.from_json(one) for one in self.messages.collect(topic)])
            else:
                result = CheckResult.merge([own])
        return result, verdict([(row, result)])

    def _subject(self, name: str) -> Subject:
        """What the checks of model and data are about."""
        if name == MODEL:
            return Subject(FAMILY_CONFIGS["Qwen2"])
        return Subject(run=self._recipe()) if name == DATA else Subject()

    def _recipe(self) -> Run:
        """A recipe of a few short texts."""
        files, tokenizer = self.folder / "texts.jsonl", self.folder / "tokenizer"
        if process_group.is_main() and not tokenizer.exists():
            texts = ["alpha beta gamma delta " * n for n in (1, 7, 2, 9, 3, 12, 1, 5)]
            files.write_text("\n".join(json.dumps({"text": text}) for text in texts))
            Tokenizer.train(texts, 300).save_pretrained(tokenizer)
        self.meet("texts written")
        data = Pretrain(str(files), str(tokenizer), max_length=24, cache_dir=str(self.folder / "cache"))
        data.setup(0)
        trainer = Trainer(micro_batch_size=1, accumulate=2, device="cpu")
        schedule = Constant(warmup_ratio=0.0)
        return Run(LanguageModeling(build_model("auto")), data, torch.optim.SGD, schedule, trainer, {}, "", seed=0)

    def meet(self, topic: str) -> None:
        """Wait for the other rank."""
        if self.messages.world_size > 1:
            self.count += 1
            self.messages.post(f"{topic}-{self.count}", "")
            self.messages.collect(f"{topic}-{self.count}")

    @contextmanager
    def _folder(self, name: str) -> Iterator[Path]:
        folder = self.folder / name
        yield folder
        if process_group.is_main():
            shutil.rmtree(folder, ignore_errors=True)

    def _reuse_correct_runs(self, patch: Patch, fault: Fault) -> None:
        """The uninterrupted run, and the first half of the resumed one, are those of a correct run."""
        key = fault.precision, fault.stage
        original = resume_check._train
        if key not in self.baselines:
            self.baselines[key] = self.folder / f"correct-{fault.precision}-{fault.stage}"

        def train(context, name, recorder, resume=None):
            correct = replace(context, folder=self.baselines[key])
            target = context.folder / name
            if resume is None:
                saved = self.baselines[key] / name / f"checkpoint-{recorder.save_at}"
                missing = not saved.is_dir()
                self.meet("looked")
                if missing:
                    original(correct, name, recorder)
                if recorder.stop_at is None:
                    return saved
                if process_group.is_main():
                    shutil.copytree(saved.parent, target, dirs_exist_ok=True)
                self.meet("copied")
                return target
            return original(context, name, recorder, resume)

        patch.setattr(resume_check, "_train", train)


def main() -> None:
    folder = Path(sys.argv[1])
    runner = Runner(folder)
    results = {}
    for fault in FAULTS:
        if runner.messages.world_size in fault.ranks and fault.check in (sys.argv[2:] or [fault.check]):
            result, line = runner.run(fault)
            results[fault.name] = {"result": result.to_json(), "line": line}
    if process_group.is_main():
        (folder / "results.json").write_text(json.dumps(results))
    runner.messages.leave()


if __name__ == "__main__":
    main()
