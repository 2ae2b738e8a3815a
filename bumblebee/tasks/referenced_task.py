"""ReferencedTask: what the losses share that compare the policy with a reference model.

The reference is the model without its adapters, a copy of it, or the model in a folder; its log-probabilities may be computed
once, before training.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from bumblebee.datamodule import DataModule
from bumblebee.tasks.reference import Reference
from bumblebee.tasks.reference_cache import folder_digest, load_or_compute, tensors_digest
from bumblebee.tasks.reference_choice import ReferenceChoice
from bumblebee.tasks.run_context import RunContext
from bumblebee.tasks.task import Task


class ReferencedTask(Task):
    """A task with a reference model. A subclass calls ``_set_reference`` once its model has its transforms.

    Batches are those of pairs of rows, see ``bumblebee/tasks/reference.py``, with their ``index`` (P,).

    Attributes:
        reference: adapters_off, copy, or a folder; auto until ``setup``.
        precompute_reference: compute the reference's log-probabilities before training, and cache them in ``cache_dir``.
        reference_choice: which model it is.
        reference_model: after ``begin``.
    """

    reference: str
    reference_choice: ReferenceChoice
    precompute_reference: bool
    cache_dir: str | None
    reference_model: Reference | None = None

    def _set_reference(self, reference: str, precompute: bool, cache_dir: str | None) -> None:
        """Keep the options.

        Raises:
            ValueError: the folder does not exist.
        """
        self.reference_choice = ReferenceChoice(self.model, reference)
        self.reference, self.precompute_reference, self.cache_dir = reference, precompute, cache_dir

    def setup(self, data: DataModule) -> None:
        """Choose the reference, and copy the model if the copy is the reference."""
        super().setup(data)
        if self.precompute_reference and data.train and "index" not in data.collate([data.train[0]]):
            raise ValueError(
                f"precompute_reference needs batches with the pairs' index; those of {type(data).__name__} lack it"
            )
        self.reference_choice.set_up(keep_copy=not self.precompute_reference)
        self.reference = self.reference_choice.name

    def begin(self, run: RunContext, /) -> None:
        """Prepare the reference model, or load or compute its log-probabilities."""
        if self.precompute_reference:
            digest = self._reference_digest(run)
            self.reference_model = load_or_compute(lambda: self._open_reference(run), digest, run, self.cache_dir)
        else:
            self.reference_model = self._open_reference(run)

    def begin_validation(self, device: torch.device) -> None:
        """Load the reference from its folder: a trained model does not hold its initial weights."""
        self.reference_model = self.reference_choice.open_for_validation(device)

    def frozen_models(self) -> list[nn.Module]:
        """The reference, unless it is the model itself or precomputed."""
        return [] if self.precompute_reference else self.reference_choice.frozen_models()

    def fixed_folders(self) -> dict[str, Path]:
        """The folder of the reference, which is the trained model's own for a copy."""
        return self.reference_choice.folders()

    def _open_reference(self, run: RunContext) -> Reference:
        return self.reference_choice.open(run)

    def _reference_digest(self, run: RunContext) -> str:
        if self.reference_choice.is_folder:
            return folder_digest(self.reference)
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        skipped = trained if self.reference == "adapters_off" else set()  # the adapters
        tensors = run.engine.full_tensors(lambda name: name not in skipped)
        return tensors_digest(tensors, getattr(self.model, "config", None))

    def describe_reference(self) -> str:
        """The reference, for the run summary."""
        computed = ", log-probabilities computed before training" if self.precompute_reference else ""
        return f"{self.reference_choice}{computed}"
