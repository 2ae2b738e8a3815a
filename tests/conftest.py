"""What all tests share: caches in a temporary place, a small tokenizer, tiny models. Processes: ``system/processes.py``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Before torch is imported. Tests share the cores, with each other and with their own child processes: more threads than
# cores make tiny models many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("patient", deadline=None)  # a busy machine is no failure
settings.load_profile("patient")

SAMPLES = Path(__file__).parent.parent / "recipes" / "samples"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU say so instead of failing."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none is visible"))


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token caches of the whole session, away from the user's."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["BUMBLEBEE_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 400 entries, trained on the sample texts."""
    from bumblebee.tokenizer.tokenizer import Tokenizer
    from datamodules import record_files

    texts = [record_files.text_of(record) for record in record_files.read(str(SAMPLES / "pretrain.jsonl"))]
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(texts, 400).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """A function that gives the config of a model of two layers and about 60,000 parameters, with changes."""
    from bumblebee.config import BumblebeeConfig

    def make(**changes: Any) -> BumblebeeConfig:
        shape: dict[str, Any] = {
            "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rope_theta": 10_000.0,
        }  # fmt: skip
        return BumblebeeConfig(**{**shape, **changes})

    return make
