"""Chat templates: from messages to text, and from messages to ids with the targets marked.

Choices:
- A template is rendered as in transformers, in a sandbox, and its text is tokenized without adding special tokens: the template
  itself writes the begin-of-text token where one belongs.
- User text that spells a special token stays text, in contents, names, arguments and tools alike.
- Targets are located in the text, never by token id: the assistant turns, each including the special token that ends it but not
  the newline after it. The text is split where a target begins and ends, because at generation the prompt is tokenized alone.
- Where a template writes no special token at the end of a turn, the one that begins the next turn ends the answer, as in
  GLM-4's generation_config.json; a template whose turns begin with text gets the end-of-text token after the last answer.
- A turn is trained after exactly the prompt from which it is generated. Where a template renders it differently once other
  turns follow, as Qwen3's does, the conversation becomes several sequences; each turn is a target in one of them.
- A template for which this does not hold is rejected, and so is one that omits an answer, a tool call or the tools.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import tokenizers

from bumblebee.tokenizer.assistant_mask import (
    CharSpan,
    Message,
    closing_token,
    end_at_special_tokens,
    remembered,
    require_contents,
    spans_by_prefix,
    spans_by_tags,
    spans_with_prompts,
    target_turns,
    turns_by_context,
    without_whitespace,
)
from bumblebee.tokenizer.chatml import CHATML_TOKENS
from bumblebee.tokenizer.sandbox import GENERATION, MARKS_VARIABLE, compile_template
from bumblebee.tokenizer.special_token_guard import SpecialTokenGuard, unescape
from bumblebee.tokenizer.template_sources import default_template, templates_by_name
from bumblebee.tokenizer.template_tokenizer import TemplateTokenizer

Tool = dict[str, Any]  # as in the OpenAI chat API
PROBE: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]  # shows how a turn ends


@dataclass(frozen=True)
class EncodedChat:
    """The ids of a conversation; ``target_mask[i]`` says whether token i is a target."""

    ids: list[int]
    target_mask: list[bool]


class ChatTemplate:
    """Renders and tokenizes conversations.

    Messages have the form of the OpenAI API: ``{"role", "content", "tool_calls"?, ...}``. The arguments of a call may be an
    object or its JSON text, and the content next to calls may be null. Other keys are passed to the template unchanged.

    Args:
        backend: the library's tokenizer.
        template: ``chat_template`` of tokenizer_config.json: a template, or a list of ``{"name", "template"}``, from which
            "tool_use" is taken if there are tools and "default" otherwise. None selects ChatML.
        special_tokens: variables of the template, such as ``{"bos_token": "<s>"}``.
        name_or_path: the tokenizer's folder, with which errors begin.

    Raises:
        ValueError: the template is not valid Jinja; or there is no template and the tokenizer lacks the tokens of ChatML.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        template: str | Sequence[Mapping[str, str]] | None,
        special_tokens: Mapping[str, str],
        name_or_path: str = "this tokenizer",
    ) -> None:
        self.name_or_path = name_or_path
        with self._name_in_errors():
            self.sources = templates_by_name(template)
        self.sources = self.sources or {"default": _default_source(backend, name_or_path)}
        self._compiled = {name: compile_template(source, name_or_path) for name, source in self.sources.items()}
        self._backend, self._special_tokens = backend, special_tokens
        self._tokenizer = TemplateTokenizer(backend)
        self._spellings = tuple(self._tokenizer.special)
        self._guard = SpecialTokenGuard(self._spellings)
        self._closing: dict[tuple[str, str], str | None] = {}  # by template and role of the next message

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """Render a conversation as text.

        A user's "<|im_end|>" looks like the template's own here; to get ids use :meth:`apply`.

        Raises:
            ValueError: the template cannot render the messages, or omits the tools.
        """
        return unescape(*self._render_escaped(messages, tools, add_generation_prompt))

    def apply(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, add_generation_prompt: bool = False
    ) -> list[int]:
        """Render and tokenize a conversation, for example to generate the next turn.

        Raises:
            ValueError: see :meth:`render`.
        """
        text, escape = self._render_escaped(messages, tools, add_generation_prompt)
        return self._tokenizer.encode([(text, False)], escape)[0]

    def continuation(
        self, messages: Sequence[Message], results: Sequence[Message], tools: Sequence[Tool] | None = None
    ) -> tuple[int, list[int]]:
        """What follows an assistant turn that has been generated, up to where the next one begins.

        Args:
            messages: the conversation, which ends with that turn.
            results: the messages after it, such as tool results.
            tools: function descriptions.

        Returns:
            The id of the special token that ends the turn, and the ids after it. The conversation is thus continued without
            rendering again what has been generated.

        Raises:
            ValueError: see :meth:`render`; or the template renders the turn differently once others follow.
        """
        name = self._template_name(tools)
        escaped, escaped_tools, escape, _ = self._escape([*messages, *results], tools)
        with self._name_in_errors(escape):
            turn = self._render(name, escaped_tools, "", escaped[: len(messages)], False).rstrip()
            text = self._render(name, escaped_tools, "", escaped, True)
            if not text.startswith(turn):
                raise ValueError("the chat template renders an assistant turn differently once tool results follow it")
            end = next((token for token in self._spellings if turn.endswith(token)), None)
            rest = text[len(turn) :]
            if end is None:  # the token that begins the next turn ends this one
                rest = rest.lstrip()
                end = next((token for token in self._spellings if rest.startswith(token)), None)
                if end is None:
                    raise ValueError("the chat template ends assistant turns without a special token")
                rest = rest.removeprefix(end)
        ids, flags = self._tokenizer.encode([(end, False), (rest, True)], escape)
        return ids[0], [token for token, flag in zip(ids, flags, strict=True) if flag]

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, train_on: str = "all") -> EncodedChat:
        """Tokenize a conversation for training as one sequence.

        Args and errors are those of :meth:`encode_turns`.

        Raises:
            ValueError: moreover, the turns need several sequences.
        """
        chats = self.encode_turns(messages, tools, train_on)
        if len(chats) > 1:
            raise ValueError(
                f"{self.name_or_path}: the chat template renders earlier turns differently when others follow, so training on"
                f" all of them takes {len(chats)} sequences; use encode_turns, or train_on: last"
            )
        return chats[0]

    def encode_turns(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, train_on: str = "all"
    ) -> list[EncodedChat]:
        """Tokenize a conversation for training.

        Args:
            messages: the conversation, with at least one assistant message.
            tools: function descriptions, as the template expects them.
            train_on: make "all" assistant turns targets, or only the "last".

        Returns:
            One sequence; several if the template renders earlier turns differently when others follow. Each of them ends with
            an assistant turn in the context from which it is generated, and each turn is a target in one of them.

        Raises:
            ValueError: the template cannot render the messages, omits tools, calls or answers, begins a turn differently than
                its generation prompt, or leaves no special token to end it with; or there is no assistant turn.
        """
        turns = target_turns(messages, train_on)
        name = self._template_name(tools)
        tagged = GENERATION.search(self.sources[name]) is not None
        escaped, escaped_tools, escape, marks = self._escape(messages, tools, marks=2 * tagged)
        with self._name_in_errors(escape):
            render = remembered(partial(self._render, name, escaped_tools, marks))
            groups = [(len(escaped), turns)] if tagged else turns_by_context(render, escaped, turns)
            find_spans = spans_by_tags(marks) if tagged else spans_by_prefix
            texts = []
            for count, group in groups:
                text, spans = find_spans(render, escaped[:count], group)
                text, spans = end_at_special_tokens(
                    text, spans, len(group), self._spellings, partial(self._closing_token, name, "user")
                )
                shown = spans if tagged else spans_with_prompts(render, escaped, group, text, spans)
                answers = [unescape(text[begin:end], escape) for begin, end in shown]
                require_contents("".join(answers), [messages[turn] for turn in group])
                _require_tools(unescape(text, escape), tools)
                texts.append((text, spans))
        return [self._encode_spans(text, spans, escape) for text, spans in texts]

    def _encode_spans(self, text: str, spans: list[CharSpan], escape: str) -> EncodedChat:
        """Tokenize a rendered conversation with some spans as targets."""
        chat = EncodedChat(*self._tokenizer.encode(_split_at(text, spans), escape))
        assert self._decodes_to(chat, [text[begin:end] for begin, end in spans], escape)
        return chat

    @cached_property
    def end_of_turn_id(self) -> int:
        """Id of the special token that ends an assistant turn before a user's, at which generation stops.

        Raises:
            ValueError: no special token ends turns.
        """
        chat = self.encode(PROBE)
        return next(token for token, is_target in zip(reversed(chat.ids), reversed(chat.target_mask), strict=True) if is_target)

    @cached_property
    def end_of_turn_ids(self) -> list[int]:
        """``end_of_turn_id``, and in a template where the next turn ends an answer, the ids that begin tool results.

        Raises:
            ValueError: no special token ends turns.
        """
        ids, rendered = [self.end_of_turn_id], self._render_or_none("default", PROBE)
        token = self._backend.id_to_token(ids[0])
        if rendered is not None and rendered.rstrip().endswith(token):
            return ids  # the template ends turns itself
        closing = [self._closing_token("default", role) or "" for role in ("tool", "observation")]
        return list(dict.fromkeys([*ids, *(self._tokenizer.special[text.strip()] for text in closing if text)]))

    def _closing_token(self, name: str, next_role: str) -> str | None:
        """What ends an answer that is followed by a message of a role, if the template does not end turns itself."""
        if (name, next_role) not in self._closing:
            eos = self._special_tokens.get("eos_token")
            first = self._render_or_none(name, PROBE)
            both = self._render_or_none(name, [*PROBE, {"role": next_role, "content": "c"}])
            eos = eos if eos in self._spellings else None
            if first is not None and both is not None:
                self._closing[name, next_role] = closing_token(first, both, self._spellings, eos)
            else:
                self._closing[name, next_role] = eos
        return self._closing[name, next_role]

    def _render_or_none(self, name: str, messages: Sequence[Message]) -> str | None:
        """Render messages that a template may reject."""
        try:
            return self._render(name, None, "", messages, False)
        except ValueError:
            return None

    def _render_escaped(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None, add_generation_prompt: bool
    ) -> tuple[str, str]:
        """The rendered text, and the escape character in it."""
        name = self._template_name(tools)
        escaped, escaped_tools, escape, _ = self._escape(messages, tools)
        with self._name_in_errors(escape):
            text = self._render(name, escaped_tools, "", escaped, add_generation_prompt)
            _require_tools(unescape(text, escape), tools)
        return text, escape

    def _escape(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None, marks: int = 0
    ) -> tuple[list[Message], Sequence[Tool] | None, str, str]:
        """Escaped messages and tools, the escape character, and as many ``marks`` that occur in neither."""
        with self._name_in_errors():
            (escaped, escaped_tools), escape, unused = self._guard.escape((_normalize(messages), tools), marks)
        return escaped, escaped_tools, escape, unused

    def _template_name(self, tools: Sequence[Tool] | None) -> str:
        name = "tool_use" if tools is not None and "tool_use" in self.sources else "default"
        if name not in self.sources:
            names = ", ".join(map(repr, self.sources))
            raise ValueError(f"{self.name_or_path}: no chat template is named {name!r}, only {names}")
        return name

    def _render(
        self, name: str, tools: Sequence[Tool] | None, marks: str, messages: Sequence[Message], add_generation_prompt: bool
    ) -> str:
        variables = {**self._special_tokens, "messages": messages, "tools": tools, "documents": None, MARKS_VARIABLE: marks}
        try:
            return self._compiled[name].render(**variables, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is third-party code: it may raise anything
            raise ValueError(f"the chat template cannot render this conversation: {error or type(error).__name__}") from error

    @contextmanager
    def _name_in_errors(self, escape: str = "") -> Iterator[None]:
        """Prefix errors with the tokenizer's folder."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.name_or_path}: {unescape(str(error), escape)}") from error.__cause__

    def _decodes_to(self, chat: EncodedChat, spans: list[str], escape: str) -> bool:
        """Whether the targets decode to these texts, except for what the tokenizer never preserves (blanks, Unicode forms)."""
        decode = partial(self._backend.decode, skip_special_tokens=False)
        targets = decode([token for token, is_target in zip(chat.ids, chat.target_mask, strict=True) if is_target])
        if targets == unescape("".join(spans), escape):
            return True
        encoded_alone = [token for span in spans for token in self._tokenizer.encode([(span, True)], escape)[0]]
        return without_whitespace(targets) == without_whitespace(decode(encoded_alone))


def with_system(messages: Sequence[Message], prompt: str | None) -> list[Message]:
    """The messages, with a system prompt in front if ``prompt`` is not None and they do not begin with one."""
    if prompt is None or (messages and messages[0].get("role") == "system"):
        return list(messages)
    return [{"role": "system", "content": prompt}, *messages]


def _default_source(backend: tokenizers.Tokenizer, name_or_path: str) -> str:
    source = default_template(backend)
    if source is None:
        raise ValueError(
            f"{name_or_path} has no chat template, and its tokenizer lacks the special tokens of the default one,"
            f" {' and '.join(CHATML_TOKENS)}: add a chat_template.jinja to the folder, or train with --data.chat_template"
            " FILE or --data.chat_template chatml"
        )
    return source


def _split_at(text: str, spans: list[CharSpan]) -> list[tuple[str, bool]]:
    """Split a text into (text, whether it is a target), in order."""
    segments, at = [], 0
    for begin, end in spans:
        segments += [(text[at:begin], False), (text[begin:end], True)]
        at = end
    return [*segments, (text[at:], False)]


def _normalize(messages: Sequence[Message]) -> list[Message]:
    """The messages with the arguments of calls as objects, which templates serialize themselves.

    Raises:
        ValueError: there are no messages, one is not a message, or arguments are not valid JSON.
    """
    if not messages:
        raise ValueError("a conversation needs at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f'messages[{index}] must be an object with a "role", not {message!r}')
    return [_parse_arguments(message) if message.get("tool_calls") else message for message in messages]


def _parse_arguments(message: Message) -> Message:
    calls = []
    for call in message["tool_calls"]:
        function = _function_of(call, "a call")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                function = {**function, "arguments": json.loads(arguments)}
            except ValueError as error:
                raise ValueError(f"the arguments of the call of {function['name']!r} are not valid JSON: {error}") from None
        calls.append({**call, "function": function} if "function" in call else function)
    # Some templates render a null as "None" or fail on it, and none needs it.
    content = "" if message.get("content") is None else message["content"]
    return {**message, "content": content, "tool_calls": calls}


def _require_tools(text: str, tools: Sequence[Tool] | None) -> None:
    for tool in tools or ():
        name = str(_function_of(tool, "a tool")["name"])
        if name not in text:
            raise ValueError(f"the chat template omits the tools ({name!r}): it does not support them")


def _function_of(value: object, what: str) -> dict[str, object]:
    """The "function" of a call or tool, or the value itself if it is written without that key."""
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{what} must be an object with the name of a function, not {value!r}")
    return function
