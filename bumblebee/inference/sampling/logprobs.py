"""Log-probabilities of tokens: the model's own, before penalties, temperature and cuts, as in the OpenAI API and vLLM."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, tensor

from bumblebee.inference.request import PromptToken

ROWS = 64  # rows of logits (V) that are converted to fp32 at a time

TopTokens = list[tuple[int, float]]  # (id, log-probability), best first


def token_logprobs(logits: Tensor, ids: Tensor, counts: Sequence[int]) -> list[tuple[float, TopTokens]]:
    """The log-probability of one token, and the most likely tokens, in each row.

    Args:
        logits: (n, V).
        ids: (n,) the tokens.
        counts: number of most likely tokens to return for each row.
    """
    logits = logits.float()
    total = logits.logsumexp(dim=-1, keepdim=True)
    own = (logits.gather(1, ids[:, None]) - total)[:, 0].tolist()
    top = logits.topk(min(max(counts), logits.shape[-1]), dim=-1)
    pairs = zip(top.indices.tolist(), (top.values - total).tolist(), strict=True)
    rows = zip(own, counts, pairs, strict=True)
    return [(logprob, list(zip(top_ids[:n], values[:n], strict=True))) for logprob, n, (top_ids, values) in rows]


def prompt_logprobs(logits: Tensor, ids: Sequence[int], counts: Sequence[int]) -> list[PromptToken]:
    """Score prompt tokens with the logits of the tokens before them.

    Args:
        logits: (n, V), any floating dtype and device.
        ids: the n prompt tokens.
        counts: number of most likely tokens to return for each.

    Raises:
        FloatingPointError: the maximum of a row is NaN or infinite.
    """
    scored: list[PromptToken] = []
    for begin in range(0, len(ids), ROWS):
        rows, own = logits[begin : begin + ROWS].float(), ids[begin : begin + ROWS]
        check_finite(rows)
        targets = tensor(own, device=rows.device)
        ranks = (rows > rows.gather(1, targets[:, None])).sum(dim=-1) + 1
        values = token_logprobs(rows, targets, counts[begin : begin + ROWS])
        for id, rank, (logprob, top) in zip(own, ranks.tolist(), values, strict=True):
            scored.append(PromptToken(id, logprob, rank, top))
    return scored


def check_finite(logits: Tensor) -> None:
    """Check the logits (n, V) of a model.

    Raises:
        FloatingPointError: the maximum of a row is NaN or infinite.
    """
    if not logits.amax(dim=-1).isfinite().all():
        raise FloatingPointError("the model's logits are NaN or infinite: its weights are damaged, or its dtype overflows")
