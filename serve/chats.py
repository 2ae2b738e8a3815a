"""Conversations as the model's chat template writes them.

Nothing that a request says is left out of the prompt: a name or a call that the template does not write is refused. (The name
in a tool's result is not: its tool_call_id says which it is.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from bumblebee.tokenizer.chat_template import ChatTemplate, with_system
from bumblebee.tokenizer.tokenizer import Tokenizer
from serve.api_errors import invalid
from serve.schemas import Message, Tool
from serve.tool_call_format import CallFormat

Plain = dict[str, Any]  # a message as chat templates know it


class Chats:
    """From messages to ids.

    Args:
        tokenizer: the model's.
        system_prompt: for conversations that bring none.
    """

    def __init__(self, tokenizer: Tokenizer, system_prompt: str | None = None) -> None:
        self.tokenizer, self.system_prompt = tokenizer, system_prompt

    def ids(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        """The prompt whose continuation is the next answer.

        Raises:
            Fault: 400; the model cannot chat or cannot call tools, or its template refuses the messages or leaves something
                out.
        """
        template = self._template
        if tools and self.calls is None:
            raise invalid("the model's chat template has no calls of tools that this server could read", "tools")
        described = [tool.model_dump(exclude_none=True) for tool in tools] or None
        plain = with_system([message.plain() for message in messages], self.system_prompt)
        written = self.calls.rewrite(plain) if self.calls else plain
        try:
            _require_all(template, written, plain, described)
            return template.apply(written, described, True)
        except ValueError as error:
            raise invalid(str(error).removeprefix(f"{template.name_or_path}: "), "messages") from None

    @cached_property
    def calls(self) -> CallFormat | None:
        """How the template writes calls of tools; None if it does not, or in no way that is known here."""
        try:
            return CallFormat.of(self.tokenizer)
        except ValueError:
            return None

    @property
    def _template(self) -> ChatTemplate:
        try:
            return self.tokenizer.chat_template
        except ValueError:
            said = "the model has no chat template, so it cannot chat; POST /v1/completions continues texts"
            raise invalid(said, "messages", "no_chat_template") from None


def _require_all(template: ChatTemplate, written: list[Plain], plain: list[Plain], tools: Any) -> None:
    """That names and calls are in the prompt."""
    calls = dict.fromkeys(call["function"]["name"] for message in plain for call in message.get("tool_calls", ()))
    nameless = [message if message["role"] == "tool" else _without_name(message) for message in written]
    if not calls and nameless == written:
        return
    text = template.render(written, tools, True)
    if missing := [name for name in calls if name not in text]:
        raise ValueError(f"the model's chat template leaves out calls of tools ({missing[0]!r})")
    if nameless != written and template.render(nameless, tools, True) == text:
        raise ValueError("the model's chat template has no names of those who write: leave name out")


def _without_name(message: Plain) -> Plain:
    return {key: value for key, value in message.items() if key != "name"}
