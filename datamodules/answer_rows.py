"""Fitting prompts with their answers into rows: prompts may be cut from the left, answers stay whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from datamodules.token_cache import TokenCache

TooLong = Literal["drop", "keep_end"]


@dataclass(frozen=True)
class AnswerRows:
    """Samples of one or several sequences with the same prompt, those that fit.

    Args:
        fits: which samples fit (samples,) bool.
        starts: first token in the cache of each sequence (sequences, fitting samples).
        lengths: its positions, one less than its tokens; likewise.
        answers: tokens of its answer; likewise.
        truncated: number of samples whose prompt is cut.
    """

    fits: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    answers: np.ndarray
    truncated: int

    @property
    def dropped(self) -> int:
        """Number of samples that do not fit."""
        return int(np.sum(~self.fits))


def fit_answers(cache: TokenCache, rows: np.ndarray, max_length: int, too_long: TooLong) -> AnswerRows:
    """Fit sequences into rows of ``max_length`` positions.

    Args:
        cache: of the sequences, each a prompt and an answer, which are the targets.
        rows: indices of the sequences of each sample (sequences, samples).
        max_length: positions in a row; a sequence of n tokens has n - 1.
        too_long: "drop" samples that do not fit, or "keep_end": cut as many tokens as necessary from the left of the prompt,
            the same in all rows of a sample, and leave at least one.
    """
    tokens, answers = (cache.ends - cache.begins)[rows], np.asarray(cache.targets)[rows]
    prompts = tokens[0] - answers[0]
    assert (prompts == tokens - answers).all()
    excess = np.maximum(tokens.max(axis=0) - 1 - max_length, 0)
    fits = excess < prompts if too_long == "keep_end" else excess == 0
    starts, lengths = (cache.begins[rows] + excess)[:, fits], (tokens - 1 - excess)[:, fits]
    return AnswerRows(fits, starts, lengths, answers[:, fits], int(np.sum(excess[fits] > 0)))
