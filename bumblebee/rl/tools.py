"""Tools: Python functions that a model may call in its completions, described to it by their signatures and docstrings."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.errors import PydanticUserError

from bumblebee.rewards.reward import name_of
from bumblebee.tokenizer.chat_template import Tool

_ARGUMENT = re.compile(r"^(\w+)\s*(?:\([^)]*\))?:\s*(.*)$")


@dataclass(frozen=True)
class ToolResult:
    """What a call gave.

    Args:
        text: the result, or what is wrong with the call.
        is_error: whether it is the latter.
    """

    text: str
    is_error: bool = False


class PythonTool:
    """A Python function as a tool.

    The model sees its name, the docstring's text before ``Args:``, and a JSON schema of its parameters with the texts below
    ``Args:``. Parameters have type hints that JSON can express.

    Args:
        function: a function, or an object with ``__call__``.

    Raises:
        ValueError: there is no docstring, or a parameter has no type hint or one that JSON cannot express.
    """

    def __init__(self, function: Callable[..., object]) -> None:
        self.function, self.name = function, name_of(function)
        call = function if inspect.isroutine(function) else type(function).__call__
        docstring = inspect.getdoc(function if inspect.isroutine(function) else type(function)) or ""
        if not docstring:
            raise ValueError(f"{self.name} has no docstring, which tells the model what it does")
        self._description, self._arguments = _parse_docstring(docstring)
        self._hints = get_type_hints(call)
        self._parameters = inspect.signature(function).parameters
        for name, parameter in self._parameters.items():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise ValueError(f"{self.name}: parameter {str(parameter)!r} has no name that a call could set")
            if name not in self._hints:
                raise ValueError(f"{self.name}: parameter {name!r} has no type hint")
        try:
            self._schema = self._model.model_json_schema()
        except PydanticUserError as error:
            raise ValueError(
                f"{self.name}: a type hint cannot be expressed in JSON: {error.message.splitlines()[0]}"
            ) from error

    def __getstate__(self) -> dict[str, object]:
        return {"function": self.function}  # the model of the arguments is made anew in another process

    def __setstate__(self, state: Mapping[str, Callable[..., object]]) -> None:
        self.__init__(state["function"])  # type: ignore[misc]

    @cached_property
    def _model(self) -> type[BaseModel]:
        fields = {
            name: (
                self._hints[name],
                Field(
                    ... if parameter.default is parameter.empty else parameter.default, description=self._arguments.get(name)
                ),
            )
            for name, parameter in self._parameters.items()
        }
        config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=False, protected_namespaces=())
        model: type[BaseModel] = create_model(self.name, __config__=config, **fields)  # type: ignore[call-overload]
        return model

    @property
    def description(self) -> Tool:
        """As in the OpenAI API, for the chat template."""
        parameters = {"type": "object", "properties": {}, **_without_titles(self._schema)}
        parameters.pop("additionalProperties", None)
        parameters.pop("description", None)
        return {
            "type": "function",
            "function": {"name": self.name, "description": self._description, "parameters": parameters},
        }

    def call(self, arguments: str) -> ToolResult:
        """Call the function.

        Args:
            arguments: a JSON object.

        Returns:
            The function's text, or JSON of what it returned; an error if the arguments do not fit the signature, or it raises.
        """
        try:
            values = self._model.model_validate_json(arguments)
        except ValidationError as error:
            return ToolResult(f"Error: {_reason(error)}", is_error=True)
        try:
            result = self.function(**{name: getattr(values, name) for name in self._parameters})
            return ToolResult(result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str))
        except (Exception, SystemExit) as error:
            return ToolResult(f"Error: {type(error).__name__}: {error}", is_error=True)


def _parse_docstring(docstring: str) -> tuple[str, dict[str, str]]:
    """The text before the sections, and that of each argument."""
    text, *sections = re.split(r"^(?=(?:Args|Arguments|Returns|Raises|Yields|Example|Examples):\s*$)", docstring, flags=re.M)
    arguments: dict[str, str] = {}
    name = ""
    for line in next((each.splitlines()[1:] for each in sections if each.startswith("Arg")), []):
        indented = len(line) - len(line.lstrip())
        if indented <= 4 and (match := _ARGUMENT.match(line.strip())):
            name = match[1]
            arguments[name] = match[2]
        elif name and line.strip():
            arguments[name] = f"{arguments[name]} {line.strip()}"
    return " ".join(text.split()), arguments


def _without_titles(schema: dict[str, object], of_properties: bool = False) -> dict[str, object]:
    """A JSON schema without the titles that pydantic makes of names."""
    return {
        key: _without_titles(value, key in ("properties", "$defs") and not of_properties) if isinstance(value, dict) else value
        for key, value in schema.items()
        if of_properties or key != "title"
    }


def _reason(error: ValidationError) -> str:
    """One line about each wrong argument."""
    reasons = [(".".join(map(str, each["loc"])), each["msg"]) for each in error.errors()]
    return "; ".join(f"{place}: {message}" if place else message for place, message in reasons)
