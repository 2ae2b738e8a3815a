"""LoRA (arXiv 2106.09685) through PEFT: small matrices beside frozen weights. The only file that imports peft.

Listed under ``task.transforms`` in a recipe. The run then saves adapter folders, in PEFT's layout: what was learned, and the
path of the model that it was learned on. Reading and merging them needs no peft: ``bumblebee/checkpoint/adapters.py``.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bumblebee.adapter_folders import WEIGHTS, adapter_chain, base_model_name
from bumblebee.checkpoint.adapters import (
    EXPERTS,
    NAME,
    Adapter,
    is_adapter_key,
    write_adapter_config,
    write_adapter_weights,
)
from bumblebee.checkpoint.fused_adapters import fused_modules, fused_settings, separate, separate_settings
from bumblebee.checkpoint.hf_folder import ForeignFiles, ModelFiles, files_of, read_tensors, write_generation_config
from bumblebee.checkpoint.weight_mapping import Rule
from bumblebee.config import BumblebeeConfig
from bumblebee.models.load_context import current_load_context
from bumblebee.models.loading import load_model
from bumblebee.nn.lm_head import LMHead
from bumblebee.nn.moe import Experts

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRA:
    """Trains low-rank updates of linear layers and freezes everything else.

    A layer computes ``W x + s B A x``: A has ``rank`` rows, B as many columns and begins at zero. A's values follow from the
    run's seed and the layer's name alone.

    Args:
        rank: of the updates.
        alpha: s is alpha / rank, so that the rank can be changed without a new learning rate.
        dropout: on the input of the updates, while training.
        targets: "all-linear" for the projections of attention and feed-forward parts; or a list of names' ends, such as
            [q_proj, v_proj]; or a regular expression for whole names.
        dora: also learn the length of each row of W + s B A (DoRA, arXiv 2402.09353).
        rslora: s is alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732).
        experts: also train updates of the experts of mixtures, each its own; without dropout and dora. A forward pass then
            makes a whole copy of a layer's experts.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        rank: int = 64,
        alpha: int = 128,
        dropout: float = 0.1,
        targets: str | list[str] = "all-linear",
        dora: bool = False,
        rslora: bool = False,
        experts: bool = False,
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if alpha < 1:
            raise ValueError(f"alpha must be at least 1, got {alpha}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if experts and (dropout or dora):
            raise ValueError(
                f"experts: their updates are added to whole weights, for which there is no dropout and no dora;"
                f" got dropout {dropout:g} and dora {str(dora).lower()}"
            )
        if not targets:
            raise ValueError("targets must be all-linear, a list of names or a regular expression, got nothing")
        self.rank, self.alpha, self.dropout, self.targets = rank, alpha, dropout, targets
        self.dora, self.rslora, self.experts = dora, rslora, experts

    def __call__(self, model: nn.Module) -> None:
        """Put adapters into the model, in place.

        Raises:
            ValueError: targets that are not there, adapters that are, or a model that is in no folder.
        """
        if has_adapters(model):
            raise ValueError("task.transforms: the model has LoRA adapters already; list LoRA once")
        base = getattr(model, "source", None)
        if base is None:
            raise ValueError(
                "task.transforms: LoRA needs a model that was read from a folder, since adapters alone are saved and name it:"
                " set task.model to bumblebee.Bumblebee.from_pretrained with a folder"
            )
        if self.experts and not any(isinstance(module, Experts) for module in model.modules()):
            raise ValueError("experts: the model is no mixture of experts")
        self._inject(model, base)

    def _inject(self, model: Any, base: Path) -> None:
        with _ready_for_shards():
            from peft import LoraConfig, TaskType

            config = LoraConfig(
                r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=_matched(model, self.targets),
                target_parameters=list(EXPERTS) if self.experts else None,
                use_dora=self.dora, use_rslora=self.rslora, task_type=TaskType.CAUSAL_LM,
                base_model_name_or_path=str(base.resolve()),  # absolute: it holds wherever a command is started
            )  # fmt: skip
            inject(model, config)
            _initialise(model)
        adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
        model.files = AdapterFiles(model.config, config, _rules(model), adapted)


def _matched(model: nn.Module, targets: str | list[str]) -> str | list[str]:
    """The targets as PEFT takes them.

    Raises:
        ValueError: one that matches nothing, or something else than a linear layer of a block.
    """
    adapted: set[str] = set()
    linear = {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and not isinstance(module, LMHead)
    }
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in sorted(linear)))
    if targets == "all-linear":
        targets = [name for name in ALL_LINEAR if name in ends]
    names = [name for name, _ in model.named_modules() if name]
    for target in [targets] if isinstance(targets, str) else targets or ["all-linear"]:
        found = {name for name in names if _fits(name, target, whole=isinstance(targets, str))}
        if not found:
            raise ValueError(f"targets: {target!r} matches no layer; there are {', '.join(ends)}, as in {min(linear)}")
        if other := sorted(found - linear):
            raise ValueError(
                f"targets: {target!r} matches {other[0]}, which cannot have an adapter; there are {', '.join(ends)}"
            )
        adapted |= found
    _check_fused(model, adapted)
    return targets


