"""Reading LoRA adapters (arXiv 2106.09685) and merging them with the base model's weights as those are read.

Merging is in fp32, one matrix at a time, so code that loads a model need not know about adapters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bumblebee.checkpoint.adapters.folder import CONFIG, SCORE, WEIGHTS
from bumblebee.checkpoint.adapters.settings import AdapterSettings
from bumblebee.checkpoint.weight_mapping import Rule, TensorSlice, cast, slices_by_file_key

A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
_HEADS = ("lm_head.weight", SCORE)  # which the head of a reward model's adapter replaces
_HEAD_KEY = f"base_model.model.{SCORE}"
_KEY = re.compile(rf"base_model\.model\.(?P<module>.+)\.(?P<part>{'|'.join(map(re.escape, (A, B, MAGNITUDE)))})")


@dataclass(frozen=True)
class ExpertLayout:
    """Which experts each tensor of the base model's files holds.

    Args:
        slices: key in the file -> its slice of the model's tensor that holds all experts of a layer.
        shapes: of the model's expert tensors by key: (experts, outputs, inputs).
    """

    slices: Mapping[str, TensorSlice]
    shapes: Mapping[str, tuple[int, int, int]]

    @classmethod
    def of(cls, rules: Iterable[Rule], shapes: Mapping[str, tuple[int, int, int]]) -> ExpertLayout:
        """Build the layout from the rules of the base model's family."""
        return cls({key: slices[0] for key, slices in slices_by_file_key(rules, shapes).items()}, shapes)


class Adapter:
    """The low-rank updates in an adapter folder.

    Args:
        folder: an adapter folder.

    Raises:
        ValueError: the weights are missing or damaged, or the type of adapter is not supported; the message names the file.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / WEIGHTS
        self.settings = AdapterSettings(folder)
        self._tensors = _open(folder)
        self._keys: dict[str, dict[str, str]] = {}  # module -> part -> key in the file
        self.has_head = False
        for key in self._tensors.keys():  # noqa: SIM118  (safe_open does not return a mapping)
            if key == _HEAD_KEY:
                self.has_head = True
                continue
            match = _KEY.fullmatch(key)
            if match is None:
                raise ValueError(f"{self.file} has {key}, which is not supported: it is not an update of a linear layer")
            self._keys.setdefault(match["module"], {})[match["part"]] = key
        expected = {A, B, MAGNITUDE} if self.settings.dora else {A, B}
        for module, keys in self._keys.items():
            if odd := sorted(keys.keys() ^ expected):
                raise ValueError(f"{self.file}: the tensors of {module} do not match {CONFIG}: {', '.join(odd)}")
        self.unused = set(self._keys)  # modules whose weight has not been merged yet

    def merge(self, key: str, weight: Tensor) -> Tensor:
        """Add a linear layer's update to its weight, in fp32; a weight without an update is returned as it is.

        Computes W + s B A, where s is the scale of the update. DoRA (arXiv 2402.09353) then scales each row to its own
        magnitude.

        Raises:
            ValueError: the shape of the update differs.
        """
        module = key.removesuffix(".weight")
        if key == module or module not in self._keys:
            return weight
        self.unused.discard(module)
        a, b = self._part(module, A), self._part(module, B)
        if (b.shape[0], a.shape[1]) != tuple(weight.shape) or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"{self.file}: {module} has B {list(b.shape)} and A {list(a.shape)}, which do not fit the base model's"
                f" weight {list(weight.shape)}: the adapter belongs to a model of another size"
            )
        total = weight.float() + self.settings.scale(module, len(a)) * (b @ a)
        if self.settings.dora:
            total *= (self._part(module, MAGNITUDE) / torch.linalg.norm(total, dim=1))[:, None]
        return total

    def merge_experts(self, shape: tuple[int, int, int], target: TensorSlice, weight: Tensor) -> Tensor:
        """``merge`` for the weights of some experts, or for some rows of one expert.

        PEFT stores A as (experts r, inputs) and B as (outputs, r experts), and wraps the layer once for each parameter.

        Args:
            shape: of the tensor that holds all experts of the layer: (experts, outputs, inputs).
            target: the slice of that tensor that ``weight`` fills.
            weight: with the shape of the file.

        Raises:
            ValueError: the shape of the update differs.
        """
        count, outputs, inputs = shape
        module = self._expert_module(target.key)
        if module not in self._keys:
            return weight
        self.unused.discard(module)
        a, b = self._part(module, A), self._part(module, B)
        if a.shape[1] != inputs or b.shape[0] != outputs or len(a) != b.shape[1] or len(a) % count:
            raise ValueError(
                f"{self.file}: {module} has B {list(b.shape)} and A {list(a.shape)}, which do not fit the base model's"
                f" {count} experts of {[outputs, inputs]}: the adapter belongs to a model of another size"
            )
        a, b = a.view(count, -1, inputs), b.view(outputs, -1, count)
        rows, first = weight.numel() // inputs, target.start // inputs  # rows are counted over all experts
        experts = range(first // outputs, -(-(first + rows) // outputs))
        update = torch.cat([b[:, :, expert] @ a[expert] for expert in experts])[first - experts.start * outputs :][:rows]
        return weight.float() + self.settings.scale(target.key, a.shape[1]) * update.view(weight.shape)

    def _expert_module(self, key: str) -> str:
        """The module name under which PEFT stores the update of an expert parameter; "" if it has none."""
        layer, _, name = key.rpartition(".")
        wrapped = [target.rpartition(".")[2] for target in self.settings.experts]
        return layer + ".base_layer" * (len(wrapped) - 1 - wrapped.index(name)) if name in wrapped else ""

    def head(self) -> Tensor:
        """The head of a reward model: (1, hidden_size)."""
        return self._tensors.get_tensor(_HEAD_KEY)

    def scales(self) -> dict[str, float]:
        """The scale of each module's update."""
        return {module: self.settings.scale(module, len(self._part(module, A))) for module in self._keys}

    def _part(self, module: str, part: str) -> Tensor:
        return self._tensors.get_tensor(self._keys[module][part]).float()


