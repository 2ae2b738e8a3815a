"""Where the assistant's turns stand in a rendered conversation, and whether that can be relied on.

A template with ``{% generation %}`` tags says so itself. For all others turn i is what rendering i + 1 messages adds to
the prompt of the first i, as at generation. This holds only if each of these is the beginning of the whole text: a template
that rewrites earlier turns (one that drops the reasoning from all answers but the last, say) is found out here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Message = dict[str, Any]
Span = tuple[int, int]  # [begin, end) in the text
Render = Callable[[Sequence[Message], bool], str]  # (messages, add_generation_prompt) -> text

SHOWN = 40  # characters of a text that a message quotes


def trained_turns(messages: Sequence[Message], train_on: str) -> list[int]:
    """Indices of the messages that are targets.

    Raises:
        ValueError: no message of the assistant, or a ``train_on`` that is neither "all" nor "last".
    """
    turns = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
    if train_on not in ("all", "last"):
        raise ValueError(f"train_on must be 'all' or 'last', not {train_on!r}")
    if not turns:
        raise ValueError("the conversation has no assistant turn, so there is nothing to train on")
    return turns if train_on == "all" else turns[-1:]


def rendered_spans(render: Render, messages: Sequence[Message], turns: Sequence[int]) -> tuple[str, list[Span]]:
    """(text, span of each turn) by rendering prefixes.

    Raises:
        ValueError: a prefix is not the beginning of the whole text.
    """
    text = render(messages, False)
    spans = []
    for turn in turns:
        prompt = render(messages[:turn], True)
        _require_prefix(prompt, text, messages, turn, len(turns))
        ended = text if turn + 1 == len(messages) else render(messages[: turn + 1], False)
        _require_prefix(ended, text, messages, turn, len(turns))
        spans.append((len(prompt), len(ended)))
    return text, spans


def _require_prefix(prefix: str, text: str, messages: Sequence[Message], turn: int, turns: int) -> None:
    if text.startswith(prefix):
        return
    at = next((i for i, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), min(len(prefix), len(text)))
    last = turn == max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    advice = "" if last and turns == 1 else "; with train_on: last only the last turn has to hold"
    raise ValueError(
        f"the chat template writes turn {turn} in another way when it is generated ({prefix[at : at + SHOWN]!r}) than when the"
        f" conversation is complete ({text[at : at + SHOWN]!r}), so training on it would mislead{advice}"
    )


def tagged_spans(marks: str) -> Callable[[Render, Sequence[Message], Sequence[int]], tuple[str, list[Span]]]:
    """Like ``rendered_spans``, for a template with ``{% generation %}`` tags, whose text is found between two ``marks``."""

    def spans_of(render: Render, messages: Sequence[Message], turns: Sequence[int]) -> tuple[str, list[Span]]:
        text, spans = _unmarked(render(messages, False), marks)
        if any(message["role"] == "assistant" for message in messages[: turns[0]]):
            earlier = _unmarked(render(messages[: turns[0]], False), marks)[1]
            spans = spans[len(earlier) :]
        return text, spans

    return spans_of


def _unmarked(marked: str, marks: str) -> tuple[str, list[Span]]:
    pieces = re.split(f"[{re.escape(marks)}]", marked)
    ends = [0, *itertools.accumulate(map(len, pieces))]
    # Text and marked text take turns; blocks within blocks would not, and no template has them.
    return "".join(pieces), [(ends[i], ends[i + 1]) for i in range(1, len(pieces), 2)]


def closed_spans(text: str, spans: list[Span], turns: int, special: tuple[str, ...]) -> list[Span]:
    """The spans, each up to and with the special token that ends its turn, without the newline behind it.

    Tags of some templates close right before that token. It is taken in: without it a model would never learn to stop.

    Raises:
        ValueError: fewer ends than turns.
    """
    trimmed = [_trimmed(text, span, special) for span in spans]
    for closed in (trimmed, [_extended(text, span, special) for span in trimmed]):
        if sum(text.endswith(special, begin, end) for begin, end in closed) >= turns:
            return closed
    raise ValueError("the chat template ends assistant turns with no special token, so a model could not learn to stop")


def _trimmed(text: str, span: Span, special: tuple[str, ...]) -> Span:
    begin, end = span
    stripped = begin + len(text[begin:end].rstrip())
    return (begin, stripped) if text.endswith(special, begin, stripped) else span


def _extended(text: str, span: Span, special: tuple[str, ...]) -> Span:
    begin, end = span
    if text.endswith(special, begin, end):
        return span
    return begin, end + max((len(token) for token in special if text.startswith(token, end)), default=0)


def require_contents(targets: str, messages: Sequence[Message]) -> None:
    """That the targets say what the messages say, one behind the other.

    Raises:
        ValueError: an answer or a call is missing.
    """
    expected = [part for message in messages for part in _parts(message)]
    if _first_missing(expected, targets) is None:
        return
    missing = _first_missing(map(without_whitespace, expected), without_whitespace(targets))
    if missing:
        raise ValueError(f"the chat template leaves out of the assistant turns what they say: {missing[:SHOWN]!r}")


def _parts(message: Message) -> list[str]:
    content = message.get("content")
    calls = [call.get("function", call)["name"] for call in message.get("tool_calls") or []]
    return [content.strip(), *calls] if isinstance(content, str) else calls


def _first_missing(expected: Iterable[str], text: str) -> str | None:
    """The first part that does not follow in the text behind those before it."""
    at = 0
    for part in expected:
        found = text.find(part, at)
        if found < 0:
            return part
        at = found + len(part)
    return None


def without_whitespace(text: str) -> str:
    """Templates set reasoning and answer apart by blanks of their own."""
    return "".join(text.split())
