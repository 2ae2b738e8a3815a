"""The files that a model folder consists of, and how they are written.

``ModelFiles`` writes a supported architecture. A model that is saved differently sets another in ``model.files``: models of
transformers (``HuggingFaceModelFiles``), and models with LoRA, whose folders hold the adapter alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bumblebee.checkpoint.atomic import written_aside
from bumblebee.checkpoint.families import TRANSFORMERS_VERSION, family_of, is_supported, write_config
from bumblebee.checkpoint.hf_folder import SPECIAL_IDS, TIED_KEY, load_config, parse_config_json
from bumblebee.checkpoint.weight_mapping import Rule, to_file_tensors
from bumblebee.checkpoint.weight_writer import remove_stale_weights, write_weights
from bumblebee.config import BumblebeeConfig
from bumblebee.utils.json_files import JSON, write_json

Tensors = Iterable[tuple[str, Tensor]]  # (key, tensor) pairs
# Fields of config.json that do not change the function of the weights: names, ids, dtypes, and options of training.
_NOT_COMPUTED = re.compile(
    r".*token_id|.*dtype|.*version|.*dropout|.*_pdrop|architectures?|model_class|use_cache|initializer_range|"
    r"router_(balance_loss|aux_loss_coef|z_loss_coef|bias_update_rate|jitter_noise)|output_router_logits"
)


class ModelFiles:
    """The folder of a complete model of a supported architecture.

    Args:
        config: the model's.
    """

    def __init__(self, config: BumblebeeConfig) -> None:
        self.config = config

    def rules(self) -> list[Rule]:
        """How the files' tensors map to the model's."""
        return family_of(self.config).rules(self.config)

    def includes(self, key: str) -> bool:
        """Whether a tensor of the model is saved."""
        return True

    def write(self, folder: Path, tensors: Tensors, max_shard_size: str = "5GB") -> dict[str, str]:
        """Write the weights and configs into an existing folder; returns the SHA-256 of each weight file by name."""
        return self.write_file_tensors(folder, to_file_tensors(self.rules(), tensors), max_shard_size)

    def write_file_tensors(self, folder: Path, tensors: Tensors, max_shard_size: str = "5GB") -> dict[str, str]:
        """``write`` for tensors with the keys and shapes of the file."""
        tied = self.config.tie_word_embeddings
        saved = (pair for pair in tensors if not (tied and pair[0] == TIED_KEY))
        digests, dtype = write_weights(folder, saved, max_shard_size)
        self.write_configs(folder, dtype)
        return digests

    def write_configs(self, folder: Path, dtype: str) -> None:
        """Write everything but the weights; ``dtype`` is the name of their dtype, e.g. "bfloat16"."""
        write_json(folder / "config.json", write_config(self.config, dtype))
        write_generation_config(folder, self.config)

    def fingerprint(self) -> dict[str, JSON]:
        """The settings of the model's function, by name: a training state belongs to a model that has the same ones."""
        return _computed(asdict(self.config))

    def check_output(self, output_dir: Path) -> None:
        """Check that a run may write to a folder and delete the files of an earlier run in it.

        Raises:
            ValueError: the folder holds files that this model needs.
        """

    def check_resumed(self, checkpoint: Path) -> None:
        """Check that training of this model can resume from a checkpoint.

        Raises:
            ValueError: the checkpoint belongs to another model.
        """


class HuggingFaceModelFiles(ModelFiles):
    """The folder of a transformers model: its config.json is kept, and keys are the model's except for ``renamed``.

    Args:
        config: special ids, and what is known of the shape.
        raw: content of config.json.
        renamed: rules for tensors that have other keys in the files.
        tied: keys of tensors that are saved under another key.
    """

    def __init__(
        self, config: BumblebeeConfig, raw: Mapping[str, object], renamed: Iterable[Rule] = (), tied: Collection[str] = ()
    ) -> None:
        super().__init__(config)
        self.raw, self.renamed, self.tied = raw, list(renamed), tied

    def fingerprint(self) -> dict[str, JSON]:
        """See the base class."""
        return _computed(self.raw)

    def rules(self) -> list[Rule]:
        """The renamed tensors."""
        return self.renamed

    def includes(self, key: str) -> bool:
        """Whether a tensor is saved; tied tensors are saved once."""
        return key not in self.tied

    def write_file_tensors(self, folder: Path, tensors: Tensors, max_shard_size: str = "5GB") -> dict[str, str]:
        """Write the weights and both configs."""
        digests, dtype = write_weights(folder, (pair for pair in tensors if self.includes(pair[0])), max_shard_size)
        self.write_configs(folder, dtype)
        return digests

    def write_configs(self, folder: Path, dtype: str) -> None:
        """Write config.json with the current special ids, and generation_config.json."""
        ids = {name: getattr(self.config, name) for name in SPECIAL_IDS}
        config = {**self.raw, **ids, "torch_dtype": dtype, "dtype": dtype}
        if _major(self.raw.get("transformers_version")) < _major(TRANSFORMERS_VERSION):
            config["transformers_version"] = TRANSFORMERS_VERSION
        write_json(folder / "config.json", config)
        write_generation_config(folder, self.config)


def _computed(settings: Mapping[str, Any]) -> dict[str, JSON]:
    """The settings that a forward pass depends on."""
    computed = {name: value for name, value in settings.items() if not _NOT_COMPUTED.fullmatch(name)}
    scaling = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    if scaling.get("rope_type") != "dynamic":  # otherwise the context length is only a limit
        computed.pop("max_position_embeddings", None)
    return computed


def files_of(model: nn.Module) -> ModelFiles:
    """Return how a model's folders are written."""
    return getattr(model, "files", None) or ModelFiles(model.config)  # type: ignore[arg-type]


def _major(version: object) -> int:
    """The first number of a version; 0 for none."""
    number = re.match(r"\d+", str(version))
    return int(number[0]) if number else 0


def files_of_folder(folder: str | Path) -> ModelFiles:
    """Return how folders of the model in ``folder`` are written.

    Raises:
        ValueError: see ``load_config``.
    """
    raw: dict[str, object] = parse_config_json(folder, dict)
    if is_supported(raw):
        return ModelFiles(load_config(folder))
    ids: dict[str, Any] = {name: raw.get(name) for name in SPECIAL_IDS}
    return HuggingFaceModelFiles(BumblebeeConfig(**ids), raw)


def save_model(
    folder: str | Path, files: ModelFiles, tensors: Mapping[str, Tensor] | Tensors, max_shard_size: str = "5GB"
) -> None:
    """Write a model folder atomically: on failure an existing folder stays unchanged.

    Args:
        folder: created if it does not exist; files of other kinds in it are kept.
        files: how the model is written.
        tensors: state dict, or (key, tensor) pairs, with the model's keys.
        max_shard_size: for example "5GB"; a larger tensor gets a file of its own.

    Raises:
        ValueError: the size is invalid.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    with written_aside(folder) as aside:
        digests = files.write(aside, pairs, max_shard_size)
    remove_stale_weights(folder, digests)


def write_generation_config(folder: Path, config: BumblebeeConfig) -> None:
    """Write generation_config.json: the special ids that generation starts and stops with."""
    ids = {name: getattr(config, name) for name in SPECIAL_IDS}
    write_json(folder / "generation_config.json", {name: value for name, value in ids.items() if value is not None})
