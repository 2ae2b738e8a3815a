"""Bumblebee: a decoder-only transformer, assembled from the parts in ``bumblebee/nn``.

    tokens -> embedding -> [ x + attention(norm(x)) -> x + ffn(norm(x)) ] * layers -> norm -> head -> logits

Choices: RMSNorm before each part, rotary positions, grouped-query attention, SwiGLU, no dropout, embedding and head tied for
small sizes. Modules and state-dict keys have Hugging Face's names, so a Qwen2 or Llama folder loads key for key.
Research changes one part: override ``build_norm``, ``build_attention``, ``build_ffn`` or ``build_block`` in a subclass.
Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bumblebee.config import BumblebeeConfig
from bumblebee.nn.attention import Attention, LayerCache
from bumblebee.nn.ffn import SwiGLU
from bumblebee.nn.head import Head
from bumblebee.nn.kernels import AttentionMask, choose
from bumblebee.nn.norm import RMSNorm
from bumblebee.nn.rope import RotaryEmbedding


class Block(nn.Module):
    """One layer, made of parts that are handed to it."""

    def __init__(self, input_layernorm: nn.Module, self_attn: nn.Module, post_attention_layernorm: nn.Module, mlp: nn.Module):
        super().__init__()
        self.input_layernorm = input_layernorm
        self.self_attn = self_attn
        self.post_attention_layernorm = post_attention_layernorm
        self.mlp = mlp

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: AttentionMask, cache: LayerCache | None = None) -> Tensor:
        """(B, T, hidden_size) -> (B, T, hidden_size)."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything below the head: embedding, blocks, last norm. Its name in a state dict is ``model``."""

    def __init__(self, embed_tokens: nn.Module, layers: list[nn.Module], norm: nn.Module, rotary: nn.Module) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.rotary = rotary
        self.checkpoint_every = 0  # activations are computed again in every n-th block; 0 in none

    def forward(self, input_ids: Tensor, position_ids: Tensor, mask: AttentionMask, cache: list[Any] | None = None) -> Tensor:
        """``input_ids``, ``position_ids``: (B, T) -> hidden states (B, T, hidden_size)."""
        x = self.embed_tokens(input_ids)
        rotary = self.rotary(position_ids)
        for index, layer in enumerate(self.layers):
            if self.checkpoint_every and index % self.checkpoint_every == 0 and cache is None and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotary, mask, use_reentrant=False)
            else:
                x = layer(x, rotary, mask, None if cache is None else cache[index])
        return self.norm(x)


class Bumblebee(nn.Module):
    """The language model.

    Args:
        config: its shape; a dict of BumblebeeConfig's fields in a recipe.
        attention: ``auto``, ``flash``, ``sdpa`` or ``naive`` (see ``bumblebee/nn/kernels.py``).

    Raises:
        ValueError: an attention that cannot run here.
    """

    source: Path | None = None  # the folder that the weights came from
    files: Any = None  # what folders of this model consist of, where it is not the whole model

    def __init__(self, config: BumblebeeConfig, attention: str = "auto") -> None:
        super().__init__()
        choose(attention, torch.bfloat16)  # refuses early; the true dtype is known only when the model runs, and checked then
        self.config = config
        self.attention = attention
        self.model = self.build_decoder()
        self.lm_head = Head(config.hidden_size, config.vocab_size)
        self.apply(self.init_weights)
        self.tie_weights()

    # -- parts, each to be overridden on its own -----------------------------------------------------------------------

    def build_norm(self) -> nn.Module:
        """The normalisation before attention, before the feed-forward part and before the head."""
        return RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)

    def build_attention(self, layer: int) -> nn.Module:
        """The attention of a layer, called as ``attention(x, rotary, mask, cache)``."""
        c = self.config
        assert c.head_dim is not None
        return Attention(
            c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim,
            bias=c.attention_bias, output_bias=c.attention_output_bias, kernel=self.attention,
        )  # fmt: skip

    def build_ffn(self, layer: int) -> nn.Module:
        """The feed-forward part of a layer."""
        return SwiGLU(self.config.hidden_size, self.config.intermediate_size)

    def build_block(self, layer: int) -> nn.Module:
        """A layer of the parts above."""
        return Block(self.build_norm(), self.build_attention(layer), self.build_norm(), self.build_ffn(layer))

    def build_decoder(self) -> Decoder:
        """All layers with the embedding below and a norm above."""
        c = self.config
        assert c.head_dim is not None
        return Decoder(
            embed_tokens=nn.Embedding(c.vocab_size, c.hidden_size),
            layers=[self.build_block(layer) for layer in range(c.num_hidden_layers)],
            norm=self.build_norm(),
            rotary=RotaryEmbedding(c.head_dim, c.rope_theta, c.rope_scaling),
        )

    def init_weights(self, module: nn.Module) -> None:
        """Normal weights with the config's standard deviation, zero biases. Norms begin at one."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def tie_weights(self) -> None:
        """Make the head use the embedding table where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = cast(nn.Embedding, self.model.embed_tokens).weight

    # -- forward -------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cache: list[Any] | None = None,
        logits_at: Tensor | None = None,
    ) -> Tensor:
        """Logits, or token losses where labels are given.

        Args:
            input_ids: (B, T) int64.
            position_ids: (B, T); None means 0 ... T-1. Without a cache a position of 0 begins a new document, which
                attends to itself alone: that is how several documents share a row.
            labels: (B, T) the token to follow each position, -100 where there is no target. Already shifted: position t's
                label is the token at t + 1.
            cache: one layer cache for each layer, which knows the sequence that each token belongs to; ``position_ids`` are
                then places in these sequences.
            logits_at: (n,) the tokens, as indices into all B * T, whose logits are wanted; the head is not computed elsewhere.

        Returns:
            Logits (B, T, V), or (n, V) with ``logits_at``; with labels, ``-log p(label)`` (B, T) in fp32.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
            mask = AttentionMask()
        else:
            mask = AttentionMask.packed(position_ids) if cache is None else AttentionMask()  # a cache does without
        hidden = self.model(input_ids, position_ids, mask, cache)
        if logits_at is not None:
            hidden = hidden.flatten(0, 1)[logits_at]
        return self.lm_head(hidden, labels)

    # -- folders -------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, max_shard_size: str = "5GB") -> None:
        """Write a model folder: config.json and safetensors shards of at most ``max_shard_size``; with LoRA an adapter folder.

        Raises:
            ValueError: a size that cannot be read.
            OSError: the folder cannot be written; an earlier complete folder stays as it was.
        """
        from bumblebee.checkpoint.folder import files_of, save_model

        save_model(folder, files_of(self), self.state_dict(), max_shard_size)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        attention: str = "auto",
    ) -> Bumblebee:
        """Read a model folder of a supported Hugging Face architecture, or an adapter folder: merged with its base model.

        Args:
            folder: path to config.json and safetensors, or to an adapter.
            dtype: of the weights; None keeps the file's.
            device: where they go.
            attention: as for the constructor.

        Raises:
            ValueError: no model folder, an unsupported architecture or setting, or weights that do not fit the model.
        """
        from bumblebee.checkpoint.folder import load_config, load_weights, parameters_on_meta

        config = load_config(folder)
        with parameters_on_meta():
            model = cls(config, attention=attention)
        load_weights(folder, model, dtype=dtype, device=torch.device(device))
        model.source = Path(folder)
        return model

    def num_parameters(self) -> int:
        """Parameters, a tied embedding counted once."""
        return sum(parameter.numel() for parameter in self.parameters())
