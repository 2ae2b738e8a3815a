"""The chat template of a model folder: from messages to text, and from messages to ids with the targets marked.

Choices made:
- A template is rendered as transformers renders it, in a sandbox, and its text is tokenised with no special token added: the
  template writes the begin-of-text token itself where there has to be one.
- Text of users that spells a special token stays text, in contents, names, arguments and tools alike.
- Targets are found by text, never by token id: the assistant's turns with the special token that ends each, without the
  newline behind it. Text is cut where a target begins and ends, because at generation the prompt is tokenised alone.
- A template for which this does not hold is refused, and so is one that leaves out an answer, a tool call or the tools.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from bumblebee.tokenizer.assistant_mask import (
    Message,
    Span,
    closed_spans,
    rendered_spans,
    require_contents,
    tagged_spans,
    trained_turns,
    without_whitespace,
)
from bumblebee.tokenizer.chatml import CHATML, TOKENS
from bumblebee.tokenizer.sandbox import GENERATION, MARKS, compile_template
from bumblebee.tokenizer.special_token_guard import Guard, mend
from bumblebee.tokenizer.template_tokenizer import TemplateTokenizer

if TYPE_CHECKING:
    from bumblebee.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as ids. ``trained[i]`` says whether token i is a target."""

    ids: list[int]
    trained: list[bool]


