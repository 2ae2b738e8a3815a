"""Shared fixtures: a model folder, and one server for all tests that do not change its state."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.server_process import Running, serving


@pytest.fixture
def anyio_backend() -> str:
    """Backend for async tests with ``pytest.mark.anyio``."""
    return "asyncio"


@pytest.fixture(scope="session")
def served_folder(tiny: Callable[..., Any], tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights and a chat template; context length 2048."""
    import torch

    from bumblebee import Bumblebee

    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    Bumblebee(tiny(max_position_embeddings=2048, initializer_range=0.2)).save_pretrained(folder)
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def server(served_folder: Path) -> Iterator[Running]:
    """A server without an API key, one per pytest-xdist worker."""
    with serving(served_folder) as running:
        yield running


SHIFTED = """
from bumblebee import Bumblebee

class Shifted(Bumblebee):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).roll(7, dims=-1)
"""


@pytest.fixture(scope="session")
def shifted_place(served_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module, shifted.py, and a model folder, ``model``, that names its class, which outputs other tokens."""
    root = tmp_path_factory.mktemp("shifted")
    (root / "shifted.py").write_text(SHIFTED)
    shutil.copytree(served_folder, root / "model")
    file = root / "model" / "config.json"
    own = {"architectures": ["BumblebeeForCausalLM"], "model_type": "bumblebee", "model_class": "shifted.Shifted"}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    return root
