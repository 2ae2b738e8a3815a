"""How a model writes calls of tools, found out from its chat template.

Models write calls in many ways, and a folder does not say in which. But its template writes the calls of earlier turns, and a
model is trained on what its template writes: so known calls are rendered, and the text around their names and arguments tells
the format. Found in this way are

- objects: ``<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>`` (Hermes, Qwen, our ChatML),
  ``[TOOL_CALLS] [{...}, {...}]`` (Mistral), ``{"name": ..., "parameters": {...}}`` without any mark (Llama 3);
- heads, the name before the arguments: ``[TOOL_CALLS]name[ARGS]{...}`` (newer ones of Mistral), ``name\\n{...}`` (GLM-4, whose
  template knows calls as messages with "metadata").
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bumblebee.tokenizer.assistant_mask import without_whitespace
from bumblebee.tokenizer.chat_template import ChatTemplate
from bumblebee.tokenizer.tokenizer import Tokenizer

Message = dict[str, Any]
Rewrite = Callable[[Sequence[Message]], list[Message]]
# Where one call stands in a text: its begin and end, and what is between name and arguments (None: both are in an object).
Place = tuple[int, int, str | None]

Marks = tuple[str, str, str, str | None]  # opening, joint, closing, between

SAID = "bumblebee_said"  # text before calls
# The calls that are rendered to see how a template writes calls. Mistral's template wants ids of nine characters.
PROBES = {name: {f"{name}_key": f"{name}_value"} for name in ("bumblebee_first", "bumblebee_second")}


@dataclass(frozen=True)
class CallFormat:
    """How calls are written. Blanks in the marks do not count.

    Args:
        opening: before the first call.
        joint: between two calls; empty where there is never more than one.
        closing: behind the last call.
        between: what stands between name and arguments; None where both are in one object.
        spelled: ids of special tokens among the marks, which the text of an answer has to have too.
        rewrite: from OpenAI's messages to those that the template understands.
    """

    opening: str
    joint: str
    closing: str
    between: str | None
    spelled: tuple[int, ...]
    rewrite: Rewrite

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> CallFormat | None:
        """The format of a folder's template; None if it writes no calls, or writes them in none of these ways.

        Raises:
            ValueError: there is no chat template.
        """
        ends = _ends(tokenizer)
        special = {token.content: id for id, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
        for rewrite in (list, with_metadata):
            for number in (2, 1):  # some templates refuse more than one
                alone, said = (_before(_probe(tokenizer.chat_template, rewrite, number, text), ends) for text in ("", SAID))
                if (marks := _marks(alone, number)) is not None:
                    marks = _without_preface(marks, _marks(said.rpartition(SAID)[2], number))
                    spelled = tuple(id for token, id in special.items() if any(token in mark for mark in marks if mark))
                    return cls(*marks, spelled, rewrite)
        return None


def with_metadata(messages: Sequence[Message]) -> list[Message]:
    """Messages as GLM-4's template knows them: the name of a call as metadata, results as observations."""
    written: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            written.append({"role": "observation", "content": message["content"]})
            continue
        if message.get("content") or not message.get("tool_calls"):
            written.append({key: value for key, value in message.items() if key != "tool_calls"})
        for call in message.get("tool_calls") or ():
            function = call["function"]
            written.append({"role": "assistant", "metadata": function["name"], "content": function["arguments"]})
    return written


def named(content: Any) -> tuple[str, dict[str, Any]] | None:
    """The name and the arguments in an object that is a call; None if it is none."""
    content = content.get("function", content) if isinstance(content, dict) else None
    if not (isinstance(content, dict) and isinstance(content.get("name"), str)):
        return None
    arguments = content.get("arguments", content.get("parameters", {}))
    return (content["name"], arguments) if isinstance(arguments, dict) else None


def _probe(template: ChatTemplate, rewrite: Rewrite, number: int, said: str) -> str:
    """What the template writes for an assistant's turn of a text and so many calls; empty if it refuses it."""
    functions = list(PROBES.items())[:number]
    calls = [
        {"id": f"bumblebe{at}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for at, (name, arguments) in enumerate(functions)
    ]
    tools = [
        {"type": "function", "function": {"name": name, "description": "", "parameters": {"type": "object", "properties": {}}}}
        for name, _ in functions
    ]
    question = {"role": "user", "content": "?"}
    try:
        prompt = template.render(rewrite([question]), tools, True)
        whole = template.render(rewrite([question, {"role": "assistant", "content": said, "tool_calls": calls}]), tools)
    except ValueError:
        return ""
    return whole[len(os.path.commonprefix([prompt, whole])) :]


def _ends(tokenizer: Tokenizer) -> list[str]:
    """Spellings of what ends a turn."""
    ids = {tokenizer.eos_token_id, *tokenizer.end_of_turn_ids}
    return [spelling for id in ids if id is not None and (spelling := tokenizer.backend.id_to_token(id))]


def _before(text: str, ends: Sequence[str]) -> str:
    """A text up to the first of some ends."""
    return text[: min([len(text), *(at for end in ends if (at := text.find(end)) >= 0)])]


def _without_preface(marks: Marks, behind_text: Marks | None) -> Marks:
    """The marks without what the template puts before every answer, calls or not: empty reasoning, for instance."""
    if behind_text and marks[0].endswith(behind_text[0]):
        return (behind_text[0], *marks[1:])
    return marks


def _marks(answer: str, number: int) -> Marks | None:
    """The marks of an answer with the first calls; None if they are not in it."""
    places: list[Place] = []
    for name, arguments in list(PROBES.items())[:number]:
        place = _object(answer, name, arguments) or _head(answer, name, arguments)
        if place is None:
            return None
        places.append(place)
    first, last = places[0], places[-1]
    joint = answer[first[1] : last[0]] if number > 1 else ""
    between = None if first[2] is None else without_whitespace(first[2])
    return without_whitespace(answer[: first[0]]), without_whitespace(joint), without_whitespace(answer[last[1] :]), between


def _object(text: str, name: str, arguments: dict[str, Any]) -> Place | None:
    for begin, end, content in _objects(text):
        if named(content) == (name, arguments):
            return begin, end, None
    return None


def _head(text: str, name: str, arguments: dict[str, Any]) -> Place | None:
    at = text.find(name)
    for begin, end, content in _objects(text):
        if at >= 0 and begin > at and content == arguments:
            return at, end, text[at + len(name) : begin]
    return None


def _objects(text: str) -> Iterator[tuple[int, int, Any]]:
    """(begin, end, content) of every JSON object in a text."""
    for begin in (at for at, character in enumerate(text) if character == "{"):
        try:
            content, end = json.JSONDecoder().raw_decode(text, begin)
        except ValueError:
            continue
        yield begin, end, content
