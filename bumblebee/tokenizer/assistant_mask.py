"""Locates the assistant turns in a rendered conversation and checks that they can be trained on.

A template with ``{% generation %}`` tags marks the turns itself. For any other template, turn i is the text that rendering
i + 1 messages adds to the generation prompt of the first i. Both of these renderings have to be a prefix of the text that is
trained on. Templates that rewrite earlier turns, for example those that strip the reasoning from all answers but the last, such
as Qwen3's, need several texts for that: ``turns_by_context`` finds the fewest.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bumblebee.tokenizer.special_token_guard import any_of

Message = dict[str, Any]  # as in the OpenAI chat API
CharSpan = tuple[int, int]  # [begin, end) in the rendered text
Render = Callable[[Sequence[Message], bool], str]  # (messages, add_generation_prompt) -> text

QUOTED = 40  # characters of a text that an error message quotes


def target_turns(messages: Sequence[Message], train_on: str) -> list[int]:
    """Indices of the messages that are targets.

    Raises:
        ValueError: there is no assistant message, or ``train_on`` is not "all" or "last".
    """
    turns = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
    if train_on not in ("all", "last"):
        raise ValueError(f"train_on must be 'all' or 'last', got {train_on!r}")
    if not turns:
        raise ValueError("the conversation has no assistant turn, so there is nothing to train on")
    return turns if train_on == "all" else turns[-1:]


def remembered(render: Render) -> Render:
    """``render`` for the beginnings of one conversation, each rendered once."""
    texts: dict[tuple[int, bool], str] = {}

    def render_once(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        key = len(messages), add_generation_prompt
        if key not in texts:
            texts[key] = render(messages, add_generation_prompt)
        return texts[key]

    return render_once


def turns_by_context(render: Render, messages: Sequence[Message], turns: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Group turns that one rendered text shows as they are generated.

    Returns:
        For each text the number of messages to render, and the turns in it. All turns are in the complete conversation unless
        the template rewrites earlier ones; a turn that it rewrites is in the text that ends with it, or with a later turn
        before it is rewritten.
    """
    *earlier, last = turns
    groups = [(len(messages), [last])]
    for turn in reversed(earlier):
        count, group = groups[-1]
        text = render(messages[:count], False)
        if text.startswith(render(messages[:turn], True)) and text.startswith(render(messages[: turn + 1], False)):
            group.insert(0, turn)
        else:
            groups.append((turn + 1, [turn]))
    return groups[::-1]


def spans_by_prefix(render: Render, messages: Sequence[Message], turns: Sequence[int]) -> tuple[str, list[CharSpan]]:
    """Render prefixes of the conversation to find the span of each turn.

    Returns:
        The complete text, and the span of each turn in it.

    Raises:
        ValueError: a rendered prefix is not a prefix of the complete text.
    """
    text = render(messages, False)
    spans = []
    for turn in turns:
        prompt = render(messages[:turn], True)
        _require_prefix(prompt, text, turn)
        through_turn = text if turn + 1 == len(messages) else render(messages[: turn + 1], False)
        _require_prefix(through_turn, text, turn)
        spans.append((len(prompt), len(through_turn)))
    return text, spans


def _require_prefix(prefix: str, text: str, turn: int) -> None:
    if text.startswith(prefix):
        return
    at = next((i for i, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), min(len(prefix), len(text)))
    raise ValueError(
        f"the chat template renders turn {turn} differently during generation ({prefix[at : at + QUOTED]!r}) and in the"
        f" conversation that ends with it ({text[at : at + QUOTED]!r}), so it cannot be trained on; use data.chat_template with"
        " a template that writes turns as they are generated"
    )


def spans_by_tags(marks: str) -> Callable[[Render, Sequence[Message], Sequence[int]], tuple[str, list[CharSpan]]]:
    """Like :func:`spans_by_prefix`, for templates with ``{% generation %}`` tags.

    Args:
        marks: the two characters that the sandbox writes around tagged text.
    """

    def find_spans(render: Render, messages: Sequence[Message], turns: Sequence[int]) -> tuple[str, list[CharSpan]]:
        text, spans = _remove_marks(render(messages, False), marks)
        if any(message["role"] == "assistant" for message in messages[: turns[0]]):
            _, earlier = _remove_marks(render(messages[: turns[0]], False), marks)
            spans = spans[len(earlier) :]
        return text, spans

    return find_spans


def _remove_marks(marked: str, marks: str) -> tuple[str, list[CharSpan]]:
    parts = re.split(f"[{re.escape(marks)}]", marked)
    ends = [0, *itertools.accumulate(map(len, parts))]
    # Unmarked and marked text alternate. Nested tags would break this; no known template has them.
    return "".join(parts), [(ends[i], ends[i + 1]) for i in range(1, len(parts), 2)]


