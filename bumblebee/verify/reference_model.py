"""Reference model: what a BumblebeeConfig means, as formulas in fp64, written without any module of ``bumblebee/nn``.

It reads a model's tensors by their names (Hugging Face's) and is slow on purpose: scores of all positions are materialized, and
every expert processes every token.

Shapes: B rows, T positions, H query heads, K key-value heads, D head dimension, E experts, k experts per token, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from bumblebee.config import BumblebeeConfig

Weights = Mapping[str, Tensor]


class Routing(NamedTuple):
    """Router of one sparse layer."""

    logits: Tensor  # (B, T, E)
    experts: Tensor  # (B, T, k) int64
    margin: float  # smallest difference between a selected and a rejected expert's score


class Output(NamedTuple):
    """Result of a forward pass."""

    logits: Tensor  # (B, T, V)
    routings: list[Routing]  # of the sparse layers


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_new": lambda x: x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_pytorch_tanh": lambda x: x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x * (x > 0),
    "relu2": lambda x: x**2 * (x > 0),
}


def expected_shapes(c: BumblebeeConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that a config asks for; a tied head has none of its own."""
    assert c.head_dim is not None
    width, head, kv_width = c.hidden_size, c.head_dim, c.num_key_value_heads * c.head_dim
    q_width = c.num_attention_heads * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, width)}
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, width)
    norm = {"weight": ..., "bias": ...} if c.norm == "layernorm" else {"weight": ...}
    norms = {"model.norm": width}
    for index in range(c.num_hidden_layers):
        layer = f"model.layers.{index}"
        norms |= dict.fromkeys((f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"), width)
        if c.post_norms:
            norms |= dict.fromkeys((f"{layer}.post_self_attn_layernorm", f"{layer}.post_mlp_layernorm"), width)
        if c.qk_norm:
            norms |= dict.fromkeys((f"{layer}.self_attn.q_norm", f"{layer}.self_attn.k_norm"), head)
        for name, outputs in {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width}.items():
            shapes |= _linear_shapes(f"{layer}.self_attn.{name}", outputs, width, c.attention_bias)
        shapes |= _linear_shapes(f"{layer}.self_attn.o_proj", width, q_width, c.attention_output_bias)
        shapes |= _sparse_shapes(f"{layer}.mlp", c) if c.is_sparse(index) else _dense_shapes(f"{layer}.mlp", c)
    return shapes | {f"{name}.{part}": (size,) for name, size in norms.items() for part in norm}


def _linear_shapes(name: str, outputs: int, inputs: int, bias: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def _dense_shapes(name: str, c: BumblebeeConfig, inner: int | None = None) -> dict[str, tuple[int, ...]]:
    inner, width = inner or c.intermediate_size, c.hidden_size
    shapes = _linear_shapes(f"{name}.gate_proj", inner, width, c.mlp_bias) if c.mlp_gated else {}
    shapes |= _linear_shapes(f"{name}.up_proj", inner, width, c.mlp_bias)
    return shapes | _linear_shapes(f"{name}.down_proj", width, inner, c.mlp_bias)


def _sparse_shapes(name: str, c: BumblebeeConfig) -> dict[str, tuple[int, ...]]:
    inner, width, count = c.moe_intermediate_size or 0, c.hidden_size, c.num_experts or 0
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.gate.weight": (count, width),
        f"{name}.experts.gate_up_proj": (count, 2 * inner, width),
        f"{name}.experts.down_proj": (count, width, inner),
    }
    if c.n_shared_experts:
        shapes |= _dense_shapes(f"{name}.shared_experts", c, c.n_shared_experts * inner)
    if c.shared_expert_gate:
        shapes[f"{name}.shared_expert_gate.weight"] = (1, width)
    return shapes


# -- forward -----------------------------------------------------------------------------------------------------------


def forward(weights: Weights, c: BumblebeeConfig, input_ids: Tensor, position_ids: Tensor) -> Output:
    """Compute the logits of rows of documents, each of which begins at position 0 and attends to itself only.

    Args:
        weights: parameters and buffers in fp64, by name.
        c: what the model computes.
        input_ids: (B, T) int64.
        position_ids: (B, T) int64.
    """
    routings: list[Routing] = []
    x = weights["model.embed_tokens.weight"][input_ids]
    angles, factor = _angles(c, position_ids)
    for index in range(c.num_hidden_layers):
        layer = f"model.layers.{index}"
        visible = _visible(position_ids, c.window_of(index))
        branch = _attention(
            weights, c, f"{layer}.self_attn", _norm(weights, c, f"{layer}.input_layernorm", x), angles, factor, visible
        )
        x = x + (_norm(weights, c, f"{layer}.post_self_attn_layernorm", branch) if c.post_norms else branch)
        inputs = _norm(weights, c, f"{layer}.post_attention_layernorm", x)
        if c.is_sparse(index):
            branch, routing = _experts(weights, c, f"{layer}.mlp", inputs)
            routings.append(routing)
        else:
            branch = _mlp(weights, c, f"{layer}.mlp", inputs)
        x = x + (_norm(weights, c, f"{layer}.post_mlp_layernorm", branch) if c.post_norms else branch)
    head = weights["model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"]
    return Output(_norm(weights, c, "model.norm", x) @ head.T, routings)


def _norm(weights: Weights, c: BumblebeeConfig, name: str, x: Tensor) -> Tensor:
    if c.norm == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    scaled = x / torch.sqrt((x**2).mean(-1, keepdim=True) + c.rms_norm_eps) * weights[f"{name}.weight"]
    return scaled + weights[f"{name}.bias"] if c.norm == "layernorm" else scaled


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    product = x @ weights[f"{name}.weight"].T
    return product + weights[f"{name}.bias"] if f"{name}.bias" in weights else product


def _visible(position_ids: Tensor, window: int | None) -> Tensor:
    """(B, T, T): whether a query, the second index, attends to a key."""
    document = (position_ids == 0).cumsum(1)
    index = torch.arange(position_ids.shape[1], device=position_ids.device)
    distance = index[:, None] - index
    in_reach = (distance >= 0) & (distance < (window or len(index)))
    return in_reach & (document[:, :, None] == document[:, None, :])


def _attention(
    weights: Weights, c: BumblebeeConfig, name: str, x: Tensor, angles: Tensor, factor: float, visible: Tensor
) -> Tensor:
    q, k, v = (_linear(weights, f"{name}.{part}_proj", x).unflatten(-1, (-1, c.head_dim)) for part in "qkv")
    if c.qk_norm:
        q, k = _norm(weights, c, f"{name}.q_norm", q), _norm(weights, c, f"{name}.k_norm", k)
    q, k = (_rotate(part, angles, factor, c.rope_interleaved) for part in (q, k))
    group = c.num_attention_heads // c.num_key_value_heads
    heads = []
    for head in range(c.num_attention_heads):
        scores = q[:, :, head] @ k[:, :, head // group].transpose(1, 2) / math.sqrt(q.shape[-1])
        heads.append(scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v[:, :, head // group])
    return _linear(weights, f"{name}.o_proj", torch.cat(heads, dim=-1))


def _mlp(weights: Weights, c: BumblebeeConfig, name: str, x: Tensor) -> Tensor:
    act, up = ACTIVATIONS[c.hidden_act], _linear(weights, f"{name}.up_proj", x)
    return _linear(weights, f"{name}.down_proj", act(_linear(weights, f"{name}.gate_proj", x)) * up if c.mlp_gated else act(up))


def _experts(weights: Weights, c: BumblebeeConfig, name: str, x: Tensor) -> tuple[Tensor, Routing]:
    logits = x @ weights[f"{name}.gate.weight"].T
    probabilities = logits.softmax(-1)
    scores = (probabilities + weights.get(f"{name}.gate.e_score_correction_bias", torch.zeros(()).to(x))).detach()
    ranked = scores.sort(-1, descending=True)
    experts, k = ranked.indices[..., : c.num_experts_per_tok], c.num_experts_per_tok
    margin = float((ranked.values[..., k - 1] - ranked.values[..., k]).min()) if k < scores.shape[-1] else math.inf
    chosen = torch.zeros_like(probabilities).scatter(-1, experts, 1.0) * probabilities
    if c.norm_topk_prob:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    gate, up = torch.einsum("btd,eid->btei", x, weights[f"{name}.experts.gate_up_proj"]).chunk(2, dim=-1)
    outputs = torch.einsum("btei,edi->bted", ACTIVATIONS[c.hidden_act](gate) * up, weights[f"{name}.experts.down_proj"])
    y = (outputs * chosen[..., None]).sum(2)
    if c.n_shared_experts:
        shared = _mlp(weights, c, f"{name}.shared_experts", x)
        y = y + (torch.sigmoid(_linear(weights, f"{name}.shared_expert_gate", x)) * shared if c.shared_expert_gate else shared)
    return y, Routing(logits, experts, margin)


# -- rotary embeddings -------------------------------------------------------------------------------------------------


def _rotate(x: Tensor, angles: Tensor, factor: float, interleaved: bool) -> Tensor:
    """Multiply pairs of dimensions, as complex numbers, by ``factor * exp(i angle)``. ``x``: (B, T, heads, D)."""
    pairs = angles.shape[-1]
    rotated, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    layout = (pairs, 2) if interleaved else (2, pairs)
    axis = -1 if interleaved else -2
    real, imaginary = rotated.unflatten(-1, layout).unbind(axis)
    turned = torch.complex(real, imaginary) * torch.polar(torch.full_like(angles, factor), angles)[:, :, None]
    return torch.cat((torch.stack((turned.real, turned.imag), dim=axis).flatten(-2), rest), dim=-1)


def _angles(c: BumblebeeConfig, position_ids: Tensor) -> tuple[Tensor, float]:
    """Angles (B, T, pairs) and the factor of the rotated queries and keys."""
    longest = int(position_ids.max()) + 1
    base, scaling, pairs = c.rope_theta, c.rope_scaling or {}, c.rotary_dim // 2
    if scaling.get("rope_type") == "dynamic" and longest > c.max_position_embeddings:
        growth = scaling["factor"] * longest / c.max_position_embeddings - (scaling["factor"] - 1)
        base *= growth ** (2 * pairs / (2 * pairs - 2))
    frequencies = [base ** (-pair / pairs) for pair in range(pairs)]
    frequencies, factor = _scaled(frequencies, c)
    return position_ids[..., None] * torch.tensor(frequencies, dtype=torch.float64, device=position_ids.device), factor


def _scaled(frequencies: list[float], c: BumblebeeConfig) -> tuple[list[float], float]:
    """Frequencies after ``rope_scaling``, and the attention factor."""
    scaling = c.rope_scaling or {}
    kind = scaling.get("rope_type")
    if kind == "linear":
        return [frequency / scaling["factor"] for frequency in frequencies], 1.0
    if kind == "llama3":
        return [_llama3(frequency, **_without_type(scaling)) for frequency in frequencies], 1.0
    if kind == "yarn":
        return _yarn(frequencies, c.rope_theta, scaling)
    return frequencies, 1.0


def _without_type(scaling: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in scaling.items() if name != "rope_type"}


def _llama3(
    frequency: float, factor: float, low_freq_factor: float, high_freq_factor: float, original_max_position_embeddings: float
) -> float:
    """Llama 3.1: keep what rotates often within the original context, divide what rotates rarely, interpolate in between."""
    rotations = original_max_position_embeddings * frequency / (2 * math.pi)
    if rotations > high_freq_factor:
        return frequency
    if rotations < low_freq_factor:
        return frequency / factor
    share = (rotations - low_freq_factor) / (high_freq_factor - low_freq_factor)
    return (1 - share) * frequency / factor + share * frequency


def _yarn(frequencies: list[float], theta: float, scaling: Mapping[str, float]) -> tuple[list[float], float]:
    """YaRN (arXiv 2309.00071, sections 3.2 to 3.4) with the names and defaults of Hugging Face."""
    dim, original, factor = 2 * len(frequencies), scaling["original_max_position_embeddings"], scaling["factor"]
    bounds = [
        dim / 2 * math.log(original / (2 * math.pi * (scaling.get(name) or default)), theta)
        for name, default in (("beta_fast", 32), ("beta_slow", 1))
    ]
    if scaling.get("truncate", True):
        bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
    low, high = max(bounds[0], 0), min(bounds[1], dim - 1)
    high += 0.001 * (low == high)
    shares = [min(max((pair - low) / (high - low), 0), 1) for pair in range(len(frequencies))]
    scaled = [f / factor * share + f * (1 - share) for f, share in zip(frequencies, shares, strict=True)]
    if scaling.get("attention_factor") is not None:
        return scaled, scaling["attention_factor"]
    temperature = [0.1 * (scaling.get(name) or 0) * math.log(max(factor, 1)) + 1 for name in ("mscale", "mscale_all_dim")]
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return scaled, temperature[0] / temperature[1]
    return scaled, 0.1 * math.log(max(factor, 1)) + 1


# -- losses ------------------------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of ``-log softmax(logits)[label]`` over the labels that are not negative."""
    rows, columns = (labels >= 0).nonzero(as_tuple=True)
    chosen = logits[rows, columns]
    return (chosen.logsumexp(-1) - chosen[torch.arange(len(rows)), labels[rows, columns]]).mean()


def router_loss(c: BumblebeeConfig, routings: list[Routing], counted: Tensor) -> Tensor:
    """The auxiliary loss of all sparse layers. ``counted``: (B, T), which positions are tokens and not padding."""
    total = torch.zeros((), dtype=torch.float64, device=counted.device)
    for routing in routings:
        groups = [(routing.logits[row][counted[row]], routing.experts[row][counted[row]]) for row in range(len(counted))]
        groups = [group for group in groups if len(group[0])]
        if c.router_balance_loss == "batch":
            groups = [(torch.cat([logits for logits, _ in groups]), torch.cat([experts for _, experts in groups]))]
        balance = torch.stack([_balance(*group, c) for group in groups]).mean()
        z = (routing.logits[counted].logsumexp(-1) ** 2).mean()
        total = total + c.router_aux_loss_coef * balance + c.router_z_loss_coef * z
    return total


def _balance(logits: Tensor, experts: Tensor, c: BumblebeeConfig) -> Tensor:
    """``E * sum over experts of (share of selections) * (mean probability)`` over tokens (tokens, E)."""
    share = torch.stack([(experts == expert).sum() for expert in range(c.num_experts or 0)]) / experts.numel()
    return (c.num_experts or 0) * (share * logits.softmax(-1).mean(0)).sum()
