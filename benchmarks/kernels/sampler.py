"""Choosing the next token of B requests from logits (B, V).

    python -m benchmarks.kernels.sampler [--device cuda] [--dtype bf16] [--sizes BxV ...]

All variants sample with temperature 0.8, top-k 50 and top-p 0.95. They draw with different random numbers, so what is compared
is the tokens that can be drawn: a token outside of the formula's set is an error. Bound by reading the logits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.kernels.harness import Case, dimensions, main
from bumblebee.inference.sampling.sampler import SamplerState, sample
from bumblebee.inference.sampling.sampling_params import SamplingParams

SIZES = {"cpu": ["16x32768", "16x151936"], "cuda": ["64x151936"]}
TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.95


def allowed(logits: Tensor) -> Tensor:
    """(B, V) bool: the smallest set of the most likely tokens that holds ``TOP_P``, of at most ``TOP_K``."""
    ordered, indices = (logits.double() / TEMPERATURE).sort(-1, descending=True)
    ordered[:, TOP_K:] = float("-inf")
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    kept = (before < TOP_P) & (ordered > float("-inf"))
    return torch.zeros_like(kept).scatter(1, indices, kept)


def sorted_sampling(logits: Tensor) -> Tensor:
    """As it is usually written: sort the vocabulary, cut, draw."""
    scores, indices = (logits.float() / TEMPERATURE).sort(-1, descending=True)
    scores[:, TOP_K:] = float("-inf")
    p = scores.softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p >= TOP_P, 0.0)
    return indices.gather(1, torch.multinomial(p, 1))


def top_k_sampling(logits: Tensor) -> Tensor:
    """Sort the k largest only."""
    scores, indices = (logits.float() / TEMPERATURE).topk(TOP_K, -1)
    p = scores.softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p >= TOP_P, 0.0)
    return indices.gather(1, torch.multinomial(p, 1))


def cases(device: torch.device, dtype: torch.dtype, size: str) -> Iterator[Case]:
    rows, vocabulary = dimensions(size, "BxV")
    ranks = torch.stack([torch.randperm(vocabulary) for _ in range(rows)]).to(device)
    logits = (-1.8 * (ranks + 1).log()).to(dtype)  # about as in a trained model
    params = [SamplingParams(temperature=TEMPERATURE, top_k=TOP_K, top_p=TOP_P, seed=row) for row in range(rows)]
    states = [SamplerState([0], each) for each in params]
    permitted = allowed(logits)

    def bumblebee(logits: Tensor) -> Tensor:
        return torch.tensor([[token.id] for token in sample(logits, states)], device=device)

    def checked(variant):
        """1 for every token that may be drawn: the whole must equal the formula's ones."""
        return lambda logits: permitted.gather(1, variant(logits)).float()

    variants = {"sort": sorted_sampling, "top-k, then sort": top_k_sampling, "bumblebee": bumblebee}
    ones = torch.ones(rows, 1, device=device, dtype=torch.float64)
    yield Case(size, (logits,), lambda _: ones, {name: checked(each) for name, each in variants.items()}, bytes=logits.nbytes)


if __name__ == "__main__":
    sys.exit(main("sampler (requests x vocabulary)", cases, SIZES))
