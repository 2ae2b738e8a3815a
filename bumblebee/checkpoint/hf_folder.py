"""Model folders: safetensors in and out, one tensor in memory at a time.

A folder holds config.json, generation_config.json and either model.safetensors or shards with model.safetensors.index.json.
A tied head is left out of the file and tied again on load. An adapter folder (``adapter.py``) is read as the sum of its base
model and what was learned on it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from bumblebee.adapter_folders import adapter_chain, base_model_folder, is_adapter_folder
from bumblebee.checkpoint import adapters
from bumblebee.checkpoint.atomic import written_aside
from bumblebee.checkpoint.families import family_of, is_supported, read_config, write_config
from bumblebee.checkpoint.moe_families import expert_shapes
from bumblebee.checkpoint.weight_files import INDEX, SINGLE, stored_tensors, weight_files
from bumblebee.checkpoint.weight_loader import Device, Parameters
from bumblebee.checkpoint.weight_mapping import Rule, as_stored, cast, cut, places, shape_of
from bumblebee.config import BumblebeeConfig
from bumblebee.json_files import read_json, write_json
from bumblebee.models.load_context import current_load_context

TIED_KEY = "lm_head.weight"
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


# -- reading -----------------------------------------------------------------------------------------------------------


def is_model_folder(folder: str | Path) -> bool:
    """Whether there is a config.json and weights to go with it, or an adapter."""
    folder = Path(folder)
    if is_adapter_folder(folder):
        return (folder / adapters.WEIGHTS).is_file()
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in (SINGLE, INDEX))


def load_config(folder: str | Path) -> BumblebeeConfig:
    """The config of a model folder; of an adapter folder its base model's.

    Raises:
        ValueError: no folder or no config.json there, or one that is not supported; the message names the file.
    """
    return _from_config_json(base_model_folder(folder), read_config)


def is_ours(folder: str | Path) -> bool:
    """Whether a whole model's architecture is one that Bumblebee computes.

    Raises:
        ValueError: no folder, or no config.json there.
    """
    return is_supported(_from_config_json(folder, dict))


def is_tied(folder: Path) -> bool:
    """Whether the head of a whole model is its embedding table."""
    raw = read_json(folder / "config.json")
    if is_supported(raw):
        return load_config(folder).tie_word_embeddings
    return bool(raw.get("tie_word_embeddings", True))  # as transformers takes it


def _from_a_hub(name: str) -> str:
    """A hint where a name looks like one of a model hub's: nothing is downloaded here."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or Path(name).parent.exists():
        return ""
    return f"; a model of a hub is downloaded first, for instance with: hf download {name} --local-dir models/{Path(name).name}"


