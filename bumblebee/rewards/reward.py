"""What a reward is: a function of texts and records, or a class that also gets token counts and may fail for one completion."""

from __future__ import annotations

import inspect
import math
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, SupportsFloat

from bumblebee.tokenizer.assistant_mask import Message
from bumblebee.tokenizer.chat_template import Tool
from bumblebee.utils.formatting import plural
from bumblebee.utils.user_code import UserCodeError

if TYPE_CHECKING:
    import torch

Record = Mapping[str, object]
RewardFunction = Callable[[list[str], list[str], list[Record]], Sequence[float]]
OnFailure = float | Literal["stop"]  # the reward of a completion that cannot be scored, or "stop" to end the run


class RewardError(UserCodeError):
    """A reward function raised, or returned what is no reward."""


class CompletionError(ValueError):
    """One completion cannot be scored, which ends the run.

    Args:
        index: of the completion.
        what: happened, followed by a preposition: "timed out after 10 s on".
        detail: such as the exception; "" for none.
    """

    def __init__(self, index: int, what: str, detail: str = "") -> None:
        super().__init__(f"{what} a completion{f': {detail}' if detail else ''}")
        self.index, self.what, self.detail = index, what, detail


@dataclass(frozen=True)
class Failure:
    """A completion that could not be scored, in a run that goes on.

    Args:
        value: its reward.
        what: happened, followed by a preposition: "timed out after 10 s on".
        detail: such as the exception; "" for none.
        timed_out: whether it took too long.
    """

    value: float
    what: str
    detail: str = ""
    timed_out: bool = False


@dataclass(frozen=True)
class RewardInput:
    """A completion to score.

    Args:
        prompt: text of the question.
        completion: its text, without special tokens.
        record: of the data file that the question comes from.
        tokens: of the completion, with the one that ended it; None if not known.
        messages: the conversation up to the question, which is its last message; empty if not known.
        tools: of the conversation.
    """

    prompt: str
    completion: str
    record: Record
    tokens: int | None = None
    messages: Sequence[Message] = ()
    tools: Sequence[Tool] | None = None


class InputReward(ABC):
    """A reward that needs more than texts and records, or that may fail for some completions."""

    can_fail = False  # whether score may return failures, which are then logged
    waits = False  # whether score waits for other processes, and may run in a thread beside other rewards

    @abstractmethod
    def score(self, inputs: Sequence[RewardInput]) -> Sequence[float | Failure]:
        """Reward of each completion.

        Raises:
            CompletionError: one of them cannot be scored, and the run is to stop.
        """

    def check(self) -> None:  # noqa: B027  (optional)
        """Check before training what a reward depends on, such as a server.

        Raises:
            ValueError: it cannot be used.
        """

    def begin(self, device: torch.device) -> None:  # noqa: B027  (optional)
        """Load what runs on this rank's device, once the run's model is there."""

    def __call__(self, prompts: list[str], completions: list[str], records: list[Record]) -> list[float]:
        """Rewards as of a function."""
        inputs = [RewardInput(*each) for each in zip(prompts, completions, records, strict=True)]
        return [each.value if isinstance(each, Failure) else each for each in self.score(inputs)]


def check_signature(reward: Callable[..., object]) -> None:
    """Check that a function can be called with prompts, completions and records.

    Parameters for columns of the data, which TRL passes by name, are refused as well: the first of them would get the records.

    Raises:
        ValueError: it has other parameters.
    """
    try:
        signature = inspect.signature(reward)
    except (TypeError, ValueError):  # of a function in C
        return
    if not _takes_three(signature) or _takes_columns(signature):
        shown = signature.replace(return_annotation=inspect.Signature.empty)
        raise ValueError(
            f"a reward is called with (prompts, completions, records), but the parameters are {shown}; other fields of the data"
            " are in the records"
        )


def _takes_three(signature: inspect.Signature) -> bool:
    try:
        signature.bind([], [], [])
    except TypeError:
        return False
    return True


def _takes_columns(signature: inspect.Signature) -> bool:
    parameters = signature.parameters.values()
    names = [each.name for each in parameters if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
    return takes_any and len(names) > 2 and "record" not in names[2]


def score_all(reward: RewardFunction, inputs: Sequence[RewardInput]) -> list[float | Failure]:
    """Call a reward, and check what it returns.

    Raises:
        CompletionError: a value is not a finite number.
        RewardError: the return value is not one number per completion; the message has no subject.
        Exception: whatever the function raises.
    """
    if isinstance(reward, InputReward):
        return _checked(reward.score(inputs), len(inputs))
    columns = ([each.prompt for each in inputs], [each.completion for each in inputs], [each.record for each in inputs])
    return _checked(reward(*columns), len(inputs))


def _checked(given: object, count: int) -> list[float | Failure]:
    if not isinstance(given, Iterable) or isinstance(given, str | Mapping):
        raise RewardError(f"returned {_shown(given)} instead of a list of {plural(count, 'reward')}")
    values = list(given)
    if len(values) != count:
        raise RewardError(f"returned {plural(len(values), 'reward')} for {plural(count, 'completion')}")
    return [value if isinstance(value, Failure) else _number(index, value) for index, value in enumerate(values)]


def _number(index: int, value: object) -> float:
    number = _float(value)
    if number is None or not math.isfinite(number):
        raise CompletionError(index, f"returned {_shown(value)} for")
    return number


def _float(value: object) -> float | None:
    """A number, also of numpy and torch; None of anything else. Text is not converted."""
    try:
        return float(value) if isinstance(value, SupportsFloat) else None
    except (TypeError, ValueError, RuntimeError):  # such as a tensor of several elements
        return None


def _shown(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:80]}..."


def name_of(reward: Callable[..., object]) -> str:
    """Name of a function, or of the class of an object."""
    return getattr(reward, "__name__", type(reward).__name__)


def describe(error: BaseException) -> str:
    """An error with the file and line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    origin = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    text = " ".join(repr(error).split())
    return (text if len(text) <= 1000 else f"{text[:1000]}...") + origin
