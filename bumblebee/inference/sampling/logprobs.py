"""Log-probabilities of tokens: the model's own, before penalties, temperature and cuts, as in the OpenAI API and vLLM."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bumblebee.inference.request import PromptToken
from bumblebee.inference.transfers import upload
from bumblebee.nn.batch_invariant import is_batch_invariant

ROWS = 64  # rows of logits (V) that are converted to fp32 at a time

TopTokens = list[tuple[int, float]]  # (id, log-probability), best first


def token_logprobs(logits: Tensor, ids: Tensor, count: int) -> list[Tensor]:
    """The log-probability of one token, and the most likely tokens, in each row. Does not wait for a GPU.

    Args:
        logits: (n, V).
        ids: (n,) the tokens.
        count: number of most likely tokens.

    Returns:
        Log-probabilities (n,), and ids and log-probabilities of the most likely tokens, (n, count or V) each.
    """
    logits = logits.float()
    if is_batch_invariant():
        logits = logits.log_softmax(dim=-1)  # as in the loss
        return [logits.gather(1, ids[:, None])[:, 0], *reversed(logits.topk(min(count, logits.shape[-1]), dim=-1))]
    total = logits.logsumexp(dim=-1, keepdim=True)
    own = (logits.gather(1, ids[:, None]) - total)[:, 0]
    top = logits.topk(min(count, logits.shape[-1]), dim=-1)
    return [own, top.indices, top.values - total]


def parse_logprobs(values: Sequence[Sequence[float]], counts: Sequence[int]) -> list[tuple[float, TopTokens]]:
    """What ``token_logprobs`` computed, read back: the token's log-probability and its row's most likely tokens.

    Args:
        values: of the three tensors.
        counts: number of most likely tokens to return for each row.
    """
    own, ids, logprobs = values
    width = len(ids) // len(own) if own else 0
    rows = []
    for row, (logprob, count) in enumerate(zip(own, counts, strict=True)):
        begin, end = row * width, row * width + min(count, width)
        rows.append((logprob, list(zip(map(int, ids[begin:end]), logprobs[begin:end], strict=True))))
    return rows


class PromptScores:
    """Scores of prompt tokens by the logits of the tokens before them. The host waits for nothing before it reads ``tensors``.

    Args:
        logits: (n, V), any floating dtype and device.
        ids: the n prompt tokens.
        counts: number of most likely tokens to return for each.
    """

    def __init__(self, logits: Tensor, ids: Sequence[int], counts: Sequence[int]) -> None:
        self.ids, self.counts = ids, counts
        self.tensors: list[Tensor] = []
        for begin in range(0, len(ids), ROWS):
            rows = logits[begin : begin + ROWS].float()
            targets = upload(ids[begin : begin + ROWS], rows.device)
            ranks = (rows > rows.gather(1, targets[:, None])).sum(dim=-1) + 1
            logprobs = token_logprobs(rows, targets, max(counts[begin : begin + ROWS]))
            self.tensors += [are_finite(rows), ranks, *logprobs]

    def tokens(self, values: Sequence[Sequence[float]]) -> list[PromptToken]:
        """The scored tokens, from the values of ``tensors``.

        Raises:
            FloatingPointError: the maximum of a row is NaN or infinite.
        """
        scored: list[PromptToken] = []
        for begin in range(0, len(self.ids), ROWS):
            (finite, ranks), logprobs = values[:2], values[2:5]
            values = values[5:]
            check_finite(finite)
            rows = parse_logprobs(logprobs, self.counts[begin : begin + ROWS])
            for id, rank, (logprob, top) in zip(self.ids[begin : begin + ROWS], ranks, rows, strict=True):
                scored.append(PromptToken(id, logprob, int(rank), top))
        return scored


def are_finite(logits: Tensor) -> Tensor:
    """Whether the maxima of all rows of logits (n, V) are finite: a bool tensor."""
    return logits.amax(dim=-1).isfinite().all()


def check_finite(finite: Sequence[float]) -> None:
    """Check the value of ``are_finite``.

    Raises:
        FloatingPointError: the maximum of a row is NaN or infinite.
    """
    if not all(finite):
        raise FloatingPointError("the model's logits are NaN or infinite: its weights are damaged, or its dtype overflows")
