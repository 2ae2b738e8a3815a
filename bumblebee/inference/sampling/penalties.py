"""Penalties and logit biases. Stored per token id, never as a tensor over the vocabulary.

Applied in this order. The repetition penalty of CTRL (arXiv 1909.05858) over the ids of prompt and completion, as in
transformers: a positive logit is divided by it, a negative one multiplied. The presence and frequency penalties of the OpenAI
API, over the completion alone: ``logit - count * frequency_penalty - (count > 0) * presence_penalty``. The logit bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bumblebee.inference.sampling.sampling_params import SamplingParams

MAX_LOGIT = 1e30  # bound of penalised logits: they stay finite with a repetition penalty or temperature near zero


class Penalties:
    """Penalty state of one request: each penalised id once, with the number of times that it was generated.

    Args:
        prompt: token ids.
        params: of the request.
    """

    def __init__(self, prompt: Sequence[int], params: SamplingParams) -> None:
        self.repetition, self.presence = params.repetition_penalty, params.presence_penalty
        self.frequency = params.frequency_penalty
        self.enabled = self.repetition != 1 or self.presence != 0 or self.frequency != 0
        ids = sorted(set(prompt)) if self.repetition != 1 else []
        self._index = {token_id: index for index, token_id in enumerate(ids)}
        self._ids = torch.tensor(ids, dtype=torch.int64)
        self._counts = torch.zeros(len(ids))
        self.bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.int64)
        self.biases = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)

    def add(self, token_id: int) -> None:
        """Count a generated token."""
        if not self.enabled:
            return
        index = self._index.setdefault(token_id, len(self._index))
        if index == len(self._ids):  # double the capacity: amortised constant time per token
            growth = max(64, index)
            self._ids = torch.cat([self._ids, torch.zeros(growth, dtype=torch.int64)])
            self._counts = torch.cat([self._counts, torch.zeros(growth)])
        self._ids[index] = token_id
        self._counts[index] += 1

    @property
    def ids(self) -> Tensor:
        """Penalised token ids, (m,) int64."""
        return self._ids[: len(self._index)]

    @property
    def counts(self) -> Tensor:
        """How often each of ``ids`` was generated, (m,) fp32; 0 for an id of the prompt only."""
        return self._counts[: len(self._index)]


def apply_penalties(logits: Tensor, requests: Sequence[Penalties]) -> Tensor:
    """Apply penalties and biases to the logits (n, V), fp32, of n requests. Returns a new tensor if any apply."""
    penalised = [row for row, request in enumerate(requests) if request.enabled and len(request.ids)]
    biased = [row for row, request in enumerate(requests) if len(request.biases)]
    if penalised or biased:
        logits = logits.clone()
    if penalised:
        _penalise_(logits, penalised, [requests[row] for row in penalised])
    if biased:
        rows, ids = _indices(biased, [requests[row].bias_ids for row in biased], logits.device)
        logits[rows, ids] += _move(torch.cat([requests[row].biases for row in biased]), logits.device)
    return logits


def _penalise_(logits: Tensor, rows: list[int], requests: list[Penalties]) -> None:
    """Apply the three penalties in place."""
    sizes = torch.tensor([len(request.ids) for request in requests])
    penalties = torch.tensor([[request.repetition, request.frequency, request.presence] for request in requests])
    repetition, frequency, presence = _move(penalties.repeat_interleave(sizes, dim=0), logits.device).unbind(1)
    counts = _move(torch.cat([request.counts for request in requests]), logits.device)
    indices = _indices(rows, [request.ids for request in requests], logits.device)
    values = logits[indices]
    values = torch.where(values > 0, values / repetition, values * repetition).clamp(-MAX_LOGIT, MAX_LOGIT)
    logits[indices] = values - counts * frequency - (counts > 0) * presence


def _indices(rows: list[int], ids: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column indices of all ids of these rows."""
    sizes = torch.tensor([len(row_ids) for row_ids in ids])
    return _move(torch.tensor(rows).repeat_interleave(sizes), device), _move(torch.cat(ids), device)


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device without waiting for it."""
    return tensor.to(device, non_blocking=True)
