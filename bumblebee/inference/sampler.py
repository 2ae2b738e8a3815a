"""From logits to the next token of each request: penalties and biases, temperature, then top-k, top-p and min-p.

The last three look at the tempered distribution, each at what the one before has left, as in transformers. A token is chosen
where the cumulated probabilities pass one random number, drawn from the request's own generator: nothing else in the batch
changes it. Tokens are walked through in the order of their ids, or, where some are cut off, from the most likely on (of equal
logits the smaller id first).

What is kept of a vocabulary is mostly short: a few hundred of the largest logits are taken first, and it is checked that the
cut falls among them. Only a row whose cut does not is looked at again with more.

Log probabilities are those of the model, before penalties, temperature and cuts, as in OpenAI's interface and vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bumblebee.inference.penalties import Penalties, penalise
from bumblebee.inference.request import SampledToken
from bumblebee.inference.sampling_params import SamplingParams

NEARLY_ZERO = 1e-6  # logits divided by less overflow fp32; the most likely token would be drawn anyway
CANDIDATES = (256, 4096)  # tokens looked at first, and then, where some are cut off; of a vocabulary that is much larger
BLOCK = 64  # tokens whose probabilities are added before they are cumulated
BELOW_ONE = 1 - 2**-53


class SamplerState:
    """What the sampler remembers of one request.

    Args:
        prompt: its ids.
        params: how to choose.
    """

    def __init__(self, prompt: Sequence[int], params: SamplingParams) -> None:
        self.params = params
        self.penalties = Penalties(prompt, params)
        self.generator = torch.Generator()
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)

    def uniform(self) -> float:
        """The next random number, 0 or more and less than 1."""
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))


def sample(logits: Tensor, states: Sequence[SamplerState]) -> list[SampledToken]:
    """The next token of each of n requests.

    Args:
        logits: (n, V), any floating dtype and device; not changed.
        states: of the n requests; updated.

    Raises:
        FloatingPointError: a row of logits has NaN or infinity as its largest.
    """
    logits = logits.float()
    if not logits.amax(dim=-1).isfinite().all():
        raise FloatingPointError("the model's logits are no numbers: its weights are damaged, or its dtype overflows")
    chosen = _choose(penalise(logits, [state.penalties for state in states]), states)
    tokens = [SampledToken(index) for index in chosen.tolist()]
    _add_logprobs(tokens, logits, chosen, states)
    for token, state in zip(tokens, states, strict=True):
        state.penalties.add(token.id)
    return tokens


# -- choosing ------------------------------------------------------------------------------------------------------------


def _choose(logits: Tensor, states: Sequence[SamplerState]) -> Tensor:
    """Penalised logits (n, V) -> ids (n,). Rows that are treated alike are treated together."""
    groups: dict[Callable[[Tensor, list[SamplerState]], Tensor], list[int]] = {}
    for row, state in enumerate(states):
        groups.setdefault(_way(state.params), []).append(row)
    chosen = torch.empty(len(states), dtype=torch.int64, device=logits.device)
    for way, rows in groups.items():
        part = logits if len(rows) == len(states) else logits[rows]
        chosen[rows] = way(part, [states[row] for row in rows])
    return chosen


def _way(params: SamplingParams) -> Callable[[Tensor, list[SamplerState]], Tensor]:
    if params.temperature < NEARLY_ZERO:
        return _most_likely
    return _from_some if params.top_k or params.top_p < 1 or params.min_p > 0 else _from_all


def _most_likely(logits: Tensor, states: list[SamplerState]) -> Tensor:
    return logits.argmax(dim=-1)


def _from_all(logits: Tensor, states: list[SamplerState]) -> Tensor:
    """Drawn from the whole vocabulary: first the block of tokens, then one in the block."""
    probabilities = _tempered(logits, states).softmax(dim=-1)
    missing = -probabilities.shape[-1] % BLOCK
    blocks = torch.nn.functional.pad(probabilities, (0, missing)).unflatten(-1, (-1, BLOCK))
    block, rest = _pick(blocks.sum(dim=-1).double(), _uniforms(states, logits.device))
    inside = blocks[torch.arange(len(blocks), device=logits.device), block]
    return block * BLOCK + _pick(inside.double(), rest)[0]


def _from_some(logits: Tensor, states: list[SamplerState]) -> Tensor:
    """Drawn from what top-k, top-p and min-p keep."""
    logits = _tempered(logits, states)
    total = (logits - logits.amax(dim=-1, keepdim=True)).exp().sum(dim=-1, keepdim=True)
    limits = torch.tensor([_limits(state.params, logits.shape[-1]) for state in states], dtype=torch.float64)
    limits = torch.cat([limits.to(logits.device), total], dim=1)
    numbers = [number for number in CANDIDATES if 8 * number <= logits.shape[-1]]
    return _draw(logits, limits, _uniforms(states, logits.device), [*numbers, logits.shape[-1]])


def _limits(params: SamplingParams, vocab_size: int) -> tuple[float, float, float]:
    return params.top_k if 0 < params.top_k < vocab_size else torch.inf, params.top_p, params.min_p


def _draw(logits: Tensor, limits: Tensor, uniforms: Tensor, numbers: list[int]) -> Tensor:
    """Ids (m,), drawn from what is kept of logits (m, V).

    Args:
        logits: tempered.
        limits: see ``_kept``.
        uniforms: (m,) fp64, which decide.
        numbers: how many of the largest logits are looked at first, and then, for rows whose cut is not among them; V is last.
    """
    ordered, ids = _largest(logits, numbers[0])
    weights = (ordered - ordered[:, :1]).double().exp()
    kept = _kept(weights, limits)
    last = ordered.gather(1, kept[:, None] - 1)
    # Of logits equal to the last one some may be missing here, and of what top-k keeps the sum may be unknown.
    certain = (last[:, 0] > ordered[:, -1]) & ((limits[:, 0] <= numbers[0]) | limits[:, 0].isinf())
    places = torch.arange(ordered.shape[1], device=logits.device)
    chosen = ids.gather(1, _pick(weights * (places < kept[:, None]), uniforms)[0][:, None])[:, 0]
    if len(numbers) > 1 and not certain.all():
        again = ~certain
        chosen[again] = _draw(logits[again], limits[again], uniforms[again], numbers[1:])
    return chosen


def _largest(logits: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The largest logits of each row in falling order and their ids, (m, number) each; of equal ones the smaller id first."""
    if number == logits.shape[-1]:
        return logits.sort(dim=-1, descending=True, stable=True)
    ids = logits.topk(number, dim=-1, sorted=False).indices.sort(dim=-1).values
    ordered, order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return ordered, ids.gather(1, order)


