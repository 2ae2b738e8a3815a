"""Slash commands of the chat."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from bumblebee.inference.sampling.sampling_params import SamplingParams
from bumblebee.utils.formatting import hint, plural, system_error

if TYPE_CHECKING:
    from serve.terminal.backends import Sampling
    from serve.terminal.chat import Chat

UNSUPPORTED_SAMPLING = ("logprobs", "spelled_ids")  # their results have no place in a terminal chat
SETTINGS = tuple(field.name for field in fields(SamplingParams) if field.name not in UNSUPPORTED_SAMPLING)


@dataclass(frozen=True)
class Command:
    """A slash command.

    Args:
        run: takes the chat and the text after the command's name, and returns False on failure; a ValueError or an OSError
            is printed in one line.
        usage: the argument, for /help.
        help: what the command does.
        words: completions of the argument.
    """

    run: Callable[[Chat, str], bool | None]
    usage: str
    help: str
    words: tuple[str, ...] = ()


def run_command(chat: Chat, text: str) -> bool:
    """Run the command in ``text``. Returns whether it succeeded."""
    name, _, argument = text.strip().partition(" ")
    command = COMMANDS.get(name)
    try:
        if command is None:
            advice = hint(name, COMMANDS) or "; /help lists the commands"
            raise ValueError(f"unknown command {name}{advice} (to send it as a question, start with a space)")
        return command.run(chat, argument.strip()) is not False
    except (ValueError, OSError) as error:
        chat.screen.error(system_error(error) if isinstance(error, OSError) else str(error))
        return False


def _reset(chat: Chat, argument: str) -> None:
    chat.conversation.turns.clear()
    chat.unanswered = None
    chat.screen.note("started a new conversation")


def _system(chat: Chat, text: str) -> None:
    if text and chat.backend.raw:
        raise ValueError("/system: plain-text continuation has no system prompt")
    if text:
        chat.conversation.system = None if text in ('""', "''") else text
    system = chat.conversation.system
    chat.screen.note("no system prompt" if system is None else f"system prompt: {system}")


def _retry(chat: Chat, argument: str) -> bool:
    question = chat.unanswered
    if question is None:
        if not chat.conversation.turns:
            raise ValueError("/retry: there is no question to send again")
        question, _ = chat.conversation.turns.pop()
    return chat.ask(question)


def _set(chat: Chat, text: str) -> None:
    name, _, value = text.partition(" ")
    if name and name not in SETTINGS:
        raise ValueError(f"/set: unknown setting {name!r}{hint(name, SETTINGS) or '; expected one of ' + ', '.join(SETTINGS)}")
    if value:
        chat.sampling = with_setting(chat.sampling, name, value.strip())
    for setting in [name] if name else SETTINGS:
        chat.screen.note(f"{setting} {json.dumps(chat.sampling.get(setting), ensure_ascii=False)}")


def with_setting(sampling: Sampling, name: str, text: str) -> Sampling:
    """A copy of the sampling options with ``name`` set to a JSON value or a string; ``null`` restores the model's default.

    Raises:
        ValueError: a value of the wrong type or out of its range.
    """
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if name == "stop" and isinstance(value, str):
        value = [value]
    if name == "logit_bias" and isinstance(value, dict):  # JSON keys are strings
        value = {int(key) if key.isdigit() else key: bias for key, bias in value.items()}
    unchanged = {key: old for key, old in sampling.items() if key != name}
    if value is None:
        return unchanged
    SamplingParams(**{name: value})
    return {**unchanged, name: value}


def _save(chat: Chat, file: str) -> None:
    if not file:
        raise ValueError("/save: expected a file name that ends in .json or .md")
    chat.screen.note(f"saved {chat.conversation.save(file)}")


def _load(chat: Chat, file: str) -> None:
    if not file:
        raise ValueError("/load: expected the name of a .json file written by /save")
    chat.conversation.load(file)
    chat.screen.note(f"loaded {plural(len(chat.conversation.turns), 'turn')}")


def _help(chat: Chat, argument: str) -> None:
    width = max(len(f"{name} {command.usage}") for name, command in COMMANDS.items())
    for name, command in COMMANDS.items():
        chat.screen.note(f"{f'{name} {command.usage}':<{width}}  {command.help}")


def _quit(chat: Chat, argument: str) -> None:
    chat.finished = True


COMMANDS = {
    "/reset": Command(_reset, "", "start a new conversation, keeping the system prompt"),
    "/system": Command(_system, "[TEXT]", 'set the system prompt ("" removes it), or show it'),
    "/retry": Command(_retry, "", "send the last question again"),
    "/set": Command(
        _set, "[NAME [VALUE]]", "set a sampling option, e.g. /set temperature 0.3 (null: the model's default)", SETTINGS
    ),
    "/save": Command(_save, "FILE", "save the conversation to a .json or .md file"),
    "/load": Command(_load, "FILE", "continue the conversation of a .json file"),
    "/help": Command(_help, "", "list the commands"),
    "/quit": Command(_quit, "", "exit, like Ctrl-D"),
}
FILE_COMMANDS = ("/save", "/load")
