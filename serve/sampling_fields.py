"""How the fields of SamplingParams are called in requests: the server reads them, and the terminal chat sends them."""

from __future__ import annotations

from dataclasses import fields

from bumblebee.inference.sampling.sampling_params import SamplingParams

RENAMED = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "stop_ids": "stop_token_ids"}  # OpenAI's or vLLM's
REQUEST_NAMES = {field.name: RENAMED.get(field.name, field.name) for field in fields(SamplingParams)}
