"""Sampling defaults and stop ids from the generation_config.json of a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bumblebee.checkpoint.adapters.folder import folder_with_file
from bumblebee.inference.sampling.sampling_params import SamplingParams
from bumblebee.utils.json_files import read_json

ALWAYS_READ = ("max_new_tokens", "repetition_penalty")
READ_IF_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
DEFAULT_TOP_K = 50  # transformers' default


def read_generation_config(folder: str | Path) -> dict[str, Any]:
    """Read generation_config.json of a model folder, or of an adapter's base model; {} if there is none.

    Raises:
        ValueError: the file is not valid JSON.
    """
    file = folder_with_file(folder, "generation_config.json") / "generation_config.json"
    return read_json(file) if file.is_file() else {}


def stop_ids_of(generation_config: Mapping[str, Any]) -> list[int]:
    """Token ids that end a sequence."""
    stops = generation_config.get("eos_token_id")
    return [stops] if isinstance(stops, int) else list(stops or [])


def default_sampling(generation_config: Mapping[str, Any]) -> SamplingParams:
    """How transformers' ``generate`` would sample: greedy unless ``do_sample`` is set.

    Raises:
        ValueError: a value is out of range.
    """
    do_sample = bool(generation_config.get("do_sample"))
    names = ALWAYS_READ + READ_IF_SAMPLING if do_sample else ALWAYS_READ
    values: dict[str, Any] = {"top_k": DEFAULT_TOP_K} if do_sample else {"temperature": 0.0}
    values |= {name: generation_config[name] for name in names if generation_config.get(name) is not None}
    try:
        return SamplingParams(**values)
    except ValueError as error:
        raise ValueError(f"generation_config.json: {error}") from None
