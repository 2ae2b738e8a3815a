"""Sampling: penalties and biases, temperature, then top-k, top-p and min-p. Before ``min_new_tokens``, stop ids are impossible.

The last three act on the tempered distribution, each on what the previous one kept, as in transformers. A token is chosen where
the cumulative probabilities exceed one uniform random number, drawn from the request's own generator, so it does not depend on
the rest of the batch. Tokens are ordered by id, or, where some are cut off, by descending logit (ties by ascending id).

What is kept of a vocabulary is mostly short: a few hundred of the largest logits are examined first, and only rows whose cut is
not among them are examined again with more.

Log-probabilities are the model's own; see logprobs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from bumblebee.inference.request import SampledToken
from bumblebee.inference.sampling.logprobs import check_finite, token_logprobs
from bumblebee.inference.sampling.penalties import Penalties, apply_penalties
from bumblebee.inference.sampling.sampling_params import SamplingParams

GREEDY_TEMPERATURE = 1e-6  # logits divided by less overflow fp32; the most likely token would be drawn anyway
CANDIDATES = (256, 4096)  # number of largest logits to examine first, and then, if the vocabulary is much larger
TILE = 64  # tokens whose probabilities are summed before the cumulative sum
BELOW_ONE = 1 - 2**-53


class SamplerState:
    """Sampler state of one request: its penalties and random generator.

    Args:
        prompt: token ids.
        params: how to sample.
        stop_ids: ids that end the sequence. They are not sampled before ``params.min_new_tokens``.
    """

    def __init__(self, prompt: Sequence[int], params: SamplingParams, stop_ids: Collection[int] = ()) -> None:
        self.params = params
        self.stop_ids = sorted(stop_ids) if params.min_new_tokens else []
        self.num_sampled = 0
        self.penalties = Penalties(prompt, params)
        self.generator = torch.Generator()
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)

    def add(self, token_id: int) -> None:
        """Count a sampled token."""
        self.num_sampled += 1
        self.penalties.add(token_id)

    def excluded_ids(self, vocab_size: int) -> list[int]:
        """Ids that may not be sampled next; never the whole vocabulary."""
        ids = [id for id in self.stop_ids if id < vocab_size] if self.num_sampled < self.params.min_new_tokens else []
        return ids if len(ids) < vocab_size else []

    def uniform(self) -> float:
        """The next random number in [0, 1)."""
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))


def sample(logits: Tensor, states: Sequence[SamplerState]) -> list[SampledToken]:
    """Sample the next token of each of n requests.

    Args:
        logits: (n, V), any floating dtype and device; not modified.
        states: of the n requests; updated.

    Raises:
        FloatingPointError: the maximum of a row is NaN or infinite.
    """
    logits = logits.float()
    check_finite(logits)
    chosen = _choose(_exclude_stops(apply_penalties(logits, [state.penalties for state in states]), states), states)
    tokens = [SampledToken(token_id) for token_id in chosen.tolist()]
    _add_logprobs(tokens, logits, chosen, states)
    for token, state in zip(tokens, states, strict=True):
        state.add(token.id)
    return tokens


def _exclude_stops(logits: Tensor, states: Sequence[SamplerState]) -> Tensor:
    """Make tokens impossible that would end a sequence too early, in logits (n, V). Returns a new tensor if there are any."""
    excluded = [(row, id) for row, state in enumerate(states) for id in state.excluded_ids(logits.shape[-1])]
    if not excluded:
        return logits
    rows, ids = torch.tensor(excluded, device=logits.device).unbind(1)
    return logits.index_put((rows, ids), torch.tensor(-torch.inf, device=logits.device))


# -- choosing a token ----------------------------------------------------------------------------------------------------


def _choose(logits: Tensor, states: Sequence[SamplerState]) -> Tensor:
    """Penalised logits (n, V) -> ids (n,). Rows with the same method are sampled together."""
    groups: dict[Callable[[Tensor, list[SamplerState]], Tensor], list[int]] = {}
    for row, state in enumerate(states):
        groups.setdefault(_method(state.params), []).append(row)
    chosen = torch.empty(len(states), dtype=torch.int64, device=logits.device)
    for method, rows in groups.items():
        group_logits = logits if len(rows) == len(states) else logits[rows]
        chosen[rows] = method(group_logits, [states[row] for row in rows])
    return chosen


def _method(params: SamplingParams) -> Callable[[Tensor, list[SamplerState]], Tensor]:
    if params.temperature < GREEDY_TEMPERATURE:
        return _greedy
    return _sample_truncated if params.top_k or params.top_p < 1 or params.min_p > 0 else _sample_all


def _greedy(logits: Tensor, states: list[SamplerState]) -> Tensor:
    return logits.argmax(dim=-1)


def _sample_all(logits: Tensor, states: list[SamplerState]) -> Tensor:
    """Sample from the whole vocabulary: first a tile of tokens, then a token in the tile."""
    probabilities = _tempered(logits, states).softmax(dim=-1)
    padding = -probabilities.shape[-1] % TILE
    tiles = torch.nn.functional.pad(probabilities, (0, padding)).unflatten(-1, (-1, TILE))
    tile, rest = _pick(tiles.sum(dim=-1).double(), _uniforms(states, logits.device))
    inside = tiles[torch.arange(len(tiles), device=logits.device), tile]
    return tile * TILE + _pick(inside.double(), rest)[0]


def _sample_truncated(logits: Tensor, states: list[SamplerState]) -> Tensor:
    """Sample from what top-k, top-p and min-p keep."""
    logits = _tempered(logits, states)
    total = (logits - logits.amax(dim=-1, keepdim=True)).exp().sum(dim=-1, keepdim=True)
    limits = torch.tensor([_limits(state.params, logits.shape[-1]) for state in states], dtype=torch.float64)
    limits = torch.cat([limits.to(logits.device), total], dim=1)
    counts = [count for count in CANDIDATES if 8 * count <= logits.shape[-1]]
    return _draw(logits, limits, _uniforms(states, logits.device), [*counts, logits.shape[-1]])


def _limits(params: SamplingParams, vocab_size: int) -> tuple[float, float, float]:
    return params.top_k if 0 < params.top_k < vocab_size else torch.inf, params.top_p, params.min_p


def _draw(logits: Tensor, limits: Tensor, uniforms: Tensor, counts: list[int]) -> Tensor:
    """Draw ids (m,) from what is kept of logits (m, V).

    Args:
        logits: tempered.
        limits: see ``_num_kept``.
        uniforms: (m,) fp64 random numbers.
        counts: number of largest logits to examine first, and then, for rows whose cut is not among them; the last one is V.
    """
    ordered, ids = _largest(logits, counts[0])
    weights = (ordered - ordered[:, :1]).double().exp()
    kept = _num_kept(weights, limits)
    last = ordered.gather(1, kept[:, None] - 1)
    # Ties of the last kept logit may be missing here, and the sum of what top-k keeps may be unknown.
    certain = (last[:, 0] > ordered[:, -1]) & ((limits[:, 0] <= counts[0]) | limits[:, 0].isinf())
    ranks = torch.arange(ordered.shape[1], device=logits.device)
    chosen = ids.gather(1, _pick(weights * (ranks < kept[:, None]), uniforms)[0][:, None])[:, 0]
    if len(counts) > 1 and not certain.all():
        again = ~certain
        chosen[again] = _draw(logits[again], limits[again], uniforms[again], counts[1:])
    return chosen


def _largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest logits of each row in descending order and their ids, (m, count) each; ties by ascending id."""
    if count == logits.shape[-1]:
        return logits.sort(dim=-1, descending=True, stable=True)
    ids = logits.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
    ordered, order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return ordered, ids.gather(1, order)


