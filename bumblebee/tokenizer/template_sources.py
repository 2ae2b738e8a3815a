"""The files beside tokenizer_config.json in which a model folder may keep its chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bumblebee.json_files import read_json


def template_files(folder: Path) -> dict[str, Any]:
    """``{"chat_template": ...}`` in the forms of tokenizer_config.json, before which it goes; empty without such a file.

    Raises:
        ValueError: a file that is no UTF-8 or no JSON; the message names it.
    """
    if not (main := folder / "chat_template.jinja").is_file():
        older = folder / "chat_template.json"
        return {"chat_template": read_json(older).get("chat_template")} if older.is_file() else {}
    named = {"default": _text(main)}
    named |= {file.stem: _text(file) for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if len(named) == 1:
        return {"chat_template": named["default"]}
    return {"chat_template": [{"name": name, "template": source} for name, source in named.items()]}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: {error}") from None
