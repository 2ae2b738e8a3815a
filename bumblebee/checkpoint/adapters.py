"""Adapter folders: what LoRA (arXiv 2106.09685) has learned, in PEFT's layout, and its sum with the weights below.

A folder holds adapter_config.json, which names the base model, and adapter_model.safetensors. The base may be an adapter folder
itself. Sums are taken in fp32, one matrix at a time as it is read: nothing that loads a model has to know of adapters.
Experts of a mixture have updates of a tensor of them all, each its own rows of A and columns of B.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bumblebee.adapter_folders import CONFIG, WEIGHTS
from bumblebee.checkpoint.fused_adapters import fuse, fused_modules
from bumblebee.checkpoint.weight_mapping import Place, Rule, cast, places
from bumblebee.json_files import read_json, write_json

EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")  # parameters that have updates where experts are adapted
NAME = "default"  # what PEFT calls an adapter in the model; it is left out of files
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
# Settings that change no number of the sum; every other one must be unset, so that none is ignored.
_NO_MATTER = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout",
    "lora_ga_config", "megatron_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "target_parameters", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
# Starts of A and B that leave the base's weights as they are; others (PiSSA, OLoRA ...) take something off them.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


# -- sums ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stacks:
    """Where the tensors of a base model's files are in the tensors of all experts of a layer.

    Args:
        parts: key in the file -> its place in ours; experts only.
        shapes: of ours, by key: (experts, outputs, inputs).
    """

    parts: Mapping[str, Place]
    shapes: Mapping[str, tuple[int, int, int]]

    @classmethod
    def of(cls, rules: Iterable[Rule], shapes: Mapping[str, tuple[int, int, int]]) -> Stacks:
        """From the rules of the base model's family."""
        return cls({key: found[0] for key, found in places(rules, shapes).items()}, shapes)


