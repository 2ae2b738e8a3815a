"""Any causal language model of transformers, for the same tasks, transforms, trainer, generator and server as Bumblebee's own.

Choices made:
- Its modules lie in this one under the names that they have there: state dict, adapters and folders are those of transformers.
- Its attention is ours (transformers lets a model's attention function be named): packed documents stay apart, and the
  generator's paged cache serves it. A model that computes attention in a way that ours does not is refused by name.
- The weights are read by ``checkpoint/folder.py``, one tensor at a time, cut over ranks at ZeRO-3, adapters added; so a model
  whose files transformers converts while it reads them is refused by name.
- The head is looked at: where logits are a plain product of the last hidden states, the loss is computed in chunks; else
  from whole logits.

transformers is imported in this file alone. Shapes: B rows, T positions, V vocabulary, H query heads, K key-value heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bumblebee.adapter_folders import base_model_folder
from bumblebee.checkpoint.hf_folder import ForeignFiles, parameters_on_meta, put_weights
from bumblebee.checkpoint.weight_files import stored_keys
from bumblebee.checkpoint.weight_loader import tied
from bumblebee.checkpoint.weight_mapping import Rule
from bumblebee.config import BumblebeeConfig
from bumblebee.models.base import LanguageModel
from bumblebee.models.load_context import current_load_context
from bumblebee.nn import IGNORE_INDEX
from bumblebee.nn.attention_kernels import KERNELS, AttentionMask, choose
from bumblebee.nn.lm_head import Head

NAME = "bumblebee"  # of our attention function, among those of transformers
_NOT_COMPUTED = ("softcap", "s_aux", "position_bias", "head_mask")  # what attention may be asked for and ours does not have
_LAYERS = {"full_attention", "sliding_attention"}  # kinds of layers whose only memory of earlier tokens is keys and values


@dataclass
class _Pass:
    """What our attention needs to know of a forward pass; transformers hands it down to every layer."""

    mask: AttentionMask
    cache: list[Any] | None
    kernel: str


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
    dropout: float = 0.0, sliding_window: int | None = None, bumblebee_pass: _Pass | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as transformers calls it: (B, heads, T, D) each -> (B, T, H, D)."""
    if wrong := sorted(name for name in _NOT_COMPUTED if others.get(name) is not None):
        raise ValueError(f"{type(module).__name__} is not supported: its attention has {', '.join(wrong)}")
    if bumblebee_pass is None:
        raise ValueError(f"{type(module).__name__} is not supported: the model does not tell it of packed documents and caches")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if scaling is not None:  # kernels divide by the root of the width
        q = q * (scaling * q.shape[-1] ** 0.5)
    if bumblebee_pass.cache is not None:
        return bumblebee_pass.cache[module.layer_idx].attend(q, k, v, sliding_window), None
    kernel = KERNELS[choose(bumblebee_pass.kernel, q.dtype)]
    return kernel(q, k, v, bumblebee_pass.mask, sliding_window, dropout), None


