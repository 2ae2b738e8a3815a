"""From logits to the next token: penalties, temperature, then top-k, top-p and min-p on the tempered distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from bumblebee.inference.params import SamplingParams

NEARLY_ZERO = 1e-6  # logits divided by less overflow fp32; the most likely token would be drawn anyway


def sample(logits: Tensor, seen: list[int], params: SamplingParams, generator: torch.Generator) -> int:
    """The next token of one sequence.

    Args:
        logits: (V,), any floating dtype and device.
        seen: ids of the prompt and of what was generated so far.
        params: how to choose.
        generator: the request's own, on the CPU.
    """
    logits = logits.float().cpu()
    if params.repetition_penalty != 1.0:
        logits = penalise(logits, seen, params.repetition_penalty)
    if params.temperature < NEARLY_ZERO:
        return int(logits.argmax())
    logits = truncate(logits / params.temperature, params)
    return int(torch.multinomial(logits.softmax(dim=-1), 1, generator=generator))


def penalise(logits: Tensor, seen: list[int], penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of seen ids by the penalty (CTRL, arXiv 1909.05858)."""
    ids = torch.tensor(sorted(set(seen)), dtype=torch.int64)
    result = logits.clone()
    result[ids] = torch.where(logits[ids] > 0, logits[ids] / penalty, logits[ids] * penalty)
    return result


def truncate(logits: Tensor, params: SamplingParams) -> Tensor:
    """Minus infinity for all but the tokens that top-k, top-p and min-p keep; the most likely token always stays."""
    ordered, order = logits.sort(descending=True)
    probabilities = ordered.softmax(dim=-1)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if params.top_k:
        keep[params.top_k :] = False
    if params.top_p < 1:
        kept = torch.where(keep, probabilities, torch.zeros(())) / probabilities[keep].sum()
        keep &= kept.cumsum(dim=-1) - kept < params.top_p  # what comes before a token must not reach p
    if params.min_p > 0:
        keep &= probabilities >= params.min_p * probabilities[0]
    keep[0] = True
    return logits.scatter(0, order, ordered.masked_fill(~keep, float("-inf")))
