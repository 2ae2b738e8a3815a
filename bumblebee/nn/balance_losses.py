"""What keeps experts evenly used, and routers' logits small: losses of one layer.

Shapes: B sequences, T positions, E experts, k of them for each token. ``counted`` (B, T) says which positions are tokens:
padding has no part in anything. All numbers are fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_balance(logits: Tensor, experts: Tensor, counted: Tensor) -> Tensor:
    """How unevenly each sequence uses the experts: 1 where evenly, E / k at most in practice.

        sum over e of  f_e P_e       f_e = E / (k T) * number of the tokens that chose e
                                     P_e = mean of softmax(logits)_e over the sequence's T tokens

    (DeepSeekMoE, arXiv 2401.06066, equations 12 to 14; DeepSeek-V2, arXiv 2405.04434, equations 23 to 25.) f has no gradient.
    With all tokens of a batch as one sequence and k = 1 it is the loss of Switch (arXiv 2101.03961, equations 4 to 6).

    Args:
        logits: (B, T, E) of the router.
        experts: (B, T, k) int64, the chosen ones.
        counted: (B, T) bool.

    Returns:
        (B,), zero for a sequence without tokens.
    """
    tokens = counted.sum(1, keepdim=True).clamp(min=1)
    shares = loads(experts, counted, logits.shape[-1]) * logits.shape[-1] / (experts.shape[-1] * tokens)
    probabilities = (logits.softmax(-1) * counted[..., None]).sum(1) / tokens
    return (shares * probabilities).sum(-1)


def batch_balance(logits: Tensor, experts: Tensor, counted: Tensor) -> Tensor:
    """The same with all tokens of the batch as one sequence: a scalar."""
    return sequence_balance(logits.flatten(0, 1)[None], experts.flatten(0, 1)[None], counted.flatten()[None])[0]


def z_loss(logits: Tensor, counted: Tensor) -> Tensor:
    """``logsumexp(logits)^2`` of each token (ST-MoE, arXiv 2202.08906, equation 5): (B, T), zero where not counted."""
    return logits.logsumexp(-1).square() * counted


def loads(experts: Tensor, counted: Tensor, num_experts: int) -> Tensor:
    """How many tokens of each sequence chose each expert: (B, E) in fp32."""
    chosen = counted[..., None].expand_as(experts).flatten(1).float()
    return torch.zeros(len(experts), num_experts, device=experts.device).scatter_add_(1, experts.flatten(1), chosen)


def entropy(logits: Tensor, counted: Tensor) -> Tensor:
    """Entropy of each token's softmax(logits) in nats: (B, T), zero where not counted."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1) * counted