def _check_fused(model: nn.Module, adapted: set[str]) -> None:
    """Layers that the family's files keep in one tensor have updates together."""
    for theirs, ours in fused_modules(_rules(model)).items():
        if 0 < len(adapted & set(ours)) < len(ours):
            named = ", ".join(name.rpartition(".")[2] for name in ours)
            raise ValueError(f"targets: {theirs} in the model's files is {named} in one: name all of them or none")


def _rules(model: Any) -> list[Rule]:
    """How the modules that PEFT knows, those of transformers, differ from the model's: as its files do, if it is ours."""
    files = files_of(model)
    return [] if isinstance(files, ForeignFiles) else files.rules()


def _fits(name: str, target: str, whole: bool) -> bool:
    """As PEFT does it."""
    if not whole:
        return name == target or name.endswith(f".{target}")
    try:
        return re.fullmatch(target, name) is not None
    except re.error as error:
        raise ValueError(f"targets: {target!r} is no regular expression: {error}") from error


def inject(model: nn.Module, config: Any) -> None:
    """Wrap layers in PEFT's, in place, and freeze everything else."""
    from peft import inject_adapter_in_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its advice is about other ways of using it
        inject_adapter_in_model(config, model, adapter_name=NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter_key(name))
    for layer in _layers(model):
        # In a tuple, or it would be taken for a part of its own.
        for dora in getattr(layer, "lora_magnitude_vector", {}).values():
            dora.reads = (layer.get_base_layer(),)
        if isinstance(base := layer.get_base_layer(), Experts):
            layer.reads = (base, *layer.lora_A.values(), *layer.lora_B.values())


@contextmanager
def _ready_for_shards() -> Iterator[None]:
    """Adapters are small: they are made whole also where the model is built in shards, and cut when training begins."""
    if not current_load_context().sharded:
        yield
        return
    from bumblebee.distributed.deepspeed.zero_init import unsharded_init

    with unsharded_init():
        from bumblebee.models.huggingface import weights_gathered  # in here: some imports do not bear how shards are built

        with weights_gathered():  # when PEFT looks at them, for DoRA
            yield


@torch.no_grad()
def _initialise(model: nn.Module) -> None:
    """A as torch begins a linear layer, from the seed and the name: the same on all ranks, at all stages. PEFT zeroed B."""
    for name, parameter in model.named_parameters():
        if not is_adapter_key(name):
            continue
        start = parameter.float()
        if ".lora_A." in name:
            digest = hashlib.sha256(f"{torch.initial_seed()} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            bound = 1 / math.sqrt(parameter.shape[1])
            start = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator).to(parameter.device)
        # PEFT has cast it to the weight's dtype. The engine casts as it needs, but nothing of a model that is built in shards.
        parameter.data = start.to(parameter.dtype) if current_load_context().sharded else start


