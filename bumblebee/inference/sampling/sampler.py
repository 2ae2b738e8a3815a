"""Sampling: penalties and biases, temperature, then top-k, top-p and min-p. Before ``min_new_tokens``, stop ids are impossible.

The last three act on the tempered distribution, each on what the previous one kept, as in transformers. A token is chosen where
the cumulative probabilities exceed one uniform random number, drawn from the request's own generator, so it does not depend on
the rest of the batch. Tokens are ordered by id, or, where some are cut off, by descending logit (ties by ascending id).

What is kept of a vocabulary is mostly short: a few hundred of the largest logits are examined first, and only rows whose cut is
not among them are examined again with more. Which ones these are is read together with the tokens, so that the host waits for a
GPU once, and again only for such rows.

Log-probabilities are the model's own; see logprobs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from bumblebee.inference.request import SampledToken
from bumblebee.inference.sampling.logprobs import are_finite, check_finite, parse_logprobs, token_logprobs
from bumblebee.inference.sampling.penalties import Penalties, apply_penalties
from bumblebee.inference.sampling.sampling_params import SamplingParams
from bumblebee.inference.transfers import read_back, upload

GREEDY_TEMPERATURE = 1e-6  # logits divided by less overflow fp32; the most likely token would be drawn anyway
CANDIDATES = (256, 4096)  # number of largest logits to examine first, and then, if the vocabulary is much larger
TILE = 64  # tokens whose probabilities are summed before the cumulative sum
BELOW_ONE = 1 - 2**-53

# (logits (m, V), params and random numbers of the rows, attempt) -> ids (m,), and whether they are certain (m,)
Method = Callable[[Tensor, list[SamplingParams], list[float], int], tuple[Tensor, Tensor]]


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
    sampling = Sampling(logits, states)
    (values,) = read_back(sampling.tensors)
    return sampling.tokens(values)


class Sampling:
    """The next tokens of n requests. The host waits for nothing before it reads ``tensors``.

    Args:
        logits: (n, V), any floating dtype and device; not modified.
        states: of the n requests; updated by ``tokens``.
    """

    def __init__(self, logits: Tensor, states: Sequence[SamplerState]) -> None:
        self.states, logits = states, logits.float()
        penalised = _exclude_stops(apply_penalties(logits, [state.penalties for state in states]), states)
        uniforms = [0.0 if _method(state.params) is _greedy else state.uniform() for state in states]
        self._draw = _Draw(logits, penalised, [state.params for state in states], uniforms)
        self.tensors = [are_finite(logits), *self._draw.tensors]

    def tokens(self, values: Sequence[Sequence[float]]) -> list[SampledToken]:
        """The tokens, from the values of ``tensors``.

        Raises:
            FloatingPointError: the maximum of a row is NaN or infinite.
        """
        check_finite(values[0])
        tokens = self._draw.tokens(values[1:])
        for token, state in zip(tokens, self.states, strict=True):
            state.add(token.id)
        return tokens


class _Draw:
    """Tokens drawn from n rows of logits, with log-probabilities where they are requested.

    Args:
        logits: (n, V), the model's own.
        penalised: (n, V), from which tokens are drawn.
        params: of each row.
        uniforms: random numbers in [0, 1), one of each row.
        attempt: how often rows have been drawn with too few candidates.
    """

    def __init__(
        self, logits: Tensor, penalised: Tensor, params: list[SamplingParams], uniforms: list[float], attempt: int = 0
    ) -> None:
        self.logits, self.penalised, self.params, self.uniforms = logits, penalised, params, uniforms
        self.attempt = attempt
        chosen, certain = _choose(penalised, params, uniforms, attempt)
        self.tensors = [chosen, certain]
        self.with_logprobs = [row for row, its in enumerate(params) if its.logprobs is not None]
        if self.with_logprobs:
            ids = _take(chosen, self.with_logprobs)
            count = max(params[row].logprobs or 0 for row in self.with_logprobs)
            self.tensors += token_logprobs(_take(logits, self.with_logprobs), ids, count)

    def tokens(self, values: Sequence[Sequence[float]]) -> list[SampledToken]:
        """The tokens, from the values of ``tensors``. Rows whose cut was not among the candidates are drawn again."""
        tokens = [SampledToken(int(id)) for id in values[0]]
        if self.with_logprobs:
            counts = [self.params[row].logprobs or 0 for row in self.with_logprobs]
            for row, (logprob, top) in zip(self.with_logprobs, parse_logprobs(values[2:], counts), strict=True):
                tokens[row].logprob, tokens[row].top = logprob, top
        if uncertain := [row for row, certain in enumerate(values[1]) if not certain]:
            for row, token in zip(uncertain, self._again(uncertain), strict=True):
                tokens[row] = token
        return tokens

    def _again(self, rows: list[int]) -> list[SampledToken]:
        draw = _Draw(
            _take(self.logits, rows), _take(self.penalised, rows), [self.params[row] for row in rows],
            [self.uniforms[row] for row in rows], self.attempt + 1,
        )  # fmt: skip
        (values,) = read_back(draw.tensors)
        return draw.tokens(values)


def _exclude_stops(logits: Tensor, states: Sequence[SamplerState]) -> Tensor:
    """Make tokens impossible that would end a sequence too early, in logits (n, V). Returns a new tensor if there are any."""
    excluded = [(row, id) for row, state in enumerate(states) for id in state.excluded_ids(logits.shape[-1])]
    if not excluded:
        return logits
    rows, ids = upload(excluded, logits.device).unbind(1)
    return logits.index_put((rows, ids), logits.new_full((), -torch.inf))


def _take(tensor: Tensor, rows: list[int]) -> Tensor:
    """Some rows of a tensor (n, ...); the tensor itself if they are all of them."""
    return tensor if len(rows) == len(tensor) else tensor.index_select(0, upload(rows, tensor.device))


# -- choosing a token ----------------------------------------------------------------------------------------------------


def _choose(logits: Tensor, params: list[SamplingParams], uniforms: list[float], attempt: int) -> tuple[Tensor, Tensor]:
    """Penalised logits (n, V) -> ids (n,), and whether they are certain (n,). A method samples all of its rows together."""
    groups: dict[Method, list[int]] = {}
    for row, its in enumerate(params):
        groups.setdefault(_method(its), []).append(row)
    if len(groups) == 1:
        return next(iter(groups))(logits, params, uniforms, attempt)
    chosen = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    certain = torch.empty(len(params), dtype=torch.bool, device=logits.device)
    for method, rows in groups.items():
        index = upload(rows, logits.device)
        of_rows = [params[row] for row in rows], [uniforms[row] for row in rows]
        ids, are_certain = method(logits.index_select(0, index), *of_rows, attempt)
        chosen.index_copy_(0, index, ids)
        certain.index_copy_(0, index, are_certain)
    return chosen, certain


def _method(params: SamplingParams) -> Method:
    if params.temperature < GREEDY_TEMPERATURE:
        return _greedy
    return _sample_truncated if params.top_k or params.top_p < 1 or params.min_p > 0 else _sample_all


def _greedy(logits: Tensor, params: list[SamplingParams], uniforms: list[float], attempt: int) -> tuple[Tensor, Tensor]:
    return _certain(logits.argmax(dim=-1))


def _sample_all(logits: Tensor, params: list[SamplingParams], uniforms: list[float], attempt: int) -> tuple[Tensor, Tensor]:
    """Sample from the whole vocabulary: first a tile of tokens, then a token in the tile."""
    probabilities = _tempered(logits, params).softmax(dim=-1)
    padding = -probabilities.shape[-1] % TILE
    tiles = torch.nn.functional.pad(probabilities, (0, padding)).unflatten(-1, (-1, TILE))
    tile, rest = _pick(tiles.sum(dim=-1).double(), upload(uniforms, logits.device, torch.float64))
    inside = tiles[torch.arange(len(tiles), device=logits.device), tile]
    ids = tile * TILE + _pick(inside.double(), rest)[0]
    return _certain(ids.clamp(max=logits.shape[-1] - 1))  # beyond it only if logits are NaN


def _sample_truncated(
    logits: Tensor, params: list[SamplingParams], uniforms: list[float], attempt: int
) -> tuple[Tensor, Tensor]:
    """Sample from what top-k, top-p and min-p keep."""
    logits = _tempered(logits, params)
    total = (logits - logits.amax(dim=-1, keepdim=True)).exp().sum(dim=-1, keepdim=True)
    limits = upload([_limits(its, logits.shape[-1]) for its in params], logits.device, torch.float64)
    counts = [*(count for count in CANDIDATES if 8 * count <= logits.shape[-1]), logits.shape[-1]]
    numbers = upload(uniforms, logits.device, torch.float64)
    return _draw(logits, torch.cat([limits, total], dim=1), numbers, counts[attempt])


def _certain(ids: Tensor) -> tuple[Tensor, Tensor]:
    return ids, torch.ones_like(ids, dtype=torch.bool)


def _limits(params: SamplingParams, vocab_size: int) -> tuple[float, float, float]:
    return params.top_k if 0 < params.top_k < vocab_size else torch.inf, params.top_p, params.min_p


def _draw(logits: Tensor, limits: Tensor, uniforms: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draw ids (m,) from what is kept of logits (m, V).

    Args:
        logits: tempered.
        limits: see ``_num_kept``.
        uniforms: (m,) fp64 random numbers.
        count: number of largest logits to examine.

    Returns:
        Ids (m,), and whether they are certain (m,): the cut is among the logits examined.
    """
    ordered, ids = _largest(logits, count)
    weights = (ordered - ordered[:, :1]).double().exp()
    kept = _num_kept(weights, limits)
    last = ordered.gather(1, kept[:, None] - 1)
    # Ties of the last kept logit may be missing here, and the sum of what top-k keeps may be unknown.
    certain = (last[:, 0] > ordered[:, -1]) & ((limits[:, 0] <= count) | limits[:, 0].isinf())
    ranks = torch.arange(ordered.shape[1], device=logits.device)
    chosen = ids.gather(1, _pick(weights * (ranks < kept[:, None]), uniforms)[0][:, None])[:, 0]
    return chosen, certain | (count == logits.shape[-1])


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
    index = torch.searchsorted(sums, target, right=True).clamp(max=weights.shape[-1] - 1)  # beyond it only if there are NaN
    weight = weights.gather(1, index)
    rest = (target - sums.gather(1, index) + weight) / weight
    return index[:, 0], rest[:, 0].clamp(0, BELOW_ONE)


def _tempered(logits: Tensor, params: list[SamplingParams]) -> Tensor:
    temperatures = [its.temperature for its in params]
    if all(temperature == 1 for temperature in temperatures):
        return logits
    return logits / upload(temperatures, logits.device, logits.dtype)[:, None]
