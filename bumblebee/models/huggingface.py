"""Wrapper of transformers' causal language models for our tasks, transforms, trainer, generator and server.

Design choices:

- The wrapped model's modules keep their names, so that state dicts, adapters and folders are those of transformers.
- Attention is ours, registered with transformers' attention interface: packed documents stay separate, and the generator's
  paged KV cache works. Models with attention that our kernels do not compute are rejected by name.
- Weights are loaded by ``checkpoint/weight_loader.py``: one tensor at a time, sharded under ZeRO-3, adapters merged. Models
  whose files transformers converts while loading are therefore rejected by name.
- If the logits are a plain product of the last hidden states, the loss is computed in chunks, otherwise from full logits.

transformers is imported in this file only. Shapes: B rows, T positions, V vocabulary, H query heads, K key-value heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bumblebee.checkpoint.adapters.folder import base_model_folder
from bumblebee.checkpoint.model_files import HuggingFaceModelFiles
from bumblebee.checkpoint.parameter_loader import tied
from bumblebee.checkpoint.weight_files import stored_keys
from bumblebee.checkpoint.weight_loader import load_mapped_weights
from bumblebee.checkpoint.weight_mapping import Rule
from bumblebee.config import BumblebeeConfig
from bumblebee.hardware.cuda import configure_cuda
from bumblebee.models.base import LanguageModel
from bumblebee.models.load_context import current_load_context, meta_parameters
from bumblebee.nn import IGNORE_INDEX
from bumblebee.nn.attention import LayerCache
from bumblebee.nn.attention_kernels import KERNELS, AttentionMask, select_kernel
from bumblebee.nn.lm_head import LMHead

# transformers.PreTrainedModel. Not by that name: jsonargparse would import transformers to read from_pretrained's options.
TransformersModel: TypeAlias = Any

NAME = "bumblebee"  # name of our attention function in transformers' registry
_UNSUPPORTED_ARGUMENTS = ("softcap", "s_aux", "position_bias", "head_mask")  # of attention functions
_SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}  # layer types whose only state is a KV cache


@dataclass
class _ForwardContext:
    """State of a forward pass for our attention; transformers passes it down to every layer."""

    mask: AttentionMask
    cache: Sequence[LayerCache] | None
    kernel: str


class _AttentionLayer(Protocol):
    """Transformers' attention modules."""

    layer_idx: int


