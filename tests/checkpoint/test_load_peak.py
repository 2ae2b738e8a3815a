"""Peak memory of loading is the model and one tensor, for any number of shards and any fused tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bumblebee import Bumblebee, BumblebeeConfig

SHAPE = {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
MODELS = {
    "llama": {"attention_bias": False},
    "glm4": {"post_norms": True, "rope_interleaved": True, "partial_rotary_factor": 0.5},
    "mixtral": {"attention_bias": False, "num_experts": 4, "intermediate_size": 1024},
}
CASES = [
    pytest.param(name, dtype, marks=[] if (name, dtype) == ("glm4", "bfloat16") else pytest.mark.slow)
    for name in MODELS
    for dtype in ("float32", "bfloat16")
]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory")
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_peak_is_model_plus_one_tensor(tmp_path, name, dtype):
    model = Bumblebee(BumblebeeConfig(**{**SHAPE, **MODELS[name]}))  # in fp32, so that bf16 needs a cast
    model.save_pretrained(tmp_path, max_shard_size="20MB")
    files = [load_file(file) for file in tmp_path.glob("*.safetensors")]
    assert len(files) > 2
    largest = max(tensor.numel() for file in files for tensor in file.values()) * getattr(torch, dtype).itemsize
    here = Path(__file__)
    env = {**os.environ, "PYTHONPATH": str(here.parents[2]), "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
    words = [sys.executable, str(here.parents[1] / "helpers" / "load_peak.py"), str(tmp_path), dtype]
    process = subprocess.run(words, env=env, capture_output=True, text=True, check=True, timeout=120)
    peak, size = map(int, process.stdout.split())
    assert size > 3 * largest, "too small to detect two extra tensors"
    assert peak < size + largest + 6e6
    if dtype == "bfloat16":
        assert peak > 0.95 * size, "the peak was missed"