def _kept(weights: Tensor, limits: Tensor) -> Tensor:
    """How many tokens are kept.

    Args:
        weights: (m, number) in falling order, as multiples of the first one's probability.
        limits: (m, 4): top-k, top-p, min-p, and the sum of the weights of the whole vocabulary.

    Returns:
        (m,), at least 1.
    """
    top_k, top_p, min_p, total = limits[:, :, None].unbind(1)
    places = torch.arange(weights.shape[1], device=weights.device)
    first = places < top_k
    before = weights.cumsum(dim=-1) - weights
    # Of a vocabulary that top-k has cut, the sum is known here; top-p is a share of it.
    reached = torch.where(top_k < torch.inf, (weights * first).sum(dim=-1, keepdim=True), total)
    keep = first & ((before < top_p * reached) | (top_p == 1)) & (weights >= min_p)
    return keep.sum(dim=-1).clamp(min=1)


def _pick(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulated weights pass a share of their sum.

    Args:
        weights: (m, K) fp64, 0 or more, their sum is not 0.
        uniforms: (m,) fp64, 0 or more and less than 1.

    Returns:
        The places, whose weights are never 0, and how far into the weight's own share each number points, as ``uniforms``.
    """
    sums = weights.cumsum(dim=-1)
    target = uniforms[:, None] * sums[:, -1:]  # less than the sum, also when rounded
    place = torch.searchsorted(sums, target, right=True)
    own = weights.gather(1, place)
    rest = (target - sums.gather(1, place) + own) / own
    return place[:, 0], rest[:, 0].clamp(0, BELOW_ONE)


def _tempered(logits: Tensor, states: list[SamplerState]) -> Tensor:
    temperatures = [state.params.temperature for state in states]
    if all(temperature == 1 for temperature in temperatures):
        return logits
    return logits / torch.tensor(temperatures, dtype=logits.dtype, device=logits.device)[:, None]


def _uniforms(states: list[SamplerState], device: torch.device) -> Tensor:
    return torch.tensor([state.uniform() for state in states], dtype=torch.float64).to(device)


# -- log probabilities ---------------------------------------------------------------------------------------------------


def _add_logprobs(tokens: list[SampledToken], logits: Tensor, chosen: Tensor, states: Sequence[SamplerState]) -> None:
    """Log probabilities of the model, for the requests that ask for them."""
    numbers = {row: state.params.logprobs for row, state in enumerate(states) if state.params.logprobs is not None}
    if not numbers:
        return
    rows = list(numbers)
    logits = logits if len(rows) == len(tokens) else logits[rows]
    total = logits.logsumexp(dim=-1, keepdim=True)
    own = (logits.gather(1, chosen[rows][:, None]) - total)[:, 0].tolist()
    top = logits.topk(min(max(numbers.values()), logits.shape[-1]), dim=-1)
    pairs = zip(top.indices.tolist(), (top.values - total).tolist(), strict=True)
    for row, logprob, (ids, values) in zip(rows, own, pairs, strict=True):
        number = numbers[row]
        tokens[row].logprob, tokens[row].top = logprob, list(zip(ids[:number], values[:number], strict=True))
