"""Bumblebee: a decoder-only transformer, assembled from the parts in ``bumblebee/nn``.

    tokens -> embedding -> [ x + attention(norm(x)) -> x + ffn(norm(x)) ] * layers -> norm -> head -> logits

Choices: RMSNorm before each part, rotary positions, grouped-query attention, SwiGLU, no dropout, embedding and head tied for
small sizes. What else there is stands in ``bumblebee/config.py``. Modules and state-dict keys have Hugging Face's names.
Research changes one part: override one of the ``build_`` methods in a subclass (docs/research.md).
Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bumblebee.config import BumblebeeConfig
from bumblebee.models.base import LanguageModel
from bumblebee.models.custom_class import class_for, path_of
from bumblebee.nn.attention import Attention, LayerCache
from bumblebee.nn.attention_kernels import AttentionMask, choose
from bumblebee.nn.lm_head import Head
from bumblebee.nn.mlp import GatedFFN, PlainFFN
from bumblebee.nn.moe import Experts, MixtureOfExperts, Router, mixture
from bumblebee.nn.norm import NORMS
from bumblebee.nn.rope import rotary_embedding
from bumblebee.nn.router_losses import RouterLosses


class Block(nn.Module):
    """One layer, made of parts that are handed to it.

    Args:
        input_layernorm: before attention.
        self_attn: called as ``attention(x, rotary, mask, cache)``.
        post_attention_layernorm: before the feed-forward part.
        mlp: the feed-forward part.
        post_self_attn_layernorm: behind attention; None for none.
        post_mlp_layernorm: behind the feed-forward part; None for none.
        dropout: on what is added to the stream, in training.
    """

    def __init__(
        self,
        input_layernorm: nn.Module,
        self_attn: nn.Module,
        post_attention_layernorm: nn.Module,
        mlp: nn.Module,
        post_self_attn_layernorm: nn.Module | None = None,
        post_mlp_layernorm: nn.Module | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.input_layernorm = input_layernorm
        self.self_attn = self_attn
        self.post_self_attn_layernorm = post_self_attn_layernorm or nn.Identity()
        self.post_attention_layernorm = post_attention_layernorm
        self.mlp = mlp
        self.post_mlp_layernorm = post_mlp_layernorm or nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: AttentionMask, cache: LayerCache | None = None
    ) -> Tensor:
        """(B, T, hidden_size) -> (B, T, hidden_size)."""
        attended = self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        x = x + self.dropout(self.post_self_attn_layernorm(attended))
        return x + self.dropout(self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(x))))


class Decoder(nn.Module):
    """Everything below the head: embedding, blocks, last norm. Its name in a state dict is ``model``.

    Args:
        embed_tokens: token ids (B, T) -> (B, T, hidden_size).
        layers: the blocks.
        norm: behind the last of them.
        rotary: position ids (B, T) -> what attention turns queries and keys by; None to turn nothing.
        positions: position ids (B, T) -> (B, T, hidden_size), added to the embedded tokens; None for nothing.
        dropout: on what goes into the first block, in training.
    """

    def __init__(
        self,
        embed_tokens: nn.Module,
        layers: list[nn.Module],
        norm: nn.Module,
        rotary: nn.Module | None,
        positions: nn.Module | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.positions = positions
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.rotary = rotary
        self.checkpoint_every = 0  # activations are computed again in every n-th block; 0 in none

    def forward(self, input_ids: Tensor, position_ids: Tensor, mask: AttentionMask, cache: list[Any] | None = None) -> Tensor:
        """``input_ids``, ``position_ids``: (B, T) -> hidden states (B, T, hidden_size)."""
        x = self.embed_tokens(input_ids)
        x = self.dropout(x if self.positions is None else x + self.positions(position_ids))
        rotary = None if self.rotary is None else self.rotary(position_ids)
        for index, layer in enumerate(self.layers):
            if self.checkpoint_every and index % self.checkpoint_every == 0 and cache is None and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotary, mask, use_reentrant=False)
            else:
                x = layer(x, rotary, mask, None if cache is None else cache[index])
        return self.norm(x)


class Bumblebee(LanguageModel):
    """The language model.

    Args:
        config: its shape; a dict of BumblebeeConfig's fields in a recipe.
        attention: ``auto``, ``flash``, ``sdpa`` or ``naive`` (see ``bumblebee/nn/attention_kernels.py``).

    Raises:
        ValueError: an attention that cannot run here.
    """

    def __init__(self, config: BumblebeeConfig, attention: str = "auto") -> None:
        super().__init__()
        choose(attention, torch.bfloat16)  # refuses early; the true dtype is known only when the model runs, and checked then
        # A subclass computes something else: its folders say so.
        self.config = config if type(self) is Bumblebee else replace(config, model_class=path_of(type(self)))
        self.attention = attention
        self.model = self.build_decoder()
        self.lm_head = self.build_head()
        self.apply(self.init_weights)
        self.tie_weights()

    # -- parts, each to be overridden on its own -----------------------------------------------------------------------

    def build_norm(self) -> nn.Module:
        """The normalisation before attention, before the feed-forward part and before the head."""
        return NORMS[self.config.norm](self.config.hidden_size, eps=self.config.rms_norm_eps)

    def build_head_norm(self) -> nn.Module | None:
        """The normalisation of each query or key head; None for none."""
        c = self.config
        return NORMS[c.norm](c.head_dim, eps=c.rms_norm_eps) if c.qk_norm else None

    def build_attention(self, layer: int) -> nn.Module:
        """The attention of a layer, called as ``attention(x, rotary, mask, cache)``."""
        c = self.config
        assert c.head_dim is not None
        return Attention(
            c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim,
            bias=c.attention_bias, output_bias=c.attention_output_bias, kernel=self.attention,
            q_norm=self.build_head_norm(), k_norm=self.build_head_norm(), interleaved=c.rope_interleaved,
            window=c.window_of(layer), dropout=c.attention_dropout,
        )  # fmt: skip

    def build_ffn(self, layer: int) -> nn.Module:
        """The feed-forward part of a layer, or a mixture of experts where the config says so."""
        c = self.config
        if c.is_sparse(layer):
            return mixture(
                c.hidden_size, c.moe_intermediate_size or c.intermediate_size, c.num_experts or 0, c.num_experts_per_tok,
                normalise=c.norm_topk_prob, bias=c.router_bias_update_rate is not None, activation=c.hidden_act,
                n_shared_experts=c.n_shared_experts, shared_expert_gate=c.shared_expert_gate,
            )  # fmt: skip
        return (GatedFFN if c.mlp_gated else PlainFFN)(c.hidden_size, c.intermediate_size, c.hidden_act, bias=c.mlp_bias)

    def build_block(self, layer: int) -> nn.Module:
        """A layer of the parts above."""
        c = self.config
        return Block(
            self.build_norm(), self.build_attention(layer), self.build_norm(), self.build_ffn(layer),
            post_self_attn_layernorm=self.build_norm() if c.post_norms else None,
            post_mlp_layernorm=self.build_norm() if c.post_norms else None,
            dropout=c.residual_dropout,
        )  # fmt: skip

    def build_rotary(self) -> nn.Module | None:
        """Position ids (B, T) -> what attention turns queries and keys by: cosines and sines. None turns nothing."""
        c = self.config
        return rotary_embedding(c.rotary_dim, c.rope_theta, c.rope_scaling, c.max_position_embeddings)

    def build_positions(self) -> nn.Module | None:
        """Position ids (B, T) -> (B, T, hidden_size), added to the embedded tokens. None, as here, adds nothing."""
        return None

    def build_head(self) -> nn.Module:
        """Hidden states -> logits, or token losses where it is called with labels."""
        return Head(self.config.hidden_size, self.config.vocab_size)

    def build_decoder(self) -> Decoder:
        """All layers with the embedding below and a norm above."""
        c = self.config
        return Decoder(
            embed_tokens=nn.Embedding(c.vocab_size, c.hidden_size),
            layers=[self.build_block(layer) for layer in range(c.num_hidden_layers)],
            norm=self.build_norm(),
            rotary=self.build_rotary(),
            positions=self.build_positions(),
            dropout=c.embedding_dropout,
        )

    def init_weights(self, module: nn.Module) -> None:
        """Normal weights with the config's standard deviation, zero biases. Norms begin at one."""
        if isinstance(module, nn.Linear | nn.Embedding | Router):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, Experts):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def tie_weights(self) -> None:
        """Make the head use the embedding table where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = cast(nn.Embedding, self.model.embed_tokens).weight

    def auxiliary_losses(self) -> RouterLosses | None:
        """What the model adds to any task's loss: the losses of its routers; None without any."""
        c, layers = self.config, [module for module in self.modules() if isinstance(module, MixtureOfExperts)]
        if not layers:
            return None
        return RouterLosses(
            layers, c.router_balance_loss, c.router_aux_loss_coef, c.router_z_loss_coef, c.router_bias_update_rate
        )

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

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        attention: str = "auto",
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
    ) -> Bumblebee:
        """Read a model folder of a supported Hugging Face architecture, or an adapter folder: merged with its base model.

        Args:
            folder: path to config.json and safetensors, or to an adapter.
            dtype: of the weights; None keeps the file's.
            device: where they go.
            attention: as for the constructor.
            trust_remote_code: a folder that was written by a subclass names it: import that class, which runs its code.
            allow_pickle: read pytorch_model.bin where there are no safetensors: tensors alone, no code of theirs is run.

        Raises:
            ValueError: no model folder, an unsupported architecture or setting, weights that do not fit the model, or a
                subclass's folder where its class may not be imported.
        """
        from bumblebee.checkpoint.hf_folder import load_config, load_weights, parameters_on_meta

        config = load_config(folder)
        with parameters_on_meta():
            model = class_for(cls, folder, config, trust_remote_code)(config, attention=attention)
        load_weights(folder, model, dtype=dtype, device=torch.device(device), allow_pickle=allow_pickle)
        model.source = Path(folder)
        return model

    @property
    def blocks(self) -> list[nn.Module]:
        """Its layers, in order."""
        return list(self.model.layers)

    def checkpoint_activations(self, every: int) -> None:
        """Compute every n-th block again in the backward pass (arXiv 1604.06174)."""
        self.model.checkpoint_every = every
