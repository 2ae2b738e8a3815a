"""Knowledge distillation: a student learns the next-token distributions of a teacher (arXiv 1503.02531, 2306.13649).

The loss of a step is the mean over its targets, over all micro-batches and ranks, of

    divergence(teacher, student) + lm_weight * (-log q(label))

where the divergence is one of

    forward_kl    KL(p || q)                               covers all that the teacher would say
    reverse_kl    KL(q || p)                               avoids what the teacher would not say
    jsd           beta KL(p || m) + (1 - beta) KL(q || m)  m = beta p + (1 - beta) q; arXiv 2306.13649, equation 1

of the teacher's distribution p and the student's q, both at ``temperature``; see ``bumblebee/nn/linear_distillation.py``. It is
not multiplied by the square of the temperature.

With prompts as data, the targets are tokens that the student itself samples in each step, so that it is corrected where its own
completions lead (on-policy distillation; GKD with lambda 1 in arXiv 2306.13649). No gradient goes through the sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from bumblebee.datamodule import Batch, DataModule
from bumblebee.model import Bumblebee
from bumblebee.models.loading import load_model
from bumblebee.nn import IGNORE_INDEX
from bumblebee.nn.linear_distillation import SUMS, HeadInput, Objective, linear_distillation
from bumblebee.plotting.panels import Panel, ShownMetric
from bumblebee.rl.sampled_text import SampledText
from bumblebee.tasks.reference import evaluation_mode
from bumblebee.tasks.run_context import RunContext
from bumblebee.tasks.student_samples import StudentSamples
from bumblebee.tasks.task import ForwardFn, Task
from bumblebee.tasks.teacher import Teacher, check_folder, head_of
from bumblebee.tasks.tokenizer_checks import adopt_tokenizer, check_learnable, check_length, check_predicts_tokens
from bumblebee.tasks.validation_sums import means_of, with_counts
from bumblebee.tasks.weight_gathering import GatherWeights
from bumblebee.transforms import apply_transforms

_TERM = "loss"  # also the name of the number of targets
_METRICS = tuple(f"distill/{name}" for name in SUMS[1:])
_OF_COMPLETIONS = ("distill/length", "distill/truncated")
_BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0}


class Distillation(Task):
    """Knowledge distillation from a teacher.

    Batches hold ``input_ids``, ``labels`` (already shifted; -100 is ignored) and ``position_ids``, each (B, T) int64; or they
    hold prompts, as from ``datamodules.Prompts``, whose completions the student samples.

    Args:
        model: the student, called as ``model(input_ids, position_ids=..., labels=...)``.
        teacher: folder of a model with the same tokenizer.
        transforms: applied to the student in order, such as bumblebee.lora.LoRA.
        divergence: forward_kl, reverse_kl or jsd.
        jsd_beta: of jsd, in [0, 1]: the teacher's share in the mixture; 0 is forward_kl and 1 is reverse_kl.
        temperature: divides the logits of both models in the divergence.
        lm_weight: weight of the language-modelling loss on the labels; 0 turns it off.
        max_new_tokens: maximum tokens of a completion, with prompts as data.
        samples_per_prompt: completions of each prompt in a step, with prompts as data.
        gather_weights: with prompts as data, at ZeRO stage 3: hold all weights of the student on every device while it samples
            (all), or those of one block at a time (layers), which is slower; auto: all if they fit in memory (docs/rl.md).

    Raises:
        ValueError: a number out of range, or a teacher that does not exist.
    """

    panels = (
        Panel(ShownMetric("loss", "loss", axis="loss (nats per token)")),
        Panel(
            ShownMetric("distill/agreement", "agreement", axis="top-1 agreement", fraction=True),
            ShownMetric("distill/lm_loss", "LM loss", axis="LM loss (nats per token)"),
        ),
    )
    headline = (
        ShownMetric("loss", "loss"),
        ShownMetric("distill/lm_loss", "LM loss"),
        ShownMetric("distill/agreement", "agreement", fraction=True),
    )
    heads = 2

    def __init__(
        self,
        model: nn.Module,
        teacher: str,
        transforms: list[Callable[[nn.Module], object]] | None = None,
        divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl",
        jsd_beta: float = 0.5,
        temperature: float = 1.0,
        lm_weight: float = 0.0,
        max_new_tokens: int = 256,
        samples_per_prompt: int = 1,
        gather_weights: GatherWeights = "auto",
    ) -> None:
        if divergence not in ("forward_kl", "reverse_kl", "jsd"):
            raise ValueError(f"divergence must be forward_kl, reverse_kl or jsd, got {divergence!r}")
        if not 0 <= jsd_beta <= 1:
            raise ValueError(f"jsd_beta must be in [0, 1], got {jsd_beta}")
        if not temperature > 0:
            raise ValueError(f"temperature must be more than 0, got {temperature}")
        if not lm_weight >= 0:
            raise ValueError(f"lm_weight must be at least 0, got {lm_weight}")
        for name, value in {"max_new_tokens": max_new_tokens, "samples_per_prompt": samples_per_prompt}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not Path(teacher).is_dir():
            raise ValueError(f"teacher must be a model folder; folder not found: {teacher}")
        self.model, self.transforms = model, apply_transforms(model, transforms)
        self.teacher_folder, self.divergence = teacher, divergence
        self.objective = Objective(_BETAS.get(divergence, jsd_beta), temperature, lm_weight)
        self.weights = {_TERM: 1.0}
        self.units = dict.fromkeys(_METRICS, _TERM)
        self.max_new_tokens, self.samples_per_prompt = max_new_tokens, samples_per_prompt
        self.gather_weights = gather_weights
        self.teacher: Teacher | None = None
        self.samples: StudentSamples | None = None  # with prompts as data

    # -- the teacher -----------------------------------------------------------------------------------------------------

    def setup(self, data: DataModule) -> None:
        """Check that the data fits the student and the teacher."""
        check_predicts_tokens(self.model)
        check_learnable("Distillation", data, samples_answers=True)
        check_length(self.model, data)
        self.head = head_of(self.model, "task.model")
        check_folder(self.teacher_folder, data.tokenizer)
        if data.tokenizer is not None:
            adopt_tokenizer(self.model, data.tokenizer, data.stop_ids)
        if not hasattr(data.train[0], "question"):
            if self.gather_weights != "auto":
                raise ValueError("gather_weights has no effect without prompts as data, such as from datamodules.Prompts")
            return
        if self.objective.lm_weight:
            raise ValueError(
                "lm_weight needs labels: with prompts as data, the student would learn from its own samples; use 0"
            )
        self.samples = StudentSamples(self.model, data, self.samples_per_prompt, self.max_new_tokens)
        self.units = {**self.units, **dict.fromkeys(_OF_COMPLETIONS, "completions")}

    def begin(self, run: RunContext, /) -> None:
        """Load the teacher."""
        if self.samples is not None:
            self.samples.run = run
        self.teacher, is_known = Teacher.open(self.teacher_folder, run), type(self.model) is Bumblebee
        if not is_known or not self.teacher.is_known:
            self._try_heads(run)
        if self.samples is not None:
            self.samples.choose_gathering(self.gather_weights)

    def begin_validation(self, device: torch.device) -> None:
        """Load the teacher."""
        self.teacher = Teacher.open_for_validation(self.teacher_folder, device)

    @torch.no_grad()
    def _try_heads(self, run: RunContext) -> None:
        """Fail before the first step if a model of another class computes its logits in another way. Collective."""
        tokens = torch.zeros(1, 4, dtype=torch.int64)
        batch = {"input_ids": tokens, "labels": tokens, "position_ids": torch.arange(4)[None], "truncated": torch.zeros(1)}
        with evaluation_mode(self.model):
            self.training_step(run.engine, run.to_device(batch))

    def frozen_models(self) -> list[nn.Module]:
        """The teacher."""
        return [load_model(self.teacher_folder)]

    def fixed_folders(self) -> dict[str, Path]:
        """The teacher's folder."""
        return {"teacher's": Path(self.teacher_folder)}

    def summary(self) -> dict[str, object]:
        """The loss, the options in use, and the teacher."""
        objective, is_jsd = self.objective, self.divergence == "jsd"
        in_use = {
            "beta": objective.beta if is_jsd else None,
            "temperature": objective.temperature if objective.temperature != 1 else None,
            "lm_weight": objective.lm_weight or None,
        }
        completions = f"{self.samples_per_prompt} of at most {self.max_new_tokens} tokens, sampled from the student"
        data = {"completions of a prompt": completions} if self.samples is not None else {}
        if self.samples is not None and self.samples.gathering is not None:
            data["weights for sampling"] = str(self.samples.gathering)
        return {"loss": self.divergence, **in_use, "teacher": self.teacher_folder, **data}

    # -- completions of prompts --------------------------------------------------------------------------------------------

    def prepare_windows(self, windows: list[list[Batch]], step: int, /) -> list[list[Batch]]:
        """With prompts as data, sample this rank's completions with the current weights. Collective."""
        if self.samples is None:
            return windows
        return [self.samples.window(window, step) for window in windows]

    def largest_batch(self, batch: Batch, /) -> Batch:
        """With prompts as data, completions of the maximum length."""
        return batch if self.samples is None else self.samples.largest(batch)

    def completions_of(self, batch: Batch, /) -> tuple[int, int] | None:
        """See the base class."""
        rows, length = batch["input_ids"].shape
        return None if self.samples is None else (rows, length + 1)  # the last token of a row is a label only

    def sampled_texts(self) -> list[SampledText] | None:
        """With prompts as data, a completion of the last step."""
        return None if self.samples is None else self.samples.texts()

    # -- a step ----------------------------------------------------------------------------------------------------------

    def counts(self, batch: Batch) -> dict[str, int | Tensor]:
        """Number of targets, and of sampled completions."""
        targets = batch["labels"] != IGNORE_INDEX
        return {_TERM: targets.sum(), **({"completions": targets.any(dim=1).sum()} if self.samples is not None else {})}

    def training_step(self, model: ForwardFn, batch: Batch) -> dict[str, Tensor]:
        """Sums of the losses and metrics over targets."""
        assert self.teacher is not None, "begin has not been called"
        sums = self.teacher.with_student(model, self.head, batch, self._losses)
        metrics = dict(zip(_METRICS, sums[1:].detach().double(), strict=True))
        if self.samples is not None:
            lengths = (batch["labels"] != IGNORE_INDEX).sum().double()
            metrics |= dict(zip(_OF_COMPLETIONS, (lengths, batch["truncated"].sum()), strict=True))
        return {_TERM: sums[0], **metrics}

    def _losses(self, student: HeadInput, teacher: HeadInput, labels: Tensor) -> Tensor:
        return linear_distillation(student, teacher, labels, self.objective)

    def validation_step(self, model: ForwardFn, batch: Batch) -> dict[str, Tensor]:
        """The sums of ``training_step``, for prompts on greedy completions, and the counts to divide them by."""
        if self.samples is not None:
            batch = self.samples.greedy(batch)
        return with_counts(self.training_step(model, batch), self.counts(batch))

    def validation_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """The same loss and metrics as in training."""
        return {f"validation_{name}": mean for name, mean in means_of(sums, {_TERM: _TERM, **self.units}).items()}
