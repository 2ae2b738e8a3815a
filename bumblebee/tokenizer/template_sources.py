"""Where the source of a chat template comes from: files or settings of a model folder, an option, or ChatML by default."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import tokenizers

from bumblebee.tokenizer.chatml import CHATML, CHATML_TOKENS, chatml_ending_with
from bumblebee.utils.json_files import read_json


def template_from_files(folder: Path) -> dict[str, object]:
    """The chat template that a model folder keeps in a file of its own, which overrides tokenizer_config.json.

    Returns:
        ``{"chat_template": ...}`` in the form that tokenizer_config.json has; empty if there is no such file.

    Raises:
        ValueError: a file is not valid UTF-8 or JSON; the message names it.
    """
    if not (main := folder / "chat_template.jinja").is_file():
        legacy = folder / "chat_template.json"
        return {"chat_template": read_json(legacy).get("chat_template")} if legacy.is_file() else {}
    named = {"default": _read(main)}
    named |= {file.stem: _read(file) for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if len(named) == 1:
        return {"chat_template": named["default"]}
    return {"chat_template": [{"name": name, "template": source} for name, source in named.items()]}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: {error}") from None


def templates_by_name(setting: object) -> dict[str, str]:
    """Template sources by name, from the value of ``chat_template`` in tokenizer_config.json.

    Raises:
        ValueError: the value is neither a string nor a list of {name, template}.
    """
    if not setting:
        return {}
    if isinstance(setting, str):
        return {"default": setting}
    items: list[object] = setting if isinstance(setting, list) else [setting]
    named: dict[str, str] = {}
    for item in items:
        name, template = (item.get("name"), item.get("template")) if isinstance(item, dict) else (None, None)
        if not (isinstance(name, str) and isinstance(template, str)):
            raise ValueError("chat_template must be a string or a list of {name, template}")
        named[name] = template
    return named


def default_template(backend: tokenizers.Tokenizer) -> str | None:
    """ChatML if the tokenizer has its special tokens, otherwise None."""
    return CHATML if special_contents(backend).issuperset(CHATML_TOKENS) else None


def named_template(name: str, backend: tokenizers.Tokenizer, settings: Mapping[str, object]) -> str:
    """The template that an option names: ``chatml``, or the path of a Jinja file.

    A tokenizer without ChatML's special tokens gets a ChatML that ends turns with the end-of-text token.

    Raises:
        ValueError: there is no such file, or the tokenizer has neither an end-of-turn nor an end-of-text token.
    """
    if name == "chatml":
        if (source := default_template(backend)) is not None:
            return source
        eos, special = special_tokens(settings).get("eos_token"), special_contents(backend)
        end = next((token for token in (CHATML_TOKENS[1], eos) if token in special), None)
        if end is None:
            raise ValueError("chatml needs the special token <|im_end|>, or an eos_token in tokenizer_config.json")
        return chatml_ending_with(end)
    if not (file := Path(name).expanduser()).is_file():
        raise ValueError(f"{name!r} is not a file; expected the path of a Jinja template, or chatml")
    return _read(file)


def special_contents(backend: tokenizers.Tokenizer) -> set[str]:
    """The special tokens of a tokenizer."""
    return {token.content for token in backend.get_added_tokens_decoder().values() if token.special}


def special_tokens(settings: Mapping[str, object]) -> dict[str, str]:
    """The variables bos_token, eos_token and so on of a template, from tokenizer_config.json."""
    named = {key: token_content(value) for key, value in settings.items() if key.endswith("_token")}
    return {key: value for key, value in named.items() if value is not None}


def token_content(token: object) -> str | None:
    """The text of a token in tokenizer_config.json, where it is a string or the object form of an AddedToken."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
