"""Penalties and biases: what is added to single logits before anything is chosen. Kept by id, never as a table of all ids.

In this order: the repetition penalty of CTRL (arXiv 1909.05858) over the ids of the prompt and of the new tokens, as in
transformers: a positive logit is divided by it, a negative one multiplied. Presence and frequency penalty as in OpenAI's
interface, over the new tokens alone: ``logit - count * frequency_penalty - (count > 0) * presence_penalty``. The logit bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bumblebee.inference.sampling_params import SamplingParams

LARGEST = 1e30  # what a repetition penalty near zero may make of a logit: it stays finite, also over a small temperature


class Penalties:
    """What the penalties of one request look at: each id once, with how often it was generated.

    Args:
        prompt: ids.
        params: of the request.
    """

    def __init__(self, prompt: Sequence[int], params: SamplingParams) -> None:
        self.repetition, self.presence = params.repetition_penalty, params.presence_penalty
        self.frequency = params.frequency_penalty
        self.watching = self.repetition != 1 or self.presence != 0 or self.frequency != 0
        ids = sorted(set(prompt)) if self.repetition != 1 else []
        self._places = {index: place for place, index in enumerate(ids)}
        self._ids = torch.tensor(ids, dtype=torch.int64)
        self._counts = torch.zeros(len(ids))
        self.bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.int64)
        self.biases = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)

    def add(self, token_id: int) -> None:
        """A token was generated."""
        if not self.watching:
            return
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):  # twice the room, so that a long answer does not copy it again and again
            room = max(64, place)
            self._ids = torch.cat([self._ids, torch.zeros(room, dtype=torch.int64)])
            self._counts = torch.cat([self._counts, torch.zeros(room)])
        self._ids[place] = token_id
        self._counts[place] += 1

    @property
    def ids(self) -> Tensor:
        """The ids that are there, (m,) int64."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> Tensor:
        """How often each of ``ids`` was generated, (m,) fp32; 0 for one that only the prompt has."""
        return self._counts[: len(self._places)]


def penalise(logits: Tensor, requests: Sequence[Penalties]) -> Tensor:
    """Logits (n, V), fp32, of n requests with their penalties and biases: a new tensor where there are any."""
    watching = [row for row, request in enumerate(requests) if request.watching and len(request.ids)]
    biased = [row for row, request in enumerate(requests) if len(request.biases)]
    if watching or biased:
        logits = logits.clone()
    if watching:
        _subtract(logits, watching, [requests[row] for row in watching])
    if biased:
        rows, ids = _entries(biased, [requests[row].bias_ids for row in biased], logits.device)
        logits[rows, ids] += torch.cat([requests[row].biases for row in biased]).to(logits.device)
    return logits


def _subtract(logits: Tensor, rows: list[int], requests: list[Penalties]) -> None:
    """The three penalties, in place."""
    sizes = torch.tensor([len(request.ids) for request in requests])
    options = torch.tensor([[request.repetition, request.frequency, request.presence] for request in requests])
    repetition, frequency, presence = options.repeat_interleave(sizes, dim=0).to(logits.device).unbind(1)
    counts = torch.cat([request.counts for request in requests]).to(logits.device)
    at = _entries(rows, [request.ids for request in requests], logits.device)
    values = logits[at]
    values = torch.where(values > 0, values / repetition, values * repetition).clamp(-LARGEST, LARGEST)
    logits[at] = values - counts * frequency - (counts > 0) * presence


def _entries(rows: list[int], ids: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of every id of these rows."""
    sizes = torch.tensor([len(each) for each in ids])
    return torch.tensor(rows).repeat_interleave(sizes).to(device), torch.cat(ids).to(device)
