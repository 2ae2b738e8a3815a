"""What a model folder says about generating: sampling and the ids that end a text, from generation_config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bumblebee.adapter_folders import folder_with_file
from bumblebee.inference.sampling_params import SamplingParams
from bumblebee.json_files import read_json

TAKEN = ("max_new_tokens", "repetition_penalty")
TAKEN_WHERE_SAMPLED = ("temperature", "top_k", "top_p", "min_p")
TOP_K = 50  # what transformers takes where the file names none


def read_settings(folder: str | Path) -> dict[str, Any]:
    """generation_config.json of a model folder, or of an adapter's base; {} if there is none.

    Raises:
        ValueError: a file that is no JSON.
    """
    file = folder_with_file(folder, "generation_config.json") / "generation_config.json"
    return read_json(file) if file.is_file() else {}


def stop_ids_of(settings: dict[str, Any]) -> list[int]:
    """The ids that end a text."""
    stops = settings.get("eos_token_id")
    return [stops] if isinstance(stops, int) else list(stops or [])


def sampling_of(settings: dict[str, Any]) -> SamplingParams:
    """The sampling that transformers' generate would do: the most likely token, unless ``do_sample`` is set.

    Raises:
        ValueError: a number out of its range.
    """
    names = TAKEN + TAKEN_WHERE_SAMPLED if settings.get("do_sample") else TAKEN
    found = {name: settings[name] for name in names if settings.get(name) is not None}
    start = {"top_k": TOP_K} if settings.get("do_sample") else {"temperature": 0.0}
    try:
        return SamplingParams(**(start | found))
    except ValueError as error:
        raise ValueError(f"generation_config.json: {error}") from None