def _attend(
    module: _AttentionLayer, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, scaling: float | None = None,
    dropout: float = 0.0, sliding_window: int | None = None, bumblebee_pass: _ForwardContext | None = None, **kwargs: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention function with transformers' signature: (B, heads, T, D) each -> (B, T, H, D)."""
    if unsupported := sorted(name for name in _UNSUPPORTED_ARGUMENTS if kwargs.get(name) is not None):
        raise ValueError(f"{type(module).__name__} is not supported: its attention uses {', '.join(unsupported)}")
    if bumblebee_pass is None:
        raise ValueError(
            f"{type(module).__name__} is not supported: the model does not pass keyword arguments to its attention"
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if scaling is not None:  # our kernels scale by 1 / sqrt(D)
        q = q * (scaling * q.shape[-1] ** 0.5)
    if bumblebee_pass.cache is not None:
        return bumblebee_pass.cache[module.layer_idx].attend(q, k, v, sliding_window), None
    kernel = KERNELS[select_kernel(bumblebee_pass.kernel, q.dtype)]
    return kernel(q, k, v, bumblebee_pass.mask, sliding_window, dropout), None


class HuggingFaceModel(LanguageModel):
    """A causal language model of transformers. Create it with ``from_pretrained``.

    Args:
        model: a transformers model.
        attention: ``auto``, ``flash``, ``varlen``, ``sdpa`` or ``naive`` (see ``bumblebee/nn/attention_kernels.py``).

    Raises:
        ValueError: the model is not supported; the message says why.
    """

    def __init__(self, model: TransformersModel, attention: str = "auto") -> None:
        super().__init__()
        select_kernel(attention, None)
        _check(model)
        self.attention = attention
        self.config = _config_of(model)
        self.wrapped = (model,)  # a tuple, so that torch does not register the model as a submodule
        self.__dict__["_modules"] = model._modules  # shared: replacing a submodule replaces it in both
        LMHead.adopt(model.get_output_embeddings())
        self.plain_head: bool | None = None  # determined in the first forward pass
        tied_keys = set(tied(self.state_dict(keep_vars=True)))
        self.files = HuggingFaceModelFiles(self.config, _raw(model), _renamed(model), tied_keys)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        attention: str = "auto",
        trust_remote_code: bool = False,
    ) -> HuggingFaceModel:
        """Load a model folder of any transformers architecture, or an adapter folder merged with its base model.

        Args:
            folder: path to config.json and safetensors files, or to an adapter.
            dtype: dtype of the weights; None keeps the dtype of the files.
            device: device of the weights.
            attention: as for the constructor.
            trust_remote_code: run model code that the folder contains.

        Raises:
            ValueError: not a model folder, an unsupported architecture, or weights that do not match the model.
        """
        with meta_parameters():
            model = cls(_build(base_model_folder(folder), trust_remote_code), attention)
        unused = re.compile("|".join(model.wrapped[0]._keys_to_ignore_on_load_unexpected or ["$^"]))
        assert model.files is not None
        renamed = model.files.rules()
        if renamed:  # newer files may use the model's own names
            keys = stored_keys(base_model_folder(folder))
            renamed = [rule for rule in renamed if rule.file_keys[0] in keys]
        configure_cuda(device)
        load_mapped_weights(folder, model, dtype, torch.device(device), renamed, lambda key: unused.search(key) is not None)
        model.source = Path(folder)
        return model

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Sequence[LayerCache] | None = None,
        logits_at: Tensor | None = None,
    ) -> Tensor:
        """Return logits, or token losses if labels are passed; see ``Bumblebee.forward``."""
        if position_ids is None:
            position_ids, mask = _default_positions(input_ids), AttentionMask()
        else:
            mask = AttentionMask() if cache is not None else AttentionMask.packed(position_ids)
        if self.plain_head is None:
            self.plain_head = self._head_is_plain(input_ids[:1, :4])
        kwargs = self._kwargs(position_ids, mask, cache)
        head = self.wrapped[0].get_output_embeddings()
        if not self.plain_head or (labels is not None and not isinstance(head, LMHead)):
            return self._from_logits(self.wrapped[0](input_ids, **kwargs).logits, labels, logits_at)
        hidden = self.wrapped[0].base_model(input_ids, **kwargs).last_hidden_state
        if logits_at is not None:
            hidden = hidden.flatten(0, 1)[logits_at]
        return head(hidden) if labels is None else head(hidden, labels)

    def _kwargs(self, position_ids: Tensor, mask: AttentionMask, cache: Sequence[LayerCache] | None) -> dict[str, object]:
        """Keyword arguments of the wrapped model's forward."""
        return {
            "position_ids": position_ids,
            "use_cache": False,
            "bumblebee_pass": _ForwardContext(mask, cache, self.attention),
        }

    @staticmethod
    def _from_logits(logits: Tensor, labels: Tensor | None, logits_at: Tensor | None) -> Tensor:
        if labels is not None:
            flat = logits.flatten(0, 1).float()
            return cross_entropy(flat, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none").view(labels.shape)
        return logits if logits_at is None else logits.flatten(0, 1)[logits_at]

    @torch.no_grad()
    def _head_is_plain(self, input_ids: Tensor) -> bool:
        """Whether the logits are exactly the head applied to the last hidden states (no scaling, no softcap)."""
        model, training = self.wrapped[0], self.training
        head = model.get_output_embeddings()
        self.eval()
        kwargs = self._kwargs(_default_positions(input_ids), AttentionMask(), None)
        expected = model(input_ids, **kwargs).logits.float()
        computed = head(model.base_model(input_ids, **kwargs).last_hidden_state).float()
        self.train(training)
        return torch.allclose(computed, expected, rtol=1e-3, atol=1e-3)

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer layers, in order."""
        lists = [list(part) for part in self.wrapped[0].base_model.modules() if isinstance(part, nn.ModuleList)]
        return max(lists, key=len)


def load_unmodified(folder: str | Path) -> TransformersModel | None:
    """Load a model folder in fp32 with transformers alone: its loader and its attention. None if it is not installed.

    Raises:
        ValueError: transformers does not know the architecture.
    """
    if find_spec("transformers") is None:
        return None
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    with _quiet(logging):
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
        ).eval()


def _default_positions(input_ids: Tensor) -> Tensor:
    """Position ids 0 ... T-1 of each row."""
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)


def _build(folder: Path, trust_remote_code: bool) -> TransformersModel:
    """Build the transformers model of a folder's config, with our attention.

    Raises:
        ValueError: transformers cannot build a causal language model from the config.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)  # our mask is in the forward context
    with _quiet(logging):
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            with _no_initialization_when_sharded():
                model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME, trust_remote_code=trust_remote_code)
            model.tie_weights()
            return model
        except (ValueError, KeyError, ImportError, OSError) as error:
            # Some models look attention up in a table of their own.
            unregistered = isinstance(error, KeyError) and error.args == (NAME,)
            why = "its attention cannot be replaced by ours" if unregistered else error
            raise ValueError(f"{folder}: transformers cannot build a causal language model: {why}") from error


