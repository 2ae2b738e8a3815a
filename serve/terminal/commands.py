"""The commands of the chat: inputs that begin with a slash."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from bumblebee.formatting import hint
from bumblebee.inference.sampling_params import SamplingParams
from serve.terminal.options import NOT_OFFERED

if TYPE_CHECKING:
    from serve.terminal.chat import Chat

SETTINGS = tuple(field.name for field in fields(SamplingParams) if field.name not in NOT_OFFERED)


@dataclass(frozen=True)
class Command:
    """One of them.

    Args:
        run: does it, with the text behind its name; a ValueError or an OSError is told in one line.
        takes: what stands behind its name.
        help: what it does.
        words: what may stand behind its name, for Tab.
    """

    run: Callable[[Chat, str], Any]
    takes: str
    help: str
    words: tuple[str, ...] = ()


def run(chat: Chat, text: str) -> bool:
    """Do what a command says. Returns whether it could be done."""
    name, _, rest = text.strip().partition(" ")
    command = COMMANDS.get(name)
    try:
        if command is None:
            advice = hint(name, COMMANDS) or "; /help lists them"
            raise ValueError(f"there is no command {name}{advice} (a space before it makes it a question)")
        return command.run(chat, rest.strip()) is not False
    except (ValueError, OSError) as error:
        chat.screen.error(f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error))
        return False


def _reset(chat: Chat, rest: str) -> None:
    chat.conversation.turns.clear()
    chat.unanswered = None
    chat.screen.note("a new conversation")


def _system(chat: Chat, text: str) -> None:
    if text and chat.partner.raw:
        raise ValueError("/system: there is no place for a system prompt where text is continued")
    if text:
        chat.conversation.system = None if text in ('""', "''") else text
    system = chat.conversation.system
    chat.screen.note("no system prompt" if system is None else f"system prompt: {system}")


def _retry(chat: Chat, rest: str) -> bool:
    question = chat.unanswered
    if question is None:
        if not chat.conversation.turns:
            raise ValueError("/retry: nothing has been asked")
        question, _ = chat.conversation.turns.pop()
    return chat.ask(question)


def _set(chat: Chat, text: str) -> None:
    name, _, written = text.partition(" ")
    if name and name not in SETTINGS:
        raise ValueError(f"/set: there is no setting {name!r}{hint(name, SETTINGS) or '; there are ' + ', '.join(SETTINGS)}")
    if written:
        chat.sampling = changed(chat.sampling, name, written.strip())
    for each in [name] if name else SETTINGS:
        chat.screen.note(f"{each} {json.dumps(chat.sampling.get(each, None), ensure_ascii=False)}")


def changed(sampling: dict[str, Any], name: str, written: str) -> dict[str, Any]:
    """The settings with another value of one; ``null`` leaves it to the model.

    Raises:
        ValueError: a value of the wrong kind or out of its range.
    """
    try:
        value = json.loads(written)
    except ValueError:
        value = written
    if name == "stop" and isinstance(value, str):
        value = [value]
    if name == "logit_bias" and isinstance(value, dict):  # JSON's keys are texts
        value = {int(key) if key.isdigit() else key: bias for key, bias in value.items()}
    kept = {key: kept for key, kept in sampling.items() if key != name}
    if value is None:
        return kept
    SamplingParams(**{name: value})
    return {**kept, name: value}


def _save(chat: Chat, file: str) -> None:
    if not file:
        raise ValueError("/save: expected a file name that ends in .json or .md")
    chat.screen.note(f"saved: {chat.conversation.save(file)}")


def _load(chat: Chat, file: str) -> None:
    if not file:
        raise ValueError("/load: expected the name of a file that /save has written")
    chat.conversation.load(file)
    chat.screen.note(f"{len(chat.conversation.turns)} questions with answers")


def _help(chat: Chat, rest: str) -> None:
    wide = max(len(f"{name} {command.takes}") for name, command in COMMANDS.items())
    for name, command in COMMANDS.items():
        chat.screen.note(f"{f'{name} {command.takes}':<{wide}}  {command.help}")


def _quit(chat: Chat, rest: str) -> None:
    chat.over = True


COMMANDS = {
    "/reset": Command(_reset, "", "begin a new conversation; the system prompt stays"),
    "/system": Command(_system, "[TEXT]", 'set the system prompt, "" removes it; alone, show it'),
    "/retry": Command(_retry, "", "ask the last question again"),
    "/set": Command(
        _set, "[NAME [VALUE]]", "how tokens are chosen: /set temperature 0.3; null leaves it to the model", SETTINGS
    ),
    "/save": Command(_save, "FILE", "write the conversation to a .json or .md file"),
    "/load": Command(_load, "FILE", "go on with a conversation from a .json file"),
    "/help": Command(_help, "", "show this list"),
    "/quit": Command(_quit, "", "leave; so does Ctrl-D"),
}
OF_FILES = ("/save", "/load")