class AdapterFiles(ModelFiles):
    """The folders of a model with adapters: the adapters alone, with PEFT's config.

    Args:
        config: the model's.
        adapter: PEFT's LoraConfig.
        rules: how PEFT's modules differ from the model's.
        adapted: names of the modules that have updates.
    """

    def __init__(self, config: BumblebeeConfig, adapter: Any, rules: Sequence[Rule] = (), adapted: Sequence[str] = ()) -> None:
        super().__init__(config)
        self.adapter, self.adapted, self._rules = adapter, adapted, list(rules)

    def rules(self) -> list[Rule]:
        """As for the whole model."""
        return self._rules

    def holds(self, name: str) -> bool:
        """Only what belongs to an adapter."""
        return is_adapter_key(name)

    def write(self, folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_size: str = "5GB") -> set[str]:
        """adapter_model.safetensors, adapter_config.json, generation_config.json."""
        write_adapter_weights(folder, ((name, tensor) for name, tensor in tensors if self.holds(name)), self.rules())
        self.write_configs(folder, "")
        return {WEIGHTS}

    def write_configs(self, folder: Path, dtype: str) -> None:
        """adapter_config.json and generation_config.json."""
        settings = {**self.adapter.to_dict(), "inference_mode": True}
        settings = fused_settings(settings, fused_modules(self.rules()), self.adapted)
        sorted_sets = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
        write_adapter_config(folder, sorted_sets)
        write_generation_config(folder, self.config)

    def check_output(self, output_dir: Path) -> None:
        """Not where the base model is: the adapters are worth nothing without it."""
        for folder in adapter_chain(self.adapter.base_model_name_or_path):
            if output_dir.resolve() in (folder.resolve(), folder.resolve().parent):
                raise ValueError(f"output_dir: {output_dir} holds the base model {folder}, which adapters need: choose another")

    def check_resumed(self, checkpoint: Path) -> None:
        """The same base model, as far as that can be told: a folder that is gone may have been moved here."""
        ours, theirs = (self.adapter.base_model_name_or_path, base_model_name(checkpoint))
        if theirs is not None and Path(theirs).is_dir() and Path(theirs).resolve() != Path(ours).resolve():
            raise ValueError(f"trainer.resume: {checkpoint} was trained on the model in {theirs}, this run's is that in {ours}")


# -- adapters of others --------------------------------------------------------------------------------------------------


def attach(model: nn.Module, folder: Path) -> None:
    """Put an adapter folder's updates beside the weights of its base model, unmerged, as PEFT computes them.

    Raises:
        ValueError: a folder that is none, or of another model.
    """
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    adapter = Adapter(folder)  # refuses what is not supported
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = False
    weights, modules, scales = load_file(folder / WEIGHTS), fused_modules(_rules(model)), adapter.scales()
    if modules.keys() & scales.keys():
        rows = {name: module.out_features for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        weights = separate(weights, modules, rows)
        scales |= {part: scales[theirs] for theirs, ours in modules.items() if theirs in scales for part in ours}
        for name, value in separate_settings(weights, scales, config.use_rslora).items():
            setattr(config, name, value)
    inject(model, config)
    result: Any = set_peft_model_state_dict(model, weights, adapter_name=NAME)
    if result.unexpected_keys:
        raise ValueError(f"{folder / WEIGHTS} holds {result.unexpected_keys[0]}, which fits nothing in the base model")


def differences(
    merged: str | Path, adapter: str | Path, base: str | Path | None = None, trust_remote_code: bool = False
) -> dict[str, tuple[float, float]]:
    """How far a merged folder's logits are from those of the base model with the adapter beside its weights.

    Args:
        merged: the model folder.
        adapter: the adapter folder that went into it.
        base: what the adapter stands on, instead of the folder that it names.
        trust_remote_code: run code that the folders name or hold.

    Returns:
        For fp32 and for the folder's own dtype, by name: the largest difference and the largest logit, over a few token ids.
    """
    own = next(iter(read_tensors(merged)))[1].dtype
    below = adapter_chain(adapter, base)[-2]
    return {
        str(dtype).removeprefix("torch."): _difference(merged, Path(adapter), below, dtype, trust_remote_code)
        for dtype in {torch.float32: 0, own: 0}
    }


@torch.inference_mode()
def _difference(
    merged: str | Path, adapter: Path, base: Path, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[float, float]:
    beside = load_model(base, dtype, trust_remote_code=trust_remote_code)
    count = beside.config.vocab_size
    ids = torch.randint(
        0, count, (1, min(32, beside.config.max_position_embeddings)), generator=torch.Generator().manual_seed(0)
    )
    attach(beside, adapter)
    wanted = beside.eval()(ids).float()
    del beside  # one model at a time
    found = load_model(merged, dtype, trust_remote_code=trust_remote_code).eval()(ids).float()
    return float((found - wanted).abs().max()), float(wanted.abs().max())


# -- without them --------------------------------------------------------------------------------------------------------


def has_adapters(model: nn.Module) -> bool:
    """Whether there are adapters in a model."""
    return any(True for _ in _layers(model))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model computes what it did before it got adapters. Nothing is moved or copied.

    Raises:
        ValueError: there are none.
    """
    layers = list(_layers(model))
    if not layers:
        raise ValueError("the model has no LoRA adapters that could be switched off")
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer._disable_adapters = off


def _layers(model: nn.Module) -> Iterator[Any]:
    """PEFT's layers, known by the switch that they all have, so that a model without them does not wait for the import."""
    return (module for module in model.modules() if hasattr(module, "_disable_adapters"))
