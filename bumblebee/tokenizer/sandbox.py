"""Compiling the Jinja templates of model folders, which are other people's programs, in a sandbox.

What a template may rely on is what transformers gives it: trimmed blocks, ``break`` and ``continue``, ``tojson`` that
leaves characters as they are, ``raise_exception``, ``strftime_now`` and the tag ``{% generation %}``. The sandbox keeps it
from changing its arguments and from reaching Python.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# The variable that holds the pair of characters to be put around what the model writes; unset: nothing is put there.
MARKS = "_bumblebee_generation_marks"


class GenerationTag(Extension):
    """``{% generation %} ... {% endgeneration %}``: the text within is the model's.

    The borders are put into the text itself. Whatever the template does to the text afterwards, they stay at its ends.
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, context: Context, caller: Callable[[], str]) -> str:
        begin, end = context.get(MARKS) or ("", "")
        return f"{begin}{caller()}{end}"


def compile_template(source: str, place: str) -> jinja2.Template:
    """A template ready to render.

    Raises:
        ValueError: it is no valid Jinja; the message begins with ``place``.
    """
    try:
        return ENVIRONMENT.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"{place}: its chat template is no valid Jinja, line {error.lineno}: {error.message}") from None


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, LoopControlExtension]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


ENVIRONMENT = _environment()
