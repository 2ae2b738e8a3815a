"""Fixtures of all tests: a temporary cache, a small tokenizer, tiny model configs."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Set before torch is imported. Test processes and their children share the cores: with more threads than cores, tiny models
# run many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No deadline: a busy machine must not fail a test. The same examples in each run, so that a failure is due to the change
# that is tested; `pytest --hypothesis-profile random` tries others.
settings.register_profile("random", deadline=None)
settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.load_profile("reproducible")

STARTED = pytest.StashKey[float]()
SAMPLES = Path(__file__).parent.parent / "recipes" / "samples"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that bound the time of a run in continuous integration."""
    group = parser.getgroup("time budget")
    group.addoption("--time-budget", type=float, metavar="SECONDS", help="skip the tests that have not begun after this time")
    group.addoption("--file-order", metavar="SEED", help="order of the test files; another seed runs other files first")


def pytest_configure(config: pytest.Config) -> None:
    """Start the clock of --time-budget; each process of pytest-xdist has its own."""
    config.stash[STARTED] = time.monotonic()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test, before its fixtures are set up, when the time budget is spent."""
    budget = item.config.getoption("--time-budget")
    if budget is not None and time.monotonic() - item.config.stash[STARTED] > budget:
        pytest.skip(f"not run: the time budget of {budget:.0f} s is spent")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the files by --file-order. Skip tests that need a GPU where there is none."""
    if seed := config.getoption("--file-order"):
        items.sort(key=lambda item: hashlib.sha256(f"{seed} {item.path.name}".encode()).digest())
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none is visible"))


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keep the session's token caches away from the user's."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["BUMBLEBEE_CACHE"] = str(folder)
    return folder


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch report two H100s of which 10 GB are free, with flash-attn not tried yet. Nothing can be computed on them."""
    import torch

    from bumblebee.nn import attention_kernels

    monkeypatch.setattr(attention_kernels, "_machine_problems", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 10**9, 80 * 10**9))


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
    """Return a function that builds the config of a 2-layer model of about 60,000 parameters, with overrides."""
    from bumblebee.config import BumblebeeConfig

    def make(**changes: Any) -> BumblebeeConfig:
        shape: dict[str, Any] = {
            "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rope_theta": 10_000.0,
        }  # fmt: skip
        return BumblebeeConfig(**{**shape, **changes})

    return make
