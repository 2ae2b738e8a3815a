"""What classes and functions named in a recipe accept: parameter names and their types."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pydoc import locate
from typing import cast, get_type_hints

_HIDDEN = ("params", "args", "kwargs")  # an optimizer's parameters come from the trainer; *args and **kwargs have no names


def locate_callable(path: str) -> Callable[..., object] | None:
    """Import the class or function of a class path; None if there is no such thing."""
    named = locate(path)
    return cast(Callable[..., object], named) if callable(named) else None


def parameter_types(made: Callable[..., object] | None) -> Mapping[str, object]:
    """Return the type hints of a class's constructor or a function; empty if they cannot be evaluated."""
    try:
        return get_type_hints(made.__init__ if inspect.isclass(made) else made)
    except (NameError, TypeError):
        return {}


def parameter_names(class_path: str, field: str | None = None) -> list[str]:
    """Return the options of a class, or those of the dataclass that is its parameter ``field``."""
    made: object = locate_callable(class_path)
    if field is not None:
        made = parameter_types(locate_callable(class_path)).get(field)
    if not callable(made):
        return []
    return [name for name in inspect.signature(made).parameters if name not in _HIDDEN]
