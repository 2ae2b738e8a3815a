"""Model configuration: one dataclass with Hugging Face's field names, and presets of published sizes.

``BumblebeeConfig.preset("0.5b", num_hidden_layers=4)`` starts from a preset and overrides fields. Conversion from and to the
config.json of each model family is in ``bumblebee/checkpoint/families/``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

from bumblebee.utils.formatting import hint

# rope_type -> (required, optional) parameters, as in Hugging Face's config.json
ROPE_TYPES: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
}
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2")
NORMS = ("rmsnorm", "layernorm")
BALANCES = ("sequence", "batch")
EXPERT_FIELDS = (
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "n_shared_experts", "shared_expert_gate",
    "decoder_sparse_step", "mlp_only_layers", "router_balance_loss", "router_aux_loss_coef", "router_z_loss_coef",
    "router_bias_update_rate",
)  # fmt: skip
LAYER_TYPES = FULL, SLIDING = ("full_attention", "sliding_attention")


class TransformerConfig(Protocol):
    """The dimensions of a transformer under Hugging Face's names. BumblebeeConfig has them, and so have other configs."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int


def head_width(config: TransformerConfig) -> int:
    """Width of a head; configs of Hugging Face may leave out ``head_dim``."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@dataclass
class BumblebeeConfig:
    """Hyperparameters that determine a model's weights and computation.

    Args:
        vocab_size: rows of the embedding table; at least the tokenizer's size.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP's inner layer.
        num_hidden_layers: number of transformer layers.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key-value heads, shared by groups of query heads (GQA, arXiv 2305.13245).
        head_dim: width of a head; None means hidden_size / num_attention_heads.
        max_position_embeddings: context length in tokens.
        rope_theta: base of the rotary frequencies (arXiv 2104.09864).
        rope_scaling: None, or a dict with "rope_type" and its parameters as in Hugging Face's config.json: linear, dynamic,
            yarn or llama3 (see ``bumblebee/nn/rope.py``).
        partial_rotary_factor: fraction of each head that is rotated; the rest carries no position.
        rope_interleaved: rotate adjacent pairs (x[2i], x[2i+1]), as in GLM, instead of pairs half a head apart.
        qk_norm: normalize each query and key head before rotation (arXiv 2302.05442), as in Qwen3.
        sliding_window: number of positions that a token attends to, its own included (arXiv 2004.05150), as in Mistral; None
            for full attention.
        layer_types: "sliding_attention" or "full_attention" for each layer; None applies the sliding window, if any, to all.
        hidden_act: activation of the MLP: silu, gelu, gelu_new or gelu_pytorch_tanh (tanh approximation), relu or relu2.
        mlp_gated: the MLP is ``down(act(gate(x)) * up(x))``, SwiGLU with silu; otherwise ``down(act(up(x)))``.
        mlp_bias: add biases to the MLP.
        norm: rmsnorm (arXiv 1910.07467) or layernorm (arXiv 1607.06450), throughout the model.
        rms_norm_eps: epsilon of the norms.
        post_norms: also normalize the output of attention and MLP before the residual addition, as in GLM-4.
        tie_word_embeddings: share the embedding table with the output head.
        attention_bias: add biases to the query, key and value projections, as in Qwen2.
        attention_output_bias: add a bias to the output projection of attention too, as in Llama with ``attention_bias``.
        attention_dropout: dropout probability of attention weights.
        residual_dropout: dropout probability of the outputs of attention and MLP.
        embedding_dropout: dropout probability of the token embeddings.
        initializer_range: standard deviation of the initial weights, which are normally distributed.
        num_experts: number of routed experts in a sparse layer (mixture of experts); 0 or null for a dense model.
        num_experts_per_tok: number of routed experts that each token uses.
        moe_intermediate_size: width of the inner layer of one expert; None means intermediate_size.
        norm_topk_prob: scale the weights of a token's experts to sum to one.
        n_shared_experts: number of experts that every token uses in addition; 0 for none.
        shared_expert_gate: scale the output of the shared experts by a gate per token, as in Qwen2-MoE.
        decoder_sparse_step: every n-th layer is sparse, starting with layer n - 1; all others have a dense SwiGLU.
        mlp_only_layers: indices, from 0, of further dense layers; [0] for a dense first layer, as in DeepSeekMoE.
        router_balance_loss: compute the balance loss per "sequence" or per "batch" (see ``bumblebee/nn/router_losses.py``).
        router_aux_loss_coef: weight of the balance loss of each layer; 0 disables it.
        router_z_loss_coef: weight of the router z-loss of each layer; 0 disables it.
        router_bias_update_rate: step size of a bias that balances the selection of experts, updated after each optimizer step;
            0 keeps the bias constant, None has no bias.
        bos_token_id: id that begins a text, or None.
        eos_token_id: id, or ids, that end a text.
        pad_token_id: id that pads a batch; never a target.
        score_head: the head scores texts instead of predicting tokens, as in a reward model.
        architecture: the Hugging Face architecture that a folder was loaded as and is saved as, if several compute the same
            function; None selects the first.
        model_class: class path of the Bumblebee subclass that computes the model, set by the subclass; None is Bumblebee.
        extra: free-form settings of such a subclass.

    Raises:
        ValueError: values that are out of range or inconsistent; the message names them.
    """

    vocab_size: int = 151936
    hidden_size: int = 896
    intermediate_size: int = 4864
    num_hidden_layers: int = 24
    num_attention_heads: int = 14
    num_key_value_heads: int = 2
    head_dim: int | None = None
    max_position_embeddings: int = 32768
    rope_theta: float = 1_000_000.0
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: float = 1.0
    rope_interleaved: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    hidden_act: str = "silu"
    mlp_gated: bool = True
    mlp_bias: bool = False
    norm: str = "rmsnorm"
    rms_norm_eps: float = 1e-6
    post_norms: bool = False
    tie_word_embeddings: bool = True
    attention_bias: bool = True
    attention_output_bias: bool = False
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0
    initializer_range: float = 0.02
    num_experts: int | None = 0
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool = True
    n_shared_experts: int = 0
    shared_expert_gate: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None
    router_balance_loss: str = "sequence"
    router_aux_loss_coef: float = 0.001
    router_z_loss_coef: float = 0.0
    router_bias_update_rate: float | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    score_head: bool = False
    architecture: str | None = None
    model_class: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        positive = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "num_key_value_heads", "max_position_embeddings")  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}:"
                    " change one of them or set head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if not 0 < self.partial_rotary_factor <= 1:
            raise ValueError(f"partial_rotary_factor must be in (0, 1], got {self.partial_rotary_factor}")
        if self.rotary_dim % 2 or self.rotary_dim < 2:
            part = "" if self.partial_rotary_factor == 1 else f" times partial_rotary_factor {self.partial_rotary_factor}"
            raise ValueError(f"head_dim {self.head_dim}{part} must be even: rotary embeddings rotate pairs of dimensions")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of"
                f" num_key_value_heads {self.num_key_value_heads}"
            )
        if self.attention_output_bias and not self.attention_bias:
            raise ValueError("attention_output_bias requires attention_bias: no model family has only the output bias")
        for name, known in {"hidden_act": ACTIVATIONS, "norm": NORMS}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; available: {', '.join(known)}")
        for name in ("attention_dropout", "residual_dropout", "embedding_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        self._check_windows()
        if self.rope_scaling is not None:
            self._check_rope_scaling(self.rope_scaling)
            self.rope_scaling = None if self.rope_scaling["rope_type"] == "default" else self.rope_scaling
        if not self.num_experts:  # reset the unused fields, so that equal models have equal configs
            for name in EXPERT_FIELDS:
                setattr(self, name, getattr(BumblebeeConfig, name))
        else:
            self.moe_intermediate_size = self.moe_intermediate_size or self.intermediate_size
            self.mlp_only_layers = sorted(self.mlp_only_layers or [])
            self._check_experts()

    def _check_windows(self) -> None:
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1, got {self.sliding_window}")
        if self.layer_types is None:
            return
        if unknown := sorted(set(self.layer_types) - set(LAYER_TYPES)):
            raise ValueError(f"layer_types has {', '.join(unknown)}; available: {', '.join(LAYER_TYPES)}")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types names {len(self.layer_types)} layers, num_hidden_layers is {self.num_hidden_layers}")
        if SLIDING in self.layer_types and self.sliding_window is None:
            raise ValueError("layer_types has sliding_attention, but sliding_window is not set")
        if SLIDING not in self.layer_types:
            self.sliding_window = None
        if len(set(self.layer_types)) == 1:  # normalize, since configs are compared
            self.layer_types = None

    def window_of(self, layer: int) -> int | None:
        """Sliding window of a layer in positions, the token's own included; None for full attention."""
        return self.sliding_window if self.layer_types is None or self.layer_types[layer] == SLIDING else None

    @staticmethod
    def _check_rope_scaling(scaling: Mapping[str, object]) -> None:
        kind = scaling.get("rope_type")
        if not isinstance(kind, str) or kind not in ROPE_TYPES:
            raise ValueError(f"rope_scaling has rope_type {kind!r}; available: {', '.join(ROPE_TYPES)}")
        needed, optional = ROPE_TYPES[kind]
        if missing := sorted(needed - set(scaling)):
            raise ValueError(f"rope_scaling of rope_type {kind!r} requires {', '.join(missing)}")
        if unknown := sorted(set(scaling) - needed - optional - {"rope_type"}):
            raise ValueError(f"rope_scaling of rope_type {kind!r} does not support {', '.join(unknown)}")
        for name in needed:
            value = scaling[name]
            if not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"rope_scaling: {name} must be a positive number, got {value!r}")

    @property
    def rotary_dim(self) -> int:
        """Number of rotated dimensions of a head."""
        assert self.head_dim is not None
        return int(self.head_dim * self.partial_rotary_factor)

    def _check_experts(self) -> None:
        """Validate the mixture-of-experts fields.

        Raises:
            ValueError: a value out of range, or no sparse layer.
        """
        least = {"num_experts": 1, "decoder_sparse_step": 1, "n_shared_experts": 0, "router_aux_loss_coef": 0,
                 "router_z_loss_coef": 0, "router_bias_update_rate": 0, "moe_intermediate_size": 1}  # fmt: skip
        for name, bound in least.items():
            if (value := getattr(self, name)) is not None and not value >= bound:
                raise ValueError(f"{name} must be at least {bound}, got {value}")
        if not 1 <= self.num_experts_per_tok <= (self.num_experts or 0):
            raise ValueError(
                f"num_experts_per_tok must be at least 1 and at most num_experts, {self.num_experts};"
                f" got {self.num_experts_per_tok}"
            )
        if self.mlp_bias or not self.mlp_gated:
            raise ValueError("num_experts requires mlp_gated true and mlp_bias false: experts are gated MLPs without biases")
        if self.hidden_act != "silu":
            raise ValueError("num_experts requires hidden_act silu: experts are SwiGLUs without biases")
        if self.router_balance_loss not in BALANCES:
            raise ValueError(f"router_balance_loss must be {' or '.join(BALANCES)}, got {self.router_balance_loss!r}")
        if self.shared_expert_gate and not self.n_shared_experts:
            raise ValueError("shared_expert_gate requires n_shared_experts: there is no shared expert to scale")
        if not any(map(self.is_sparse, range(self.num_hidden_layers))):
            raise ValueError(
                f"num_experts is {self.num_experts}, but none of the {self.num_hidden_layers} layers is sparse with"
                f" decoder_sparse_step {self.decoder_sparse_step} and mlp_only_layers {self.mlp_only_layers}"
            )

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer, counted from 0, is a mixture of experts (Qwen3-MoE's pattern)."""
        dense = self.mlp_only_layers or []
        return bool(self.num_experts) and layer not in dense and (layer + 1) % self.decoder_sparse_step == 0

    @property
    def eos_token_ids(self) -> list[int]:
        """Ids that end a text, as a list."""
        if self.eos_token_id is None:
            return []
        return [self.eos_token_id] if isinstance(self.eos_token_id, int) else list(self.eos_token_id)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> BumblebeeConfig:
        """Return the config of a published size (``0.5b`` ... ``72b``), ``tiny`` or ``tiny-moe``, with overrides.

        Raises:
            ValueError: unknown preset or field; the message suggests similar names.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; available: {', '.join(PRESETS)}")
        known = [each.name for each in fields(cls)]
        for key in changes:
            if key not in known:
                raise ValueError(f"unknown field {key!r}{hint(key, known)}")
        return cls(**{**PRESETS[name], **changes})

    def to_dict(self) -> dict[str, object]:
        """Return the fields as a plain dict."""
        return asdict(self)


def _size(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, tied: bool, vocabulary: int
) -> dict[str, float]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
        "vocab_size": vocabulary,
    }


# Qwen2.5 (arXiv 2412.15115, table 1), Qwen3-30B-A3B (arXiv 2505.09388, table 2; 3.3 B active parameters), and two sizes for
# experiments: tiny (about 5 M parameters) and tiny-moe (13 M, 5 M active).
PRESETS: dict[str, dict[str, float]] = {
    "tiny": _size(256, 704, 5, 4, 2, True, 4096) | {"max_position_embeddings": 1024, "rope_theta": 10_000.0},
    "tiny-moe": _size(256, 704, 5, 4, 2, True, 4096)  # the shape of Qwen3-MoE, so that transformers loads it
    | {
        "qk_norm": True,
        "attention_bias": False,
        "max_position_embeddings": 1024,
        "rope_theta": 10_000.0,
        "num_experts": 8,
        "moe_intermediate_size": 352,
        "router_aux_loss_coef": 0.01,
        "router_z_loss_coef": 0.001,
    },
    "0.5b": _size(896, 4864, 24, 14, 2, True, 151936),
    "1.5b": _size(1536, 8960, 28, 12, 2, True, 151936),
    "3b": _size(2048, 11008, 36, 16, 2, True, 151936),
    "7b": _size(3584, 18944, 28, 28, 4, False, 152064),
    "14b": _size(5120, 13824, 48, 40, 8, False, 152064),
    "30b-a3b": _size(2048, 6144, 48, 32, 4, False, 151936)
    | {
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "qk_norm": True,
        "attention_bias": False,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "32b": _size(5120, 27648, 64, 40, 8, False, 152064),
    "72b": _size(8192, 29568, 80, 64, 8, False, 152064),
}
