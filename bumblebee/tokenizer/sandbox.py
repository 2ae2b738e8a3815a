"""Compiles the Jinja templates of model folders, which are third-party programs, in a sandbox.

Templates get the environment that transformers gives them: trimmed blocks, ``break`` and ``continue``, a ``tojson`` that does
not escape characters, ``raise_exception``, ``strftime_now`` and the tag ``{% generation %}``. The sandbox keeps a template from
modifying its arguments and from reaching Python internals.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# The template variable with the two characters to write around generated text; if unset, nothing is written.
MARKS_VARIABLE = "_bumblebee_generation_marks"


class GenerationTag(Extension):
    """``{% generation %} ... {% endgeneration %}``: encloses the text that the model generates.

    The marks become part of the text, so they stay at its ends whatever the template does with it afterwards.
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_with_marks", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _with_marks(self, context: Context, caller: Callable[[], str]) -> str:
        begin, end = context.get(MARKS_VARIABLE) or ("", "")
        return f"{begin}{caller()}{end}"


def compile_template(source: str, name_or_path: str) -> jinja2.Template:
    """Compile a template.

    Raises:
        ValueError: the source is not valid Jinja; the message begins with ``name_or_path``.
    """
    try:
        return ENVIRONMENT.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        reason = f"line {error.lineno}: {error.message}"
        raise ValueError(f"{name_or_path}: the chat template is not valid Jinja, {reason}") from None


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, LoopControlExtension]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


ENVIRONMENT = _environment()
