"""Bumblebee: a decoder-only transformer, assembled from the building blocks in ``bumblebee/nn``.

    tokens -> embedding -> [ x + attention(norm(x)) -> x + mlp(norm(x)) ] * layers -> norm -> lm_head -> logits

Design choices (the defaults; ``bumblebee/config.py`` has the alternatives):

- pre-norm residual blocks with RMSNorm
- rotary position embeddings
- grouped-query attention, with biases on q, k and v as in Qwen2
- SwiGLU feed-forward layers, optionally a mixture of experts
- no dropout
- embedding and head tied for small sizes

Module names and state-dict keys are Hugging Face's. To change one part, override a ``build_`` method in a subclass
(docs/research.md). Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from bumblebee.checkpoint.hf_folder import load_config
from bumblebee.checkpoint.weight_loader import load_weights
from bumblebee.config import BumblebeeConfig
from bumblebee.hardware.cuda import configure_cuda
from bumblebee.models.base import LanguageModel, class_path_of, resolve_model_class
from bumblebee.models.load_context import meta_parameters
from bumblebee.nn.attention import Attention, LayerCache
from bumblebee.nn.attention_kernels import AttentionMask, select_kernel, varlen_supports
from bumblebee.nn.block_forward import is_compiled
from bumblebee.nn.lm_head import LMHead
from bumblebee.nn.mlp import MLP, GatedMLP
from bumblebee.nn.moe import Experts, MixtureOfExperts, Router, mixture_of_experts
from bumblebee.nn.norm import NORMS
from bumblebee.nn.rope import rotary_embedding
from bumblebee.nn.router_losses import RouterLosses
from bumblebee.nn.score_head import ScoreHead


class Block(nn.Module):
    """One transformer layer, composed of the modules passed to it.

    Args:
        input_layernorm: norm before attention.
        self_attn: called as ``attention(x, rotary, mask, cache)``.
        post_attention_layernorm: norm before the MLP.
        mlp: the feed-forward layer.
        post_self_attn_layernorm: norm after attention; None for no norm.
        post_mlp_layernorm: norm after the MLP; None for no norm.
        dropout: dropout probability of both residual branches, in training.
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
    """Everything below the head: embedding, blocks and final norm. Its prefix in a state dict is ``model``.

    Args:
        embed_tokens: token ids (B, T) -> (B, T, hidden_size).
        layers: the blocks.
        norm: norm after the last block.
        rotary: position ids (B, T) -> rotary cosines and sines for attention; None for no rotary embedding.
        positions: position ids (B, T) -> (B, T, hidden_size), added to the token embeddings; None for no position embedding.
        dropout: dropout probability of the embeddings, in training.
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

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, mask: AttentionMask, cache: Sequence[LayerCache] | None = None
    ) -> Tensor:
        """``input_ids`` and ``position_ids`` (B, T) -> hidden states (B, T, hidden_size)."""
        x = self.embed_tokens(input_ids)
        x = self.dropout(x if self.positions is None else x + self.positions(position_ids))
        rotary = None if self.rotary is None else self.rotary(position_ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, rotary, mask, None if cache is None else cache[index])
        return self.norm(x)


class Bumblebee(LanguageModel):
    """A decoder-only language model.

    Args:
        config: shape of the model; in a recipe, a dict of BumblebeeConfig's fields.
        attention: ``auto``, ``flash``, ``varlen``, ``sdpa`` or ``naive`` (see ``bumblebee/nn/attention_kernels.py``).

    Raises:
        ValueError: the attention kernel cannot run on this machine.
    """

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Reject overrides under a former name, which would be ignored silently."""
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "build_ffn"):
            raise TypeError(f"{cls.__qualname__}.build_ffn is never called: the method was renamed to build_mlp")

    def __init__(self, config: BumblebeeConfig, attention: str = "auto") -> None:
        super().__init__()
        select_kernel(attention, None)  # fails early; checked again in forward, where the dtype is known
        # A subclass computes something else, so its class path is saved in config.json.
        self.config = config if type(self) is Bumblebee else replace(config, model_class=class_path_of(type(self)))
        self.attention = attention
        self.model = self.build_decoder()
        if config.score_head:
            self.score = ScoreHead(config.hidden_size, config.initializer_range)
        else:
            self.lm_head = self.build_head()
        self.apply(self.init_weights)
        self.tie_weights()

    # -- builders, each of which a subclass can override -----------------------------------------------------------------------

    def build_norm(self) -> nn.Module:
        """Norm before attention, before the MLP and before the head."""
        return NORMS[self.config.norm](self.config.hidden_size, eps=self.config.rms_norm_eps)

    def build_head_norm(self) -> nn.Module | None:
        """Norm of each query or key head (QK-norm); None for no norm."""
        c = self.config
        return NORMS[c.norm](c.head_dim, eps=c.rms_norm_eps) if c.qk_norm else None

    def build_attention(self, layer: int) -> nn.Module:
        """Attention of a layer, called as ``attention(x, rotary, mask, cache)``."""
        c = self.config
        assert c.head_dim is not None
        return Attention(
            c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim,
            bias=c.attention_bias, output_bias=c.attention_output_bias, kernel=self.attention,
            q_norm=self.build_head_norm(), k_norm=self.build_head_norm(), interleaved=c.rope_interleaved,
            window=c.window_of(layer), dropout=c.attention_dropout,
        )  # fmt: skip

    def build_mlp(self, layer: int) -> nn.Module:
        """Feed-forward layer: gated or plain MLP, or a mixture of experts in sparse layers."""
        c = self.config
        if c.is_sparse(layer):
            return mixture_of_experts(
                c.hidden_size, c.moe_intermediate_size or c.intermediate_size, c.num_experts or 0, c.num_experts_per_tok,
                normalise=c.norm_topk_prob, bias=c.router_bias_update_rate is not None, activation=c.hidden_act,
                n_shared_experts=c.n_shared_experts, shared_expert_gate=c.shared_expert_gate,
            )  # fmt: skip
        return (GatedMLP if c.mlp_gated else MLP)(c.hidden_size, c.intermediate_size, c.hidden_act, bias=c.mlp_bias)

    def build_block(self, layer: int) -> nn.Module:
        """One transformer layer from the modules above."""
        c = self.config
        return Block(
            self.build_norm(), self.build_attention(layer), self.build_norm(), self.build_mlp(layer),
            post_self_attn_layernorm=self.build_norm() if c.post_norms else None,
            post_mlp_layernorm=self.build_norm() if c.post_norms else None,
            dropout=c.residual_dropout,
        )  # fmt: skip

    def build_rotary(self) -> nn.Module | None:
        """Module from position ids (B, T) to rotary cosines and sines; None for no rotary embedding."""
        c = self.config
        return rotary_embedding(c.rotary_dim, c.rope_theta, c.rope_scaling, c.max_position_embeddings)

    def build_positions(self) -> nn.Module | None:
        """Module from position ids (B, T) to (B, T, hidden_size), added to the token embeddings; None by default."""
        return None

    def build_head(self) -> nn.Module:
        """Module from hidden states to logits, or to token losses if called with labels."""
        return LMHead(self.config.hidden_size, self.config.vocab_size)

    def build_decoder(self) -> Decoder:
        """Embedding, all layers and the final norm."""
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
        """Initialize a module: weights from N(0, initializer_range^2), biases zero. Norm weights stay one."""
        if isinstance(module, nn.Linear | nn.Embedding | Router):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, Experts):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def tie_weights(self) -> None:
        """Share the embedding table with the head if ``tie_word_embeddings`` is set."""
        if self.config.tie_word_embeddings and not self.config.score_head:
            self.lm_head.weight = cast(nn.Embedding, self.model.embed_tokens).weight

    def become_reward_model(self) -> None:
        """Replace the language-modeling head by a new one that scores texts, in place. A reward model is left unchanged."""
        if self.config.score_head:
            return
        weight = next(self.model.parameters())
        del self.lm_head
        self.config = replace(self.config, score_head=True)
        self.score = ScoreHead(self.config.hidden_size, self.config.initializer_range).to(weight.device, weight.dtype)

    def auxiliary_losses(self) -> RouterLosses | None:
        """Loss terms that the model adds to any task: the router losses of MoE layers; None without MoE layers."""
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
        cache: Sequence[LayerCache] | None = None,
        logits_at: Tensor | None = None,
    ) -> Tensor:
        """Return logits, or token losses if labels are passed.

        Args:
            input_ids: (B, T) int64.
            position_ids: (B, T); None means 0 ... T-1. Without a cache, position 0 begins a new document that attends only to
                itself: this is how several documents are packed into a row.
            labels: (B, T) next token of each position, -100 without a target. Already shifted: the label of position t is the
                token at t + 1.
            cache: one LayerCache per layer, which knows the sequence of each token; ``position_ids`` are then positions in
                these sequences.
            logits_at: (n,) indices into the B * T tokens; the head is computed only for these.

        Returns:
            Logits (B, T, V), or (n, V) with ``logits_at``. With labels, ``-log p(label)`` (B, T) in fp32. A reward model
            returns scores (B, T, 1) or (n, 1) in fp32, and takes no labels.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
            mask = AttentionMask()
        else:
            mask = AttentionMask.packed(position_ids) if cache is None else AttentionMask()  # a cache ignores the mask
        if cache is None and any(map(is_compiled, self.blocks)):
            self._prepare(mask, input_ids)
        hidden = self.model(input_ids, position_ids, mask, cache)
        if logits_at is not None:
            hidden = hidden.flatten(0, 1)[logits_at]
        head = self.score if self.config.score_head else self.lm_head
        return head(hidden, labels)

    def _prepare(self, mask: AttentionMask, input_ids: Tensor) -> None:
        """Build what attention reads from the mask before the first layer, which would else be compiled to build it."""
        c, device = self.config, input_ids.device
        dtype = next(self.parameters()).dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        kernel = select_kernel(self.attention, dtype)
        assert c.head_dim is not None
        if kernel in ("varlen", "flash3") and not varlen_supports(c.head_dim, c.attention_dropout if self.training else 0.0):
            kernel = "sdpa"
        mask.prepare(kernel, input_ids.shape[1], device, {c.window_of(layer) for layer in range(c.num_hidden_layers)})

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
        """Load a model folder of a supported Hugging Face architecture, or an adapter folder merged with its base model.

        Args:
            folder: path to config.json and safetensors files, or to an adapter.
            dtype: dtype of the weights; None keeps the dtype of the files.
            device: device of the weights.
            attention: as for the constructor.
            trust_remote_code: import the subclass that config.json names, which runs its code.
            allow_pickle: read pytorch_model.bin if there are no safetensors files. Only tensors are unpickled.

        Raises:
            ValueError: not a model folder, an unsupported architecture or setting, weights that do not match the model, or a
                subclass that may not be imported.
        """
        config = load_config(folder)
        with meta_parameters():
            model = resolve_model_class(cls, folder, config, trust_remote_code)(config, attention=attention)
        configure_cuda(device)
        load_weights(folder, model, dtype=dtype, device=torch.device(device), allow_pickle=allow_pickle)
        model.source = Path(folder)
        return model

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer layers, in order."""
        return list(self.model.layers)
