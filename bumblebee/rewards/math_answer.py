"""MathAnswer: compares mathematical expressions by math-verify; the only file that imports it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec

from bumblebee.rewards.answers import answer_of
from bumblebee.rewards.in_workers import InWorkers
from bumblebee.rewards.passage import Passage
from bumblebee.rewards.reward import Failure, InputReward, Record, RewardInput

_DELIMITERS = ("$", "\\boxed", "\\(", "\\[")  # of LaTeX, around what math-verify reads


class MathAnswer(InputReward):
    r"""1 if the completion's answer equals the record's as mathematics, else 0: ``\boxed{\frac{2}{4}}``, 0.5 and 50% are 1/2.

    math-verify (``pip install bumblebee[math]``) looks for the completion's answer: ``\boxed{...}``, then other LaTeX between
    dollars, then numbers. Sets, intervals, tuples, matrices and equations are compared, too. It runs in worker processes, since
    some expressions, such as towers of powers, are never evaluated.

    Args:
        key: of the answer in the record: a number or text such as ``\frac{1}{2}``, with or without dollars.
        within: regular expression of the passage to compare instead of the whole completion, such as
            ``<answer>(.*?)</answer>``; the last match counts, or its group. A completion without a match gets 0.
        processes: number of workers on each rank; 0 computes in the training process, without a time-out.
        timeout: seconds for one completion. One that takes longer gets 0.

    Raises:
        ValueError: math-verify is not installed, or a number is out of range.
    """

    can_fail = True

    def __init__(self, key: str = "answer", within: str | None = None, processes: int = 2, timeout: float = 10.0) -> None:
        if find_spec("math_verify") is None:
            raise ValueError("task.rewards: MathAnswer needs math-verify: pip install bumblebee[math]")
        if processes < 0:
            raise ValueError(f"processes must be at least 0, got {processes}")
        self.key, self._passage = key, Passage(within)
        compare = _Comparison(key, self._passage)
        self.waits = processes > 0
        self._compare = InWorkers(compare, processes, timeout) if processes else compare

    def score(self, inputs: Sequence[RewardInput]) -> Sequence[float | Failure]:
        """See the class.

        Raises:
            CompletionError: a record has no answer.
        """
        if isinstance(self._compare, InWorkers):
            return self._compare.score(inputs)
        columns = ([each.prompt for each in inputs], [each.completion for each in inputs], [each.record for each in inputs])
        return self._compare(*columns)


class _Comparison:
    """The reward, in this process."""

    def __init__(self, key: str, passage: Passage) -> None:
        self.key, self.passage = key, passage

    def __call__(self, prompts: list[str], completions: list[str], records: list[Record]) -> list[float]:
        return [self._score(text, record) for text, record in zip(completions, records, strict=True)]

    def _score(self, completion: str, record: Record) -> float:
        import math_verify

        logging.getLogger("math_verify").setLevel(
            logging.CRITICAL
        )  # warns that there is no time-out, and of what it cannot read
        answer = str(answer_of(record, self.key)).strip()
        expected = _parsed(answer if any(each in answer for each in _DELIMITERS) else f"\\boxed{{{answer}}}")
        if not expected:
            raise ValueError(f"math-verify cannot read the record's {self.key!r}: {answer!r}")
        text = self.passage.of(completion)
        if not text or not (given := _parsed(text)):
            return 0.0
        return float(math_verify.verify(expected, given, timeout_seconds=None))  # its time-outs need the main thread


def _parsed(text: str) -> list[object]:
    import math_verify

    return math_verify.parse(text, parsing_timeout=None)
