"""RoPE scaling equals transformers', at positions up to 16k and beyond the original context."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

from bumblebee import Bumblebee  # noqa: E402

MAX, FAR, LENGTH = 4096, 16_384, 128
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": YARN,
    "yarn attention_factor": YARN | {"attention_factor": 1.3},
    "yarn mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn betas": YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=ROPES)
def pair(request, tmp_path_factory) -> tuple[Any, Any]:
    """A model of transformers with heads of width 32, and ours from its folder."""
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=MAX, rope_parameters={"rope_theta": 10_000.0, **ROPES[request.param]},
        initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    folder = tmp_path_factory.mktemp("rope")
    hf.save_pretrained(folder)
    return Bumblebee.from_pretrained(folder), hf


def compare_rotary(ours: Any, hf: Any, position_ids: torch.Tensor) -> None:
    cos, sin = ours.model.rotary(position_ids)
    expected = hf.model.rotary_emb(torch.zeros(1), position_ids)
    # Theirs has every number twice. A frequency may be rounded otherwise: at 16 thousand that is an angle of 1e-3.
    for actual, wanted in zip((cos, sin), expected, strict=True):
        torch.testing.assert_close(actual[:, :, 0], wanted[..., : cos.shape[-1]], rtol=0, atol=2e-3)


@pytest.mark.parametrize("end", [MAX, FAR])
def test_cosines_and_sines_are_transformers(pair, end):
    compare_rotary(*pair, torch.arange(0, end, 7)[None])


@torch.no_grad()
def test_logits_equal_transformers_up_to_16k_positions(pair):
    ours, hf = pair
    input_ids = torch.randint(96, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    position_ids = (torch.arange(LENGTH) * FAR // LENGTH).expand(2, -1)
    assert position_ids.max() > 3.9 * MAX
    hf(input_ids[:, :2])  # dynamic frequencies of hf are those of the longest text so far, until a short one comes
    expected = hf(input_ids, position_ids=position_ids, attention_mask=torch.ones_like(input_ids)).logits
    actual = ours(input_ids, position_ids)
    assert expected.std() > 1
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    near = ours(input_ids)
    assert (near - actual).abs().max() > 0.1, "positions matter"
