"""ReferencedTask: what the losses share that compare the policy with a reference model.

The reference is the model without its adapters, a copy of it, or the model in a folder; its log-probabilities may be computed
once, before training.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from bumblebee.datamodule import DataModule
from bumblebee.lora import adapters_off, has_adapters
from bumblebee.model import Bumblebee
from bumblebee.tasks.reference import FrozenReference, PolicyReference, Reference
from bumblebee.tasks.reference_cache import folder_digest, load_or_compute, tensors_digest
from bumblebee.tasks.run_context import RunContext
from bumblebee.tasks.task import Task

_REFERENCES = ("auto", "adapters_off", "copy")


class ReferencedTask(Task):
    """A task with a reference model. A subclass calls ``_set_reference`` once its model has its transforms.

    Batches are those of pairs of rows, see ``bumblebee/tasks/reference.py``, with their ``index`` (P,).

    Attributes:
        reference: adapters_off, copy, or a folder; auto until ``setup``.
        precompute_reference: compute the reference's log-probabilities before training, and cache them in ``cache_dir``.
        reference_model: after ``begin``.
    """

    reference: str
    precompute_reference: bool
    cache_dir: str | None
    reference_model: Reference | None = None
    _copy: nn.Module | None = None

    def _set_reference(self, reference: str, precompute: bool, cache_dir: str | None) -> None:
        """Keep the options.

        Raises:
            ValueError: the folder does not exist.
        """
        if reference not in _REFERENCES and not Path(reference).is_dir():
            raise ValueError(f"reference must be auto, adapters_off, copy or a model folder; folder not found: {reference}")
        self.reference, self.precompute_reference, self.cache_dir = reference, precompute, cache_dir

    def setup(self, data: DataModule) -> None:
        """Choose the reference, and copy the model if the copy is the reference."""
        super().setup(data)
        if self.precompute_reference and data.train and "index" not in data.collate([data.train[0]]):
            raise ValueError(
                f"precompute_reference needs batches with the pairs' index; those of {type(data).__name__} lack it"
            )
        adapters = has_adapters(self.model)
        if self.reference == "auto":
            self.reference = "adapters_off" if adapters else "copy"
        if self.reference == "adapters_off" and not adapters:
            raise ValueError("reference: adapters_off needs adapters: add bumblebee.lora.LoRA to task.transforms, or use copy")
        if self.reference == "copy" and not self.precompute_reference:
            self._copy = copy.deepcopy(self.model)  # before an engine adds hooks that would be copied

    def begin(self, run: RunContext, /) -> None:
        """Prepare the reference model, or load or compute its log-probabilities."""
        if self.precompute_reference:
            digest = self._reference_digest(run)
            self.reference_model = load_or_compute(lambda: self._open_reference(run), digest, run, self.cache_dir)
        else:
            self.reference_model = self._open_reference(run)

    def begin_validation(self, device: torch.device) -> None:
        """Load the reference from its folder: a trained model does not hold its initial weights."""
        if self.reference in _REFERENCES:
            raise ValueError(
                f"reference: {self.reference} works in a training run only; to validate, set the folder of the initial model"
            )
        model = self._model_class().from_pretrained(self.reference, device=device)
        self.reference_model = FrozenReference(model.eval().requires_grad_(False))

    def frozen_models(self) -> list[nn.Module]:
        """The reference, unless it is the model itself or precomputed."""
        if self.precompute_reference or self.reference == "adapters_off":
            return []
        return [self._copy or self._model_class().from_pretrained(self.reference)]

    def fixed_folders(self) -> dict[str, Path]:
        """The folder of the reference, which is the trained model's own for a copy."""
        folders = {"adapters_off": None, "copy": getattr(self.model, "source", None)}
        folder = folders.get(self.reference, self.reference)
        return {} if folder is None else {"reference's": Path(folder)}

    def _open_reference(self, run: RunContext) -> Reference:
        if self.reference == "adapters_off":
            return PolicyReference(self.model, adapters_off)
        if self.reference == "copy" and self._copy is None:
            return PolicyReference(self.model, nullcontext)  # before the first step
        model, self._copy = self._copy or self._load_reference(run), None
        engine = run.frozen(model)
        return FrozenReference(engine, engine.close)

    def _load_reference(self, run: RunContext) -> nn.Module:
        dtype = run.engine.options.weights_dtype
        with run.building():
            model = self._model_class().from_pretrained(self.reference, dtype=dtype, device=run.device)
        tokenizer = run.data.tokenizer
        if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"reference: the tokenizer has {tokenizer.vocab_size} ids, but the model in {self.reference}"
                f" has a vocab_size of {model.config.vocab_size}"
            )
        return model

    def _model_class(self) -> type[Bumblebee]:
        return type(self.model) if isinstance(self.model, Bumblebee) else Bumblebee

    def _reference_digest(self, run: RunContext) -> str:
        if self.reference not in _REFERENCES:
            return folder_digest(self.reference)
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        skipped = trained if self.reference == "adapters_off" else set()  # the adapters
        tensors = run.engine.full_tensors(lambda name: name not in skipped)
        return tensors_digest(tensors, getattr(self.model, "config", None))

    def describe_reference(self) -> str:
        """The reference, for the run summary."""
        computed = ", log-probabilities computed before training" if self.precompute_reference else ""
        names = {"adapters_off": "the model without its adapters", "copy": "the initial model"}
        return names.get(self.reference, self.reference) + computed
