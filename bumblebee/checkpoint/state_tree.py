"""State of any structure, such as a list of matrices, as JSON for its structure and tensors by name.

An optimizer may keep anything for a parameter. What is not a tensor with a number per element is saved in this form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from bumblebee.utils.json_files import JSON


def flatten(value: object, path: str, tensors: dict[str, Tensor]) -> JSON:
    """Return the structure of a value as JSON, and add its tensors to ``tensors`` by path.

    Args:
        value: a tensor, None, a number, a string, or a list, tuple or dict of such values.
        path: what the paths of its tensors begin with.
        tensors: extended.

    Raises:
        TypeError: the value holds something else.
    """
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if isinstance(value, list | tuple):
        items = [flatten(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, Mapping) and all(isinstance(key, int | str) for key in value):
        return {"dict": [[key, flatten(item, f"{path}.{key}", tensors)] for key, item in value.items()]}
    raise TypeError(f"{path} is a {type(value).__name__}")


def unflatten(tree: JSON, read: Callable[[str], Tensor]) -> object:
    """Rebuild a value from ``flatten``.

    Args:
        tree: its structure.
        read: returns the tensor of a path.
    """
    assert isinstance(tree, dict), tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return read(str(content))
    if kind == "value":
        return content
    assert isinstance(content, list), tree
    if kind == "dict":
        return {key: unflatten(item, read) for key, item in content}  # type: ignore[misc, str-unpack]
    items = [unflatten(item, read) for item in content]
    return tuple(items) if kind == "tuple" else items