@contextmanager
def _no_initialization_when_sharded() -> Iterator[None]:
    """Skip weight initialization under ZeRO-3: some models index into weights that are sharded. All are loaded from files."""
    if not current_load_context().sharded:
        yield
        return
    from transformers.initialization import no_init_weights

    with no_init_weights():
        yield


@contextmanager
def _quiet(logging: ModuleType) -> Iterator[None]:
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


@contextmanager
def weights_gathered() -> Iterator[None]:
    """Tell libraries that ask transformers about ZeRO-3, such as peft, to gather the weights that they read."""
    from transformers.integrations import HfDeepSpeedConfig

    alive = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    yield
    del alive


def _check(model: TransformersModel) -> None:
    """Reject a model whose outputs would differ from transformers.

    Raises:
        ValueError: the model is not supported.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    config, why = model.config, None
    layer_types = set(getattr(config, "layer_types", None) or ()) - _SUPPORTED_LAYERS
    if not model._supports_attention_backend:
        why = "its attention cannot be replaced by ours"
    elif layer_types:
        why = f"it has layers of type {', '.join(sorted(layer_types))}"
    elif getattr(model, "_is_stateful", False):
        why = "its layers are stateful"
    elif getattr(config, "is_encoder_decoder", False):
        why = "it is an encoder-decoder model"
    elif not all(isinstance(step, WeightRenaming) for step in get_model_conversion_mapping(model, add_legacy=False)):
        why = "transformers converts its weights while loading"
    if why:
        raise ValueError(f"{type(model).__name__} is not supported: {why}")


def _raw(model: TransformersModel) -> dict[str, object]:
    """Content of config.json."""
    raw = {name: value for name, value in model.config.to_dict().items() if not name.startswith("_")}
    return raw | {"architectures": [type(model).__name__]}


def _renamed(model: TransformersModel) -> list[Rule]:
    """Rules for tensors that have other names in files."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    if not get_model_conversion_mapping(model, add_legacy=False):
        return []
    tensors = model.state_dict()
    pairs = [(next(iter(revert_weight_conversion(model, {key: tensor}))), key) for key, tensor in tensors.items()]
    return [Rule.rename(theirs, ours) for theirs, ours in pairs if theirs != ours]


def _config_of(model: TransformersModel) -> BumblebeeConfig:
    """The shape as a BumblebeeConfig, as far as tasks, generator and memory estimates need it."""
    config = model.config
    heads = config.num_attention_heads
    return BumblebeeConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        architecture=type(model).__name__,
    )
