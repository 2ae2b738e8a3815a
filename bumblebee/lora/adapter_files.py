"""The folders of a model with LoRA: the adapter alone, with PEFT's config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from bumblebee.checkpoint.adapters.folder import adapter_chain, base_model_name
from bumblebee.checkpoint.adapters.fused import fused_modules, fused_settings
from bumblebee.checkpoint.adapters.writer import is_adapter_key, write_adapter_config, write_adapter_weights
from bumblebee.checkpoint.model_files import ModelFiles, write_generation_config
from bumblebee.checkpoint.weight_mapping import Rule
from bumblebee.config import BumblebeeConfig
from bumblebee.utils.json_files import JSON

if TYPE_CHECKING:
    from peft import LoraConfig


class AdapterFiles(ModelFiles):
    """The folder of a LoRA adapter.

    Args:
        config: the model's.
        adapter: PEFT's LoraConfig, which names the base model's folder.
        rules: how the modules of the family's transformers model map to the model's.
        adapted: names of the modules that have updates.
        base: fingerprint of the base model; None for that of ``config``.
    """

    def __init__(
        self,
        config: BumblebeeConfig,
        adapter: LoraConfig,
        rules: Sequence[Rule] = (),
        adapted: Sequence[str] = (),
        base: Mapping[str, JSON] | None = None,
    ) -> None:
        super().__init__(config)
        assert adapter.base_model_name_or_path is not None
        self.adapter, self.base_model = adapter, adapter.base_model_name_or_path
        self.adapted, self._rules, self._base_fingerprint = adapted, list(rules), base

    def fingerprint(self) -> dict[str, JSON]:
        """That of the base model, and the settings of the updates' scale."""
        base = super().fingerprint() if self._base_fingerprint is None else self._base_fingerprint
        adapter = self.adapter
        scale: dict[str, JSON] = {"LoRA rank": adapter.r, "LoRA alpha": adapter.lora_alpha}
        return {**base, **scale, "LoRA rslora": adapter.use_rslora, "LoRA dora": adapter.use_dora}

    def rules(self) -> list[Rule]:
        """How the base model's files map to the model."""
        return self._rules

    def includes(self, key: str) -> bool:
        """Whether a tensor belongs to the adapter."""
        return is_adapter_key(key)

    def write(self, folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_size: str = "5GB") -> dict[str, str]:
        """Write adapter_model.safetensors, adapter_config.json and generation_config.json."""
        updates = ((key, tensor) for key, tensor in tensors if self.includes(key))
        digests = write_adapter_weights(folder, updates, self.rules())
        self.write_configs(folder, "")
        return digests

    def write_configs(self, folder: Path, dtype: str) -> None:
        """Write adapter_config.json and generation_config.json."""
        settings = {**self.adapter.to_dict(), "inference_mode": True}
        modules = fused_modules(self.rules())
        settings = fused_settings(settings, modules, self.adapted, self.adapter.r, self.adapter.lora_alpha)
        write_adapter_config(
            folder, {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
        )
        write_generation_config(folder, self.config)

    def check_output(self, output_dir: Path) -> None:
        """Raise if the run would overwrite the base model, which the adapter needs."""
        for folder in adapter_chain(self.base_model):
            if output_dir.resolve() in (folder.resolve(), folder.resolve().parent):
                raise ValueError(
                    f"output_dir: {output_dir} contains the base model {folder}, which adapters need: choose another"
                )

    def check_resumed(self, checkpoint: Path) -> None:
        """Raise if the checkpoint names another base model that exists; one that does not exist may have been moved."""
        base, resumed_base = self.base_model, base_model_name(checkpoint)
        if resumed_base is not None and Path(resumed_base).is_dir() and Path(resumed_base).resolve() != Path(base).resolve():
            raise ValueError(
                f"trainer.resume: {checkpoint} was trained on the base model {resumed_base}, but this run uses {base}"
            )