def _num_kept(weights: Tensor, limits: Tensor) -> Tensor:
    """Number of tokens that top-k, top-p and min-p keep.

    Args:
        weights: (m, count), descending: probabilities relative to the most likely token's.
        limits: (m, 4): top-k, top-p, min-p, and the sum of the weights over the whole vocabulary.

    Returns:
        (m,), at least 1.
    """
    top_k, top_p, min_p, total = limits[:, :, None].unbind(1)
    ranks = torch.arange(weights.shape[1], device=weights.device)
    in_top_k = ranks < top_k
    before = weights.cumsum(dim=-1) - weights
    # top-p is relative to what top-k kept, whose sum is known here.
    mass = torch.where(top_k < torch.inf, (weights * in_top_k).sum(dim=-1, keepdim=True), total)
    keep = in_top_k & ((before < top_p * mass) | (top_p == 1)) & (weights >= min_p)
    return keep.sum(dim=-1).clamp(min=1)


def _pick(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulative weights exceed a fraction of their sum.

    Args:
        weights: (m, K) fp64, not negative, with a positive sum.
        uniforms: (m,) fp64 in [0, 1).

    Returns:
        Indices (m,) of nonzero weights, and how far into its weight each number points, again in [0, 1).
    """
    sums = weights.cumsum(dim=-1)
    target = uniforms[:, None] * sums[:, -1:]  # less than the sum, also when rounded
    index = torch.searchsorted(sums, target, right=True)
    weight = weights.gather(1, index)
    rest = (target - sums.gather(1, index) + weight) / weight
    return index[:, 0], rest[:, 0].clamp(0, BELOW_ONE)


def _tempered(logits: Tensor, states: list[SamplerState]) -> Tensor:
    temperatures = [state.params.temperature for state in states]
    if all(temperature == 1 for temperature in temperatures):
        return logits
    return logits / torch.tensor(temperatures, dtype=logits.dtype, device=logits.device)[:, None]


def _uniforms(states: list[SamplerState], device: torch.device) -> Tensor:
    return torch.tensor([state.uniform() for state in states], dtype=torch.float64).to(device)


# -- log-probabilities ---------------------------------------------------------------------------------------------------


def _add_logprobs(tokens: list[SampledToken], logits: Tensor, chosen: Tensor, states: Sequence[SamplerState]) -> None:
    """Set the model's log-probabilities on the tokens of requests that ask for them."""
    counts = {row: state.params.logprobs for row, state in enumerate(states) if state.params.logprobs is not None}
    if not counts:
        return
    rows = list(counts)
    logits = logits if len(rows) == len(tokens) else logits[rows]
    for row, (logprob, top) in zip(rows, token_logprobs(logits, chosen[rows], list(counts.values())), strict=True):
        tokens[row].logprob, tokens[row].top = logprob, top