def merged(
    tensors: Iterable[tuple[str, Tensor]], folders: list[Path], dtype: torch.dtype | None, layout: ExpertLayout
) -> Iterator[tuple[str, Tensor]]:
    """Yield every (key, tensor) of a base model with adapters merged into it, cast once.

    The head of the last reward model among them takes the place of the base model's.

    Args:
        tensors: of the base model's files.
        folders: the adapters, in the order in which they were trained.
        dtype: dtype to cast to; None keeps each tensor's own.
        layout: of the base model's experts.

    Raises:
        ValueError: an adapter does not fit the base model.
    """
    adapters = [Adapter(folder) for folder in folders]
    heads = [adapter for adapter in adapters if adapter.has_head]
    stored_dtype = torch.float32
    for key, tensor in tensors:
        if heads and key in _HEADS:
            continue
        stored_dtype = tensor.dtype
        target, total = layout.slices.get(key), tensor
        for adapter in adapters:
            if target is None:
                total = adapter.merge(key, total)
            else:
                total = adapter.merge_experts(layout.shapes[target.key], target, total)
        yield key, cast(key, total, dtype or tensor.dtype)
    if heads:
        yield SCORE, cast(SCORE, heads[-1].head(), dtype or stored_dtype)
    for adapter in adapters:
        if unused := adapter.unused:
            raise ValueError(f"{adapter.file}: {len(unused)} updates match no weight of the base model, such as {min(unused)}")


def _open(folder: Path) -> Any:
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = next(iter(sorted(folder.glob("*.bin"))), None)
        hint = f"{pickled.name} is a pickle file, which can run code: convert it to safetensors" if pickled else (
            f"for a checkpoint without weights, write it with bumblebee consolidate {folder} --output {folder}"
        )  # fmt: skip
        raise ValueError(f"{folder} has no {WEIGHTS}; {hint}")
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from error
