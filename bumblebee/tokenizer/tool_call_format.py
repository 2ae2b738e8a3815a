"""Detects from its chat template how a model writes tool calls.

Models write tool calls in many formats, and a model folder does not name its format. But the template renders the tool calls
of earlier turns, and a model is trained on what its template renders. So known calls are rendered, and the text around their
names and arguments gives the format. These are detected:

- objects: ``<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>`` (Hermes, Qwen, our ChatML),
  ``[TOOL_CALLS] [{...}, {...}]`` (Mistral), ``{"name": ..., "parameters": {...}}`` without any marker (Llama 3);
- a name before the arguments: ``[TOOL_CALLS]name[ARGS]{...}`` (newer Mistral models), ``name\\n{...}`` (GLM-4, whose template
  expects calls as messages with "metadata").
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bumblebee.tokenizer.assistant_mask import without_whitespace
from bumblebee.tokenizer.chat_template import ChatTemplate
from bumblebee.tokenizer.tokenizer import Tokenizer

Message = dict[str, Any]
Rewrite = Callable[[Sequence[Message]], list[Message]]
# Position of a call in a text: start, end, and what separates name and arguments (None: both are in one object).
Location = tuple[int, int, str | None]

Markers = tuple[str, str, str, str | None]  # opening, separator, closing, name_separator

PROBE_TEXT = "bumblebee_said"  # text before calls
# The calls that are rendered to detect the format. Mistral's template requires ids of nine characters.
PROBES = {name: {f"{name}_key": f"{name}_value"} for name in ("bumblebee_first", "bumblebee_second")}


@dataclass(frozen=True)
class ToolCallFormat:
    """How tool calls are written. Whitespace in the markers is ignored.

    Args:
        opening: marker before the first call.
        separator: between two calls; empty if there is at most one call.
        closing: marker after the last call.
        name_separator: between name and arguments; None if both are in one object.
        marker_ids: ids of special tokens in the markers, which the output text must contain.
        rewrite: converts OpenAI's messages to those that the template expects.
    """

    opening: str
    separator: str
    closing: str
    name_separator: str | None
    marker_ids: tuple[int, ...]
    rewrite: Rewrite

    @classmethod
    def detect(cls, tokenizer: Tokenizer) -> ToolCallFormat | None:
        """Detect the format of a tokenizer's chat template; None if it renders no calls, or in an unknown format.

        Raises:
            ValueError: there is no chat template.
        """
        ends = _end_markers(tokenizer)
        special = {token.content: id for id, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
        for rewrite in (list, with_metadata):
            for number in (2, 1):  # some templates reject more than one call
                calls, calls_after_text = (
                    _until(_render_probe(tokenizer.chat_template, rewrite, number, text), ends) for text in ("", PROBE_TEXT)
                )
                if (markers := _markers(calls, number)) is not None:
                    markers = _without_preface(markers, _markers(calls_after_text.rpartition(PROBE_TEXT)[2], number))
                    ids = tuple(id for token, id in special.items() if any(token in marker for marker in markers if marker))
                    return cls(*markers, ids, rewrite)
        return None


def with_metadata(messages: Sequence[Message]) -> list[Message]:
    """Convert messages for GLM-4's template: the name of a call is metadata, and tool results are observations."""
    converted: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            converted.append({"role": "observation", "content": message["content"]})
            continue
        if message.get("content") or not message.get("tool_calls"):
            converted.append({key: value for key, value in message.items() if key != "tool_calls"})
        for call in message.get("tool_calls") or ():
            function = call["function"]
            converted.append({"role": "assistant", "metadata": function["name"], "content": function["arguments"]})
    return converted


def name_and_arguments(content: object) -> tuple[str, dict[str, Any]] | None:
    """The name and the arguments of a call in object form; None if the content is not a call."""
    call = content.get("function", content) if isinstance(content, dict) else None
    if not (isinstance(call, dict) and isinstance(call.get("name"), str)):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    return (call["name"], arguments) if isinstance(arguments, dict) else None


def _render_probe(template: ChatTemplate, rewrite: Rewrite, number: int, text: str) -> str:
    """What the template renders for an assistant turn of a text and ``number`` calls; empty if it rejects them."""
    functions = list(PROBES.items())[:number]
    calls = [
        {"id": f"bumblebe{index}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for index, (name, arguments) in enumerate(functions)
    ]
    tools = [
        {"type": "function", "function": {"name": name, "description": "", "parameters": {"type": "object", "properties": {}}}}
        for name, _ in functions
    ]
    question = {"role": "user", "content": "?"}
    try:
        prompt = template.render(rewrite([question]), tools, True)
        conversation = template.render(rewrite([question, {"role": "assistant", "content": text, "tool_calls": calls}]), tools)
    except ValueError:
        return ""
    return conversation[len(os.path.commonprefix([prompt, conversation])) :]


def _end_markers(tokenizer: Tokenizer) -> list[str]:
    """The tokens that end a turn, as text."""
    ids = {tokenizer.eos_token_id, *tokenizer.end_of_turn_ids}
    return [token for id in ids if id is not None and (token := tokenizer.backend.id_to_token(id))]


def _until(text: str, ends: Sequence[str]) -> str:
    """A text up to the first of several end markers."""
    return text[: min([len(text), *(position for end in ends if (position := text.find(end)) >= 0)])]


def _without_preface(markers: Markers, markers_after_text: Markers | None) -> Markers:
    """The markers without what the template renders before every answer, such as an empty reasoning block."""
    if markers_after_text and markers[0].endswith(markers_after_text[0]):
        return (markers_after_text[0], *markers[1:])
    return markers


def _markers(answer: str, number: int) -> Markers | None:
    """The markers around the first ``number`` probes in an answer; None if they are not in it."""
    locations: list[Location] = []
    for name, arguments in list(PROBES.items())[:number]:
        location = _locate_object(answer, name, arguments) or _locate_name(answer, name, arguments)
        if location is None:
            return None
        locations.append(location)
    first, last = locations[0], locations[-1]
    separator = answer[first[1] : last[0]] if number > 1 else ""
    name_separator = None if first[2] is None else without_whitespace(first[2])
    return (
        without_whitespace(answer[: first[0]]),
        without_whitespace(separator),
        without_whitespace(answer[last[1] :]),
        name_separator,
    )


def _locate_object(text: str, name: str, arguments: Mapping[str, str]) -> Location | None:
    for start, end, content in _json_objects(text):
        if name_and_arguments(content) == (name, arguments):
            return start, end, None
    return None


def _locate_name(text: str, name: str, arguments: Mapping[str, str]) -> Location | None:
    position = text.find(name)
    for start, end, content in _json_objects(text):
        if position >= 0 and start > position and content == arguments:
            return position, end, text[position + len(name) : start]
    return None


def _json_objects(text: str) -> Iterator[tuple[int, int, object]]:
    """(start, end, content) of every JSON object in a text."""
    for start in (position for position, character in enumerate(text) if character == "{"):
        try:
            content, end = json.JSONDecoder().raw_decode(text, start)
        except ValueError:
            continue
        yield start, end, content