class HuggingFaceModel(LanguageModel):
    """A causal language model of transformers; made by ``from_pretrained``.

    Args:
        model: of transformers.
        attention: ``auto``, ``flash``, ``sdpa`` or ``naive`` (see ``bumblebee/nn/attention_kernels.py``).

    Raises:
        ValueError: a model that cannot be trained or generate here; the message says why.
    """

    def __init__(self, model: Any, attention: str = "auto") -> None:
        super().__init__()
        choose(attention, torch.bfloat16)
        _check(model)
        self.attention = attention
        self.config = _config_of(model)
        self.theirs = (model,)  # in a tuple, or it would be a part of its own beside its parts
        self.__dict__["_modules"] = model._modules  # one table of parts: what is put in a part's place is so in both
        Head.adopt(model.get_output_embeddings())
        self.plain_head: bool | None = None  # found out in the first forward pass
        self.files = ForeignFiles(self.config, _raw(model), _renamed(model), set(tied(self.state_dict(keep_vars=True))))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        attention: str = "auto",
        trust_remote_code: bool = False,
    ) -> HuggingFaceModel:
        """Read a model folder of any architecture that transformers has, or an adapter folder on one.

        Args:
            folder: path to config.json and safetensors, or to an adapter.
            dtype: of the weights; None keeps the file's.
            device: where they go.
            attention: as for the constructor.
            trust_remote_code: run model code that lies in the folder.

        Raises:
            ValueError: no model folder, an architecture that transformers does not have or that cannot run here, or weights
                that do not fit.
        """
        with parameters_on_meta():
            model = cls(_build(base_model_folder(folder), trust_remote_code), attention)
        unused = re.compile("|".join(model.theirs[0]._keys_to_ignore_on_load_unexpected or ["$^"]))
        renamed = model.files.rules()
        if renamed:  # newer files may have the model's own names
            there = stored_keys(base_model_folder(folder))
            renamed = [rule for rule in renamed if rule.theirs[0] in there]
        put_weights(folder, model, dtype, torch.device(device), renamed, lambda key: unused.search(key) is not None)
        model.source = Path(folder)
        return model

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cache: list[Any] | None = None,
        logits_at: Tensor | None = None,
    ) -> Tensor:
        """As ``Bumblebee.forward``: logits, or token losses where labels are given."""
        if position_ids is None:
            position_ids, mask = _arranged(input_ids), AttentionMask()
        else:
            mask = AttentionMask() if cache is not None else AttentionMask.packed(position_ids)
        if self.plain_head is None:
            self.plain_head = self._head_is_plain(input_ids[:1, :4])
        told = self._told(position_ids, mask, cache)
        head = self.theirs[0].get_output_embeddings()
        if not self.plain_head or (labels is not None and not isinstance(head, Head)):
            return self._from_logits(self.theirs[0](input_ids, **told).logits, labels, logits_at)
        hidden = self.theirs[0].base_model(input_ids, **told).last_hidden_state
        if logits_at is not None:
            hidden = hidden.flatten(0, 1)[logits_at]
        return head(hidden) if labels is None else head(hidden, labels)

    def _told(self, position_ids: Tensor, mask: AttentionMask, cache: list[Any] | None) -> dict[str, Any]:
        """What transformers' model is called with beside the ids."""
        return {"position_ids": position_ids, "use_cache": False, "bumblebee_pass": _Pass(mask, cache, self.attention)}

    @staticmethod
    def _from_logits(logits: Tensor, labels: Tensor | None, logits_at: Tensor | None) -> Tensor:
        if labels is not None:
            flat = logits.flatten(0, 1).float()
            return cross_entropy(flat, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none").view(labels.shape)
        return logits if logits_at is None else logits.flatten(0, 1)[logits_at]

    @torch.no_grad()
    def _head_is_plain(self, input_ids: Tensor) -> bool:
        """Whether logits are the head's product with the last hidden states, and nothing else."""
        model, training = self.theirs[0], self.training
        head = model.get_output_embeddings()
        self.eval()
        told = self._told(_arranged(input_ids), AttentionMask(), None)
        wanted = model(input_ids, **told).logits.float()
        found = head(model.base_model(input_ids, **told).last_hidden_state).float()
        self.train(training)
        return torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)

    def checkpoint_activations(self, every: int) -> None:
        """Compute blocks again in the backward pass (arXiv 1604.06174).

        Raises:
            ValueError: a model that cannot, or not all blocks wanted.
        """
        model = self.theirs[0]
        if every != 1 or not model.supports_gradient_checkpointing:
            raise ValueError(f"{type(model).__name__} can compute all of its blocks again, or none: got every {every}")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    @property
    def blocks(self) -> list[nn.Module]:
        """Its layers, in order."""
        lists = [list(part) for part in self.theirs[0].base_model.modules() if isinstance(part, nn.ModuleList)]
        return max(lists, key=len)