class ChatTemplate:
    """Renders and encodes conversations.

    Messages are those of OpenAI: ``{"role", "content", "tool_calls"?, ...}``; the arguments of a call may be an object or
    its JSON text, and a null beside calls is no text. Other keys reach the template as they are.

    Args:
        tokenizer: its settings hold the template, ``chat_template``: a string, or a list of named ones, of which
            "tool_use" is taken where tools are given and "default" otherwise. Without one the template is ChatML.

    Raises:
        ValueError: no valid Jinja; or no template, and a tokenizer that lacks the special tokens of ChatML.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.name_or_path = tokenizer.name_or_path
        with self._named():
            self.sources = _named(tokenizer.settings.get("chat_template"))
        self.sources = self.sources or _default(tokenizer)
        self._compiled = {name: compile_template(source, self.name_or_path) for name, source in self.sources.items()}
        self._variables = _special_tokens(tokenizer.settings)
        self._encoder = TemplateTokenizer(tokenizer.backend)
        self._special = tuple(self._encoder.special)
        self._guard = Guard(self._special)

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation. In it a user's "<|im_end|>" looks like the template's: for ids, ``apply``.

        Raises:
            ValueError: the template cannot render these messages, or leaves out the tools.
        """
        return mend(*self._text(messages, tools, add_generation_prompt))

    def apply(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, add_generation_prompt: bool = False
    ) -> list[int]:
        """The ids of a conversation, of which a model generates the next turn; see ``render``."""
        text, breaker = self._text(messages, tools, add_generation_prompt)
        return self._encoder.encode([(text, False)], breaker)[0]

    def encode(self, messages: Sequence[Message], tools: Sequence[Any] | None = None, train_on: str = "all") -> EncodedChat:
        """The ids of a conversation, with its targets.

        Args:
            messages: at least one of them the assistant's.
            tools: descriptions of functions, as the template wants them.
            train_on: "all" turns of the assistant or only the "last".

        Raises:
            ValueError: the template cannot render the messages or leaves out tools, calls or answers; it rewrites earlier
                turns; it ends a turn with no special token; there is no assistant turn.
        """
        turns = trained_turns(messages, train_on)
        source = self._source(tools)
        tagged = GENERATION.search(self.sources[source]) is not None
        guarded, breaker, marks = self._guarded(messages, tools, marks=2 * tagged)
        with self._named(breaker):
            render = partial(self._render, source, guarded[1], marks)
            find = tagged_spans(marks) if tagged else rendered_spans
            text, spans = find(render, guarded[0], turns)
            spans = closed_spans(text, spans, len(turns), self._special)
            targets = [mend(text[begin:end], breaker) for begin, end in spans]
            require_contents("".join(targets), [messages[turn] for turn in turns])
            _require_tools(mend(text, breaker), tools)
        chat = EncodedChat(*self._encoder.encode(_segments(text, spans), breaker))
        assert self._decodes(chat, [text[begin:end] for begin, end in spans], breaker)
        return chat

    @cached_property
    def end_of_turn_id(self) -> int:
        """The special token that ends a turn of the assistant: generation stops there.

        Raises:
            ValueError: the template does not end turns so.
        """
        chat = self.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        return next(index for index, trained in zip(reversed(chat.ids), reversed(chat.trained), strict=True) if trained)

    def _text(self, messages: Sequence[Message], tools: Sequence[Any] | None, prompt: bool) -> tuple[str, str]:
        """(text, the character that breaks spellings in it)."""
        source = self._source(tools)
        guarded, breaker, _ = self._guarded(messages, tools)
        with self._named(breaker):
            text = self._render(source, guarded[1], "", guarded[0], prompt)
            _require_tools(mend(text, breaker), tools)
        return text, breaker

    def _guarded(self, messages: Sequence[Message], tools: Sequence[Any] | None, marks: int = 0) -> tuple[Any, str, str]:
        """([messages, tools], the character that breaks spellings in them, marks)."""
        with self._named():
            return self._guard.protect([_prepared(messages), tools], marks)

    def _source(self, tools: Sequence[Any] | None) -> str:
        """The name of the template to use."""
        name = "tool_use" if tools is not None and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise ValueError(
                f"{self.name_or_path}: no chat template is named {name!r}, only {', '.join(map(repr, self.sources))}"
            )
        return name

    def _render(self, source: str, tools: Any, marks: str, messages: Sequence[Message], prompt: bool) -> str:
        variables = {**self._variables, "messages": messages, "tools": tools, "documents": None, MARKS: marks}
        try:
            return self._compiled[source].render(**variables, add_generation_prompt=prompt)
        except Exception as error:  # a template is a program of others: it may raise anything
            raise ValueError(f"the chat template cannot render this conversation: {error or type(error).__name__}") from error

    @contextmanager
    def _named(self, breaker: str = "") -> Iterator[None]:
        """Errors begin with the folder."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.name_or_path}: {mend(str(error), breaker)}") from error.__cause__

    def _decodes(self, chat: EncodedChat, spans: list[str], breaker: str) -> bool:
        """Whether the targets decode to these texts, up to what this tokenizer always loses (blanks, composed characters)."""
        decode = partial(self.tokenizer.decode, skip_special_tokens=False)
        targets = decode([index for index, trained in zip(chat.ids, chat.trained, strict=True) if trained])
        if targets == mend("".join(spans), breaker):
            return True
        alone = [index for span in spans for index in self._encoder.encode([(span, True)], breaker)[0]]
        return without_whitespace(targets) == without_whitespace(decode(alone))


def _segments(text: str, spans: list[Span]) -> list[tuple[str, bool]]:
    """(text, whether it is a target), in order."""
    segments, at = [], 0
    for begin, end in spans:
        segments += [(text[at:begin], False), (text[begin:end], True)]
        at = end
    return [*segments, (text[at:], False)]


def _prepared(messages: Sequence[Message]) -> list[Message]:
    """The messages, the arguments of calls as objects, which templates write as JSON themselves, their content as text.

    Raises:
        ValueError: no messages, one that is no message, or arguments that are no JSON.
    """
    if not messages:
        raise ValueError("a conversation needs at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f'messages[{index}] must be an object with a "role", not {message!r}')
    return [_with_objects(message) if message.get("tool_calls") else message for message in messages]


def _with_objects(message: Message) -> Message:
    calls = []
    for call in message["tool_calls"]:
        function = _function(call, "a call")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                function = {**function, "arguments": json.loads(arguments)}
            except ValueError as error:
                raise ValueError(f"the arguments of the call of {function['name']!r} are no JSON: {error}") from None
        calls.append({**call, "function": function} if "function" in call else function)
    # Of the templates that are around some write a null as "None" or stumble over it, and none needs it.
    content = "" if message.get("content") is None else message["content"]
    return {**message, "content": content, "tool_calls": calls}


def _require_tools(text: str, tools: Sequence[Any] | None) -> None:
    for tool in tools or ():
        name = _function(tool, "a tool")["name"]
        if name not in text:
            raise ValueError(f"the chat template leaves out the tools ({name!r}): it knows none")


def _function(value: Any, what: str) -> dict[str, Any]:
    """What stands in "function", or the value itself where a call or tool is written without it."""
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{what} must be an object with the name of a function, not {value!r}")
    return function


def _named(setting: Any) -> dict[str, str]:
    """Templates by name, from the forms in which tokenizer_config.json has them.

    Raises:
        ValueError: another form.
    """
    if not setting:
        return {}
    items = [{"name": "default", "template": setting}] if isinstance(setting, str) else setting
    try:
        named = {item["name"]: item["template"] for item in items}
    except (TypeError, KeyError):
        named = {}
    if not named or not all(isinstance(text, str) for text in (*named, *named.values())):
        raise ValueError("chat_template must be a string or a list of {name, template}")
    return named


def with_system(messages: Sequence[Message], prompt: str | None) -> list[Message]:
    """The messages, behind a system prompt if there is one and they bring none of their own."""
    if prompt is None or (messages and messages[0].get("role") == "system"):
        return list(messages)
    return [{"role": "system", "content": prompt}, *messages]


def default_for(tokenizer: Tokenizer) -> str | None:
    """ChatML, if the tokenizer has its special tokens."""
    return CHATML if all(tokenizer.token_to_id(token) in tokenizer.special_ids for token in TOKENS) else None


def _default(tokenizer: Tokenizer) -> dict[str, str]:
    source = default_for(tokenizer)
    if source is None:
        raise ValueError(
            f"{tokenizer.name_or_path} has no chat template, and its tokenizer lacks the special tokens of the default one,"
            f" {' and '.join(TOKENS)}: put a chat_template.jinja into the folder"
        )
    return {"default": source}


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """What a template knows as bos_token, eos_token and so on."""
    named = {key: content_of(value) for key, value in settings.items() if key.endswith("_token")}
    return {key: value for key, value in named.items() if isinstance(value, str)}


def content_of(token: Any) -> Any:
    """A token's spelling: Hugging Face also writes an AddedToken, as an object."""
    return token.get("content") if isinstance(token, dict) else token