class Adapter:
    """The low-rank updates of a folder.

    Args:
        folder: an adapter folder.

    Raises:
        ValueError: no weights there, or damaged ones, or a kind of adapter that is not supported; the message names the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = read_json(folder / CONFIG)
        _check(folder / CONFIG, self.settings)
        named = self.settings.get("target_parameters") or ()
        self._experts = [key for key in EXPERTS if any(f".{key}".endswith(f".{name}") for name in named)]
        self._keys: dict[str, dict[str, str]] = {}  # module -> part -> key in the file
        self._file = _open(folder)
        for key in self._file.keys():  # noqa: SIM118  (a safe_open is no mapping)
            match = _KEY.fullmatch(key)
            if match is None:
                raise ValueError(f"{folder / WEIGHTS} holds {key}, which is no update of a linear layer: it is not supported")
            self._keys.setdefault(match["module"], {})[match["part"]] = key
        parts = {"lora_A.weight", "lora_B.weight"} | ({"lora_magnitude_vector"} if self.settings.get("use_dora") else set())
        for module, keys in self._keys.items():
            if keys.keys() != parts:
                odd = ", ".join(sorted(keys.keys() ^ parts))
                raise ValueError(f"{folder / WEIGHTS}: {module} does not have what {CONFIG} asks for: {odd}")
        self.unused = set(self._keys)  # modules whose weight has not come by

    def added_to(self, key: str, weight: Tensor) -> Tensor:
        """A weight with the update of its module, in fp32; the weight itself where there is none.

        W + s B A, where s is alpha / rank or alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732). DoRA (arXiv 2402.09353) gives each
        row of the sum a length of its own.

        Raises:
            ValueError: an update of another shape.
        """
        module = key.removesuffix(".weight")
        if key == module or module not in self._keys:
            return weight
        self.unused.discard(module)
        a, b = self._part(module, "lora_A.weight"), self._part(module, "lora_B.weight")
        if (b.shape[0], a.shape[1]) != tuple(weight.shape) or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"{self.folder / WEIGHTS}: {module} has shapes {list(b.shape)} and {list(a.shape)},"
                f" the base model's weight has {list(weight.shape)}: it is of another size"
            )
        total = weight.float() + self._scale(module, len(a)) * (b @ a)
        if self.settings.get("use_dora"):
            total *= (self._part(module, "lora_magnitude_vector") / torch.linalg.norm(total, dim=1))[:, None]
        return total

    def added_to_experts(self, stacks: Stacks, place: Place, weight: Tensor) -> Tensor:
        """As ``added_to``, for some experts' weights, or some rows of one's.

        PEFT keeps A as (experts r, inputs) and B as (outputs, r experts), and wraps a layer once for each parameter.

        Raises:
            ValueError: an update of another shape.
        """
        count, outputs, inputs = stacks.shapes[place.key]
        layer, _, name = place.key.rpartition(".")
        wrapped = [target.rpartition(".")[2] for target in self._experts]
        module = layer + ".base_layer" * (len(wrapped) - 1 - wrapped.index(name)) if name in wrapped else ""
        if module not in self._keys:
            return weight
        self.unused.discard(module)
        a, b = self._part(module, "lora_A.weight"), self._part(module, "lora_B.weight")
        if a.shape[1] != inputs or b.shape[0] != outputs or len(a) != b.shape[1] or len(a) % count:
            raise ValueError(
                f"{self.folder / WEIGHTS}: {module} has shapes {list(b.shape)} and {list(a.shape)},"
                f" the base model has {count} experts of {[outputs, inputs]}: it is of another size"
            )
        a, b = a.view(count, -1, inputs), b.view(outputs, -1, count)
        rows, first = weight.numel() // inputs, place.start // inputs  # counted through all experts
        met = range(first // outputs, -(-(first + rows) // outputs))
        update = torch.cat([b[:, :, expert] @ a[expert] for expert in met])[first - met.start * outputs :][:rows]
        return weight.float() + self._scale(place.key, a.shape[1]) * update.view(weight.shape)

    def _part(self, module: str, part: str) -> Tensor:
        return self._file.get_tensor(self._keys[module][part]).float()

    def scales(self) -> dict[str, float]:
        """What the update of each linear layer is multiplied with."""
        return {module: self._scale(module, len(self._part(module, "lora_A.weight"))) for module in self._keys}

    def _scale(self, module: str, rank: int) -> float:
        patterns = self.settings.get("alpha_pattern") or {}
        own = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
        alpha = next(own, self.settings["lora_alpha"])
        return alpha / math.sqrt(rank) if self.settings.get("use_rslora") else alpha / rank


def summed(
    tensors: Iterable[tuple[str, Tensor]], folders: list[Path], dtype: torch.dtype | None, stacks: Stacks
) -> Iterator[tuple[str, Tensor]]:
    """Every (key, tensor) of a model with the updates of adapters on it, cast once.

    Args:
        tensors: of the whole model.
        folders: the adapters, in the order in which they were trained.
        dtype: to cast to; None for each tensor's own.
        stacks: where experts of the whole model are.

    Raises:
        ValueError: adapters of another model.
    """
    adapters = [Adapter(folder) for folder in folders]
    for key, tensor in tensors:
        total = tensor
        for adapter in adapters:
            place = stacks.parts.get(key)
            total = adapter.added_to(key, total) if place is None else adapter.added_to_experts(stacks, place, total)
        yield key, cast(key, total, dtype or tensor.dtype)
    for adapter in adapters:
        if adapter.unused:
            first = min(adapter.unused)
            raise ValueError(
                f"{adapter.folder / WEIGHTS}: {len(adapter.unused)} updates fit no weight of the base: {first} ..."
            )


def _open(folder: Path) -> Any:
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = next(iter(sorted(folder.glob("*.bin"))), None)
        hint = f"{pickled.name} is a pickle file, which can run code: convert it to safetensors" if pickled else (
            f"a checkpoint without a model gets it from bumblebee consolidate {folder} --output {folder}"
        )  # fmt: skip
        raise ValueError(f"{folder} has no {WEIGHTS}; {hint}")
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from error


def _check(file: Path, settings: dict[str, Any]) -> None:
    """Refuse what would not be computed as PEFT does."""
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{file} has peft_type {settings.get('peft_type')!r}; only 'LORA' is supported")
    if not isinstance(settings.get("lora_alpha"), int | float):
        raise ValueError(f"{file} has lora_alpha {settings.get('lora_alpha')!r}; expected a number")
    if settings.get("init_lora_weights") not in _STARTS:
        raise ValueError(f"{file} has init_lora_weights {settings['init_lora_weights']!r}, which changes the base's weights")
    for name in settings.get("target_parameters") or ():
        if not any(f".{key}".endswith(f".{name}") for key in EXPERTS):
            raise ValueError(f"{file} has target_parameters {name!r}; supported are {', '.join(EXPERTS)}")
    for name, value in settings.items():
        if name not in _NO_MATTER and name != "init_lora_weights" and value not in (None, False, "none", [], {}):
            raise ValueError(f"{file} has {name} {value!r}, which is not supported")


# -- writing -------------------------------------------------------------------------------------------------------------


def is_adapter_key(name: str) -> bool:
    """Whether a parameter of a model is part of an adapter."""
    return ".lora_" in name


def write_adapter_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], rules: Iterable[Rule] = ()) -> None:
    """Write adapter_model.safetensors with PEFT's keys.

    Args:
        folder: an existing one.
        tensors: (a parameter's name, whole tensor) pairs.
        rules: of the base model's family, see ``fused_adapters.py``.

    Raises:
        OSError: it cannot be written.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        assert tensor.numel(), f"{name} is empty: it was not gathered"
        found[file_key(name)] = tensor.detach().cpu().contiguous()
    try:
        save_file(fuse(found, fused_modules(rules)), folder / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:  # how the library reports a full disk
        raise OSError(f"cannot write weights to {folder}: {error}") from error


def file_key(name: str) -> str:
    """ "model.x.lora_A.default.weight" -> "base_model.model.model.x.lora_A.weight"."""
    key = "base_model.model." + name.replace(f".{NAME}.", ".")
    return key.removesuffix(".weight") if ".lora_magnitude_vector." in key else key


def write_adapter_config(folder: Path, settings: dict[str, Any]) -> None:
    """Write adapter_config.json."""
    write_json(folder / CONFIG, settings)
