"""ReferenceChoice: which model is the reference, and how it is opened; the option ``reference`` of DPO and GRPO."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from bumblebee.lora import adapters_off, has_adapters
from bumblebee.model import Bumblebee
from bumblebee.tasks.reference import FrozenReference, PolicyReference
from bumblebee.tasks.run_context import RunContext
from bumblebee.tasks.tokenizer_checks import check_vocabulary

_KINDS = ("auto", "adapters_off", "copy")
_DESCRIPTIONS = {"adapters_off": "the model without its adapters", "copy": "the initial model"}


class ReferenceChoice:
    """A choice of the reference model.

    Args:
        model: the trained model.
        name: adapters_off (the model without its adapters), copy (the initial model), the folder of another model, or auto:
            adapters_off if the model has adapters, else copy.

    Raises:
        ValueError: a folder that does not exist.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        if name not in _KINDS and not Path(name).is_dir():
            raise ValueError(f"reference must be auto, adapters_off, copy or a model folder; folder not found: {name}")
        self.model, self.name = model, name
        self._copy: nn.Module | None = None

    @property
    def is_folder(self) -> bool:
        """Whether it is the folder of another model."""
        return self.name not in _KINDS

    def set_up(self, keep_copy: bool = True) -> None:
        """Resolve auto, and copy the model if the copy is the reference; before an engine adds hooks that would be copied.

        Args:
            keep_copy: False if the reference is used before the first step only.

        Raises:
            ValueError: adapters_off for a model without adapters.
        """
        adapters = has_adapters(self.model)
        if self.name == "auto":
            self.name = "adapters_off" if adapters else "copy"
        if self.name == "adapters_off" and not adapters:
            raise ValueError("reference: adapters_off needs adapters: add bumblebee.lora.LoRA to task.transforms, or use copy")
        if self.name == "copy" and keep_copy:
            self._copy = copy.deepcopy(self.model)

    def open(self, run: RunContext) -> PolicyReference | FrozenReference:
        """The reference on the run's devices. Collective.

        Raises:
            ValueError: its vocabulary is too small for the tokenizer.
        """
        if self.name == "adapters_off":
            return PolicyReference(self.model, adapters_off)
        if self.name == "copy" and self._copy is None:
            return PolicyReference(self.model, nullcontext)  # before the first step
        model, self._copy = self._copy or self.load(run), None
        engine = run.frozen(model)
        return FrozenReference(engine, engine.close)

    def load(self, run: RunContext) -> nn.Module:
        """The model of the folder, in the run's precision."""
        dtype = run.engine.options.weights_dtype
        with run.building():
            model = self.model_class.from_pretrained(self.name, dtype=dtype, device=run.device)
        check_vocabulary("reference", self.name, model.config, run.data.tokenizer)
        return model

    def open_for_validation(self, device: torch.device) -> FrozenReference:
        """The reference outside of a training run.

        Raises:
            ValueError: it is not a folder: a trained model does not hold its initial weights.
        """
        if not self.is_folder:
            raise ValueError(
                f"reference: {self.name} works in a training run only; to validate, set the folder of the initial model"
            )
        model = self.model_class.from_pretrained(self.name, device=device)
        return FrozenReference(model.eval().requires_grad_(False))

    def frozen_models(self) -> list[nn.Module]:
        """The reference, unless it is the model itself."""
        if self.name == "adapters_off":
            return []
        return [self._copy or self.model_class.from_pretrained(self.name)]

    def folders(self) -> dict[str, Path]:
        """The folder of the reference, which is the trained model's own for a copy."""
        folders = {"adapters_off": None, "copy": getattr(self.model, "source", None)}
        folder = folders.get(self.name, self.name)
        return {} if folder is None else {"reference's": Path(folder)}

    @property
    def model_class(self) -> type[Bumblebee]:
        """The class of the trained model."""
        return type(self.model) if isinstance(self.model, Bumblebee) else Bumblebee

    def __str__(self) -> str:
        return _DESCRIPTIONS.get(self.name, self.name)