def _arranged(input_ids: Tensor) -> Tensor:
    """Positions 0 ... T-1 of each row."""
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)


def _build(folder: Path, trust_remote_code: bool) -> Any:
    """A model of transformers with the folder's config, our attention in it.

    Raises:
        ValueError: a config that transformers cannot make a causal language model of.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)  # ours is in the pass
    with _quiet(logging):
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            with _left_as_they_are():
                model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME, trust_remote_code=trust_remote_code)
            model.tie_weights()
            return model
        except (ValueError, KeyError, ImportError, OSError) as error:
            # such a model looks attention up in a table of its own
            unnamed = isinstance(error, KeyError) and error.args == (NAME,)
            why = "its attention cannot be replaced by ours" if unnamed else error
            raise ValueError(f"{folder}: transformers cannot make a causal language model of this: {why}") from error


@contextmanager
def _left_as_they_are() -> Iterator[None]:
    """Weights cut over ranks (ZeRO-3) cannot be initialised: some models write to a row. All come from the files anyway."""
    if not current_load_context().sharded:
        yield
        return
    from transformers.initialization import no_init_weights

    with no_init_weights():
        yield


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def weights_gathered() -> Iterator[None]:
    """Libraries that ask transformers whether weights are cut over ranks (ZeRO-3) gather those that they look at."""
    from transformers.integrations import HfDeepSpeedConfig

    alive = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    yield
    del alive


def _check(model: Any) -> None:
    """Refuse a model that would compute something else here than in transformers.

    Raises:
        ValueError: it does.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    config, why = model.config, None
    kinds = set(getattr(config, "layer_types", None) or ()) - _LAYERS
    if not model._supports_attention_backend:
        why = "its attention cannot be replaced by ours"
    elif kinds:
        why = f"it has layers of the kind {', '.join(sorted(kinds))}"
    elif getattr(model, "_is_stateful", False):
        why = "its layers keep states"
    elif getattr(config, "is_encoder_decoder", False):
        why = "it is an encoder and a decoder"
    elif not all(isinstance(each, WeightRenaming) for each in get_model_conversion_mapping(model, add_legacy=False)):
        why = "transformers converts its weights while it reads them"
    if why:
        raise ValueError(f"{type(model).__name__} is not supported: {why}")


def _raw(model: Any) -> dict[str, Any]:
    """The content of config.json."""
    raw = {name: value for name, value in model.config.to_dict().items() if not name.startswith("_")}
    return raw | {"architectures": [type(model).__name__]}


def _renamed(model: Any) -> list[Rule]:
    """Tensors that have other names in files."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    if not get_model_conversion_mapping(model, add_legacy=False):
        return []
    tensors = model.state_dict()
    pairs = [(next(iter(revert_weight_conversion(model, {key: tensor}))), key) for key, tensor in tensors.items()]
    return [Rule.rename(theirs, ours) for theirs, ours in pairs if theirs != ours]


def _config_of(model: Any) -> BumblebeeConfig:
    """The shape in our names: what the tasks, the generator and the calculators ask for."""
    theirs = model.config
    heads = theirs.num_attention_heads
    return BumblebeeConfig(
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        intermediate_size=getattr(theirs, "intermediate_size", None) or 4 * theirs.hidden_size,
        num_hidden_layers=theirs.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(theirs, "num_key_value_heads", None) or heads,
        head_dim=getattr(theirs, "head_dim", None) or theirs.hidden_size // heads,
        max_position_embeddings=theirs.max_position_embeddings,
        tie_word_embeddings=bool(theirs.tie_word_embeddings),
        bos_token_id=theirs.bos_token_id,
        eos_token_id=theirs.eos_token_id,
        pad_token_id=theirs.pad_token_id,
        architecture=type(model).__name__,
    )