def end_at_special_tokens(
    text: str, spans: list[CharSpan], turns: int, special: tuple[str, ...], closing: Callable[[], str | None]
) -> tuple[str, list[CharSpan]]:
    """Let each span end with the special token that ends its turn, without the newline that follows it.

    Some templates close their tags right before that token. It is included then, or the model would never learn to stop.
    Others, such as GLM-4's, write no token at the end of a turn: the one that begins the next turn ends it, and ``closing`` is
    appended to the last turn.

    Args:
        text: the rendered conversation.
        spans: the assistant turns in it.
        turns: how many turns are targets.
        special: the special tokens.
        closing: returns what ends the last turn in a template that does not do so itself, or None.

    Returns:
        The text, which may be longer now, and the spans.

    Raises:
        ValueError: fewer turns than ``turns`` end with a special token.
    """
    trimmed = [_trim(text, span, special) for span in spans]
    for candidate in (trimmed, [_extend(text, span, special) for span in trimmed]):
        if _count_ended(text, candidate, special) >= turns:
            return text, candidate
    if len(spans) < turns:
        raise ValueError(f"the chat template marks {len(spans)} of {turns} assistant turns with {{% generation %}} tags")
    if (token := closing()) is None:
        raise ValueError("the chat template ends assistant turns without a special token, and the tokenizer has no eos_token")
    text, spans = _close_last(text, spans, token)
    spans = [_extend(text, span, special, blanks=r"\s*") for span in spans]
    if _count_ended(text, spans, special) < turns:
        raise ValueError(
            "the chat template ends assistant turns without a special token, so a model could not learn to stop; use"
            f" train_on: last, which ends the last turn with {token!r}"
        )
    return text, spans


def closing_token(first: str, both: str, special: tuple[str, ...], eos: str | None) -> str | None:
    """What ends an answer in a template without end-of-turn token: the special token of the next turn, or else ``eos``.

    Args:
        first: a rendered conversation that ends with an answer.
        both: the same with another message.
        special: the special tokens.
        eos: the end-of-text token.
    """
    answer = first.rstrip()
    follows = re.match(rf"\s*(?:{any_of(special)})", both[len(answer) :]) if both.startswith(answer) else None
    return follows[0] if follows else eos


def _close_last(text: str, spans: list[CharSpan], token: str) -> tuple[str, list[CharSpan]]:
    """Append a token to the last span if nothing but blanks follows it."""
    *earlier, (begin, end) = spans
    if text[end:].strip():
        return text, spans
    text = text[:begin] + text[begin:].rstrip() + token
    return text, [*earlier, (begin, len(text))]


def _count_ended(text: str, spans: list[CharSpan], special: tuple[str, ...]) -> int:
    return sum(text.endswith(special, begin, end) for begin, end in spans)


def _trim(text: str, span: CharSpan, special: tuple[str, ...]) -> CharSpan:
    begin, end = span
    stripped = begin + len(text[begin:end].rstrip())
    return (begin, stripped) if text.endswith(special, begin, stripped) else span


def _extend(text: str, span: CharSpan, special: tuple[str, ...], blanks: str = "") -> CharSpan:
    begin, end = span
    if text.endswith(special, begin, end):
        return span
    follows = re.compile(f"{blanks}(?:{any_of(special)})").match(text, end)
    return (begin, follows.end()) if follows else span


def spans_with_prompts(
    render: Render, messages: Sequence[Message], turns: Sequence[int], text: str, spans: list[CharSpan]
) -> list[CharSpan]:
    """The spans, each with the generation prompt before it, which may write the beginning of an answer, such as ``<think>``."""
    before = [render(messages[:turn], False) for turn in turns]
    return [
        (len(prefix) if text.startswith(prefix) else begin, end) for prefix, (begin, end) in zip(before, spans, strict=True)
    ]


def require_contents(targets: str, messages: Sequence[Message]) -> None:
    """Check that a text, which the targets make up, contains the content and tool calls of each message, in order.

    Raises:
        ValueError: an answer or a call is missing.
    """
    expected = [part for message in messages for part in _contents(message)]
    if _first_missing(expected, targets) is None:
        return
    missing = _first_missing(map(without_whitespace, expected), without_whitespace(targets))
    if missing:
        raise ValueError(f"the chat template omits part of the assistant turns: {missing[:QUOTED]!r}")


def _contents(message: Message) -> list[str]:
    content = message.get("content")
    calls = [call.get("function", call)["name"] for call in message.get("tool_calls") or []]
    return [content.strip(), *calls] if isinstance(content, str) else calls


def _first_missing(expected: Iterable[str], text: str) -> str | None:
    """The first part that does not occur after the parts before it."""
    at = 0
    for part in expected:
        begin = text.find(part, at)
        if begin < 0:
            return part
        at = begin + len(part)
    return None


def without_whitespace(text: str) -> str:
    """Remove all whitespace: templates put their own between reasoning and answer."""
    return "".join(text.split())