def _from_config_json(folder: str | Path, read: Any) -> Any:
    file = Path(folder) / "config.json"
    if not file.is_file():
        there = "has no config.json" if Path(folder).is_dir() else "is not there"
        raise ValueError(f"{folder} is no model folder: it {there}{_from_a_hub(str(folder))}")
    raw = read_json(file)
    try:
        return read(raw)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def read_tensors(
    folder: str | Path, dtype: torch.dtype | None = None, base: str | Path | None = None, allow_pickle: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Every (key, tensor) of a model folder, on the CPU, one at a time; of an adapter folder merged with its base model.

    Keys and shapes are the file's, which differ from ours in some families.

    Args:
        folder: a model or adapter folder.
        dtype: to cast to; None keeps the file's, in an adapter folder the base model's.
        base: what an adapter stands on, instead of the folder that it names.
        allow_pickle: read a model's pickle files where it has no others.

    Raises:
        ValueError: a file that is damaged, or an adapter that is none of its base model.
    """
    whole, *adapter_folders = adapter_chain(folder, base)
    if not adapter_folders:
        yield from ((key, cast(key, tensor, dtype)) for key, tensor in stored_tensors(whole, allow_pickle))
        return
    tied = is_tied(whole)  # a copy of the head that lies in the file is not in use
    stored = ((key, tensor) for key, tensor in stored_tensors(whole, allow_pickle) if not (tied and key == TIED_KEY))
    stacks = _stacks(whole)
    yield from adapters.summed(stored, adapter_folders, dtype, stacks)


def _stacks(whole: Path) -> adapters.Stacks:
    """What adapters have to know of tensors that hold several of the file's."""
    if not is_ours(whole):
        return adapters.Stacks.of([], {})
    config = load_config(whole)
    return adapters.Stacks.of(family_of(config).rules(config), expert_shapes(config))


def load_weights(
    folder: str | Path, model: nn.Module, dtype: torch.dtype | None, device: Device, allow_pickle: bool = False
) -> None:
    """Put a folder's weights into a model, strictly: each key of one must be in the other.

    Args:
        folder: the model folder.
        model: may be on the meta device; its parameters are replaced.
        dtype: to cast to; None keeps the file's.
        device: where the parameters go; a function tells it of each key of the model.
        allow_pickle: as for ``read_tensors``.

    Raises:
        ValueError: keys left over or missing, or a shape that differs; the message names them.
    """
    config = load_config(folder)
    family = family_of(config)
    put_weights(
        folder, model, dtype, device, family.rules(config), lambda key: key.endswith(family.unused_keys), allow_pickle
    )  # fmt: skip


def put_weights(
    folder: str | Path,
    model: nn.Module,
    dtype: torch.dtype | None,
    device: Device,
    rules: Iterable[Rule] = (),
    unused: Callable[[str], bool] = lambda key: False,
    allow_pickle: bool = False,
) -> None:
    """``load_weights`` with given rules.

    Args:
        folder: the model folder.
        model: as for ``load_weights``.
        dtype: as there.
        device: as there.
        rules: how the file's tensors differ from the model's.
        unused: whether a key of the file is one that no computation needs.
        allow_pickle: as there.
    """
    if current_load_context().shapes_only:
        weight_files(base_model_folder(folder), allow_pickle)  # that they are there
        return
    parameters = Parameters(model, dtype, device)
    missing, left_over = places(rules, parameters.shapes), []
    for key, tensor in read_tensors(folder, dtype, allow_pickle=allow_pickle):
        if parts := missing.pop(key, None):
            _check_shape(folder, key, tensor, shape_of(parts))
            for place, part in zip(parts, cut(tensor, parts), strict=True):
                parameters.put(place, part)
        elif key not in parameters.tied and not unused(key):
            left_over.append(key)
    if missing or left_over:
        named = [("missing", sorted(missing)), ("left over", left_over)]
        said = "; ".join(f"{len(keys)} {what}: {', '.join(keys[:3])}" for what, keys in named if keys)
        raise ValueError(f"the weights in {folder} do not fit the model: {said}")
    parameters.finish()


def _check_shape(folder: str | Path, key: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{folder}: {key} has shape {list(tensor.shape)}, config.json asks for {list(shape)}")


# -- writing -----------------------------------------------------------------------------------------------------------


class ModelFiles:
    """What the folders of a model consist of: here the whole model. A transform may set another in ``model.files``.

    Args:
        config: the model's.
    """

    def __init__(self, config: BumblebeeConfig) -> None:
        self.config = config

    def holds(self, name: str) -> bool:
        """Whether a tensor of the model is saved."""
        return True

    def write(self, folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_size: str = "5GB") -> set[str]:
        """Write everything into an existing folder; returns the weight files' names."""
        return self.write_stored(folder, as_stored(self.rules(), tensors), max_shard_size)

    def rules(self) -> list[Rule]:
        """How the files' tensors differ from the model's."""
        return family_of(self.config).rules(self.config)

    def write_stored(self, folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_size: str = "5GB") -> set[str]:
        """``write`` of tensors as the files hold them."""
        return write_model(folder, self.config, tensors, max_shard_size)

    def write_configs(self, folder: Path, dtype: str) -> None:
        """Write everything but the weights."""
        write_configs(folder, self.config, dtype)

    def check_output(self, output_dir: Path) -> None:
        """Whether a run may write here, and delete what an earlier run wrote.

        Raises:
            ValueError: what is there is still needed.
        """

    def check_resumed(self, checkpoint: Path) -> None:
        """Whether a checkpoint's training can go on with this model.

        Raises:
            ValueError: what it was trained on is another model.
        """


class ForeignFiles(ModelFiles):
    """The folders of a model that we do not build ourselves: its config.json is kept, its tensors are named as in the model.

    Args:
        config: what is known of the shape.
        raw: the content of config.json.
        renamed: rules about tensors that have other names in the files.
        tied: keys of tensors that are saved under another key.
    """

    def __init__(
        self, config: BumblebeeConfig, raw: dict[str, Any], renamed: Iterable[Rule] = (), tied: Collection[str] = ()
    ) -> None:
        super().__init__(config)
        self.raw, self.renamed, self.tied = raw, list(renamed), tied

    def holds(self, name: str) -> bool:
        """Each tensor once."""
        return name not in self.tied

    def rules(self) -> list[Rule]:
        """Other names."""
        return self.renamed

    def write_stored(self, folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_size: str = "5GB") -> set[str]:
        """The weights and both configs."""
        names, dtype = write_weights(folder, (pair for pair in tensors if self.holds(pair[0])), max_shard_size)
        self.write_configs(folder, dtype)
        return names

    def write_configs(self, folder: Path, dtype: str) -> None:
        """config.json with the special ids as they are now, and generation_config.json."""
        ids = {name: getattr(self.config, name) for name in SPECIAL_IDS}
        write_json(folder / "config.json", self.raw | ids | {"torch_dtype": dtype, "dtype": dtype})
        write_generation_config(folder, self.config)


def files_in(folder: str | Path) -> ModelFiles:
    """What a whole model's folder consists of, to write another of the same model.

    Raises:
        ValueError: as ``load_config``.
    """
    raw = _from_config_json(folder, dict)
    if is_supported(raw):
        return ModelFiles(load_config(folder))
    ids = {name: raw.get(name) for name in SPECIAL_IDS}
    return ForeignFiles(BumblebeeConfig(**ids), raw)


def files_of(model: Any) -> ModelFiles:
    """What the folders of a model consist of."""
    return getattr(model, "files", None) or ModelFiles(model.config)


def save_model(
    folder: str | Path,
    files: ModelFiles,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    max_shard_size: str = "5GB",
) -> None:
    """Write a model folder; see ``ModelFiles``. The folder is complete or as it was.

    Raises:
        ValueError: a size that cannot be read.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    with written_aside(folder) as aside:
        names = files.write(aside, _pairs(tensors), max_shard_size)
    drop_other_weights(folder, names)


def drop_other_weights(folder: Path, names: set[str]) -> None:
    """Delete the weight files of a model that was in the folder before, and had more, or other, files."""
    for file in folder.iterdir():
        if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", file.name) and file.name not in names:
            file.unlink()


def write_model(
    folder: Path,
    config: BumblebeeConfig,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    max_shard_size: str = "5GB",
) -> set[str]:
    """Write config.json, generation_config.json and the weights into an existing folder; returns the weight files' names.

    Args:
        folder: where; nothing is cleaned up on failure (``save_model`` does that).
        config: the model's shape.
        tensors: (key, tensor) pairs as the file holds them, taken one by one, so that they may be gathered meanwhile.
        max_shard_size: like "5GB" or "500MB"; a larger tensor gets a file of its own.
    """
    kept = (pair for pair in _pairs(tensors) if not (pair[0] == TIED_KEY and config.tie_word_embeddings))
    names, dtype = write_weights(folder, kept, max_shard_size)
    write_configs(folder, config, dtype)
    return names


def _pairs(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    return tensors.items() if isinstance(tensors, Mapping) else tensors


def write_weights(folder: Path, pairs: Iterable[tuple[str, Tensor]], max_shard_size: str) -> tuple[set[str], str]:
    """Write safetensors files into an existing folder, see ``write_model``; (their names, the first tensor's dtype)."""
    limit = parse_size(max_shard_size)
    shards: list[dict[str, str]] = []  # for each file: key -> dtype
    shard: dict[str, Tensor] = {}
    total = size = 0
    for key, tensor in pairs:
        assert tensor.numel(), f"{key} is empty: it was not gathered"
        if shard and size + tensor.nbytes > limit:
            shards.append(_write_shard(folder, len(shards), shard))
            shard, size = {}, 0
        shard[key] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    shards.append(_write_shard(folder, len(shards), shard))
    return _name_shards(folder, shards, total), next(iter(shards[0].values()))


def write_configs(folder: Path, config: BumblebeeConfig, dtype: str) -> None:
    """Write config.json and generation_config.json; ``dtype`` is the name of the weights' dtype, e.g. "bfloat16"."""
    write_json(folder / "config.json", write_config(config, dtype))
    write_generation_config(folder, config)


def write_generation_config(folder: Path, config: BumblebeeConfig) -> None:
    """Write generation_config.json: the ids that generation begins and ends with."""
    ids = {name: getattr(config, name) for name in SPECIAL_IDS}
    write_json(folder / "generation_config.json", {name: value for name, value in ids.items() if value is not None})


def _write_shard(folder: Path, number: int, shard: dict[str, Tensor]) -> dict[str, str]:
    try:
        save_file(shard, folder / f"model-{number:05d}.partial", metadata={"format": "pt"})
    except SafetensorError as error:  # how the library reports a full disk
        raise OSError(f"cannot write weights to {folder}: {error}") from error
    return {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in shard.items()}


def _name_shards(folder: Path, shards: list[dict[str, str]], total: int) -> set[str]:
    """Give the files their final names, which hold how many there are, and write the index."""
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    for number, name in enumerate(names):
        (folder / f"model-{number:05d}.partial").rename(folder / name)
    if count == 1:
        return {SINGLE}
    weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return {*names, INDEX}


def parse_size(text: str) -> int:
    """ "5GB" -> bytes.

    Raises:
        ValueError: not a positive number with one of the units.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d+)?)\s*([KMG]?I?B?)\s*", text.upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size > 0:
        return size
    raise ValueError(f"size {text!r}: write a number and a unit, such as 5GB, 500MB or 2GiB")
