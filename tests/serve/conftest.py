"""What the server's tests share: a model folder, and one server for all tests that leave it as it was."""

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
    """What ``pytest.mark.anyio`` runs async tests with."""
    return "asyncio"


@pytest.fixture(scope="session")
def served_folder(tiny: Callable[..., Any], tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights and a chat template; 2048 positions, so that answers can be long."""
    import torch

    from bumblebee import Bumblebee

    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    Bumblebee(tiny(max_position_embeddings=2048, initializer_range=0.2)).save_pretrained(folder)
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def server(served_folder: Path) -> Iterator[Running]:
    """A server that everybody may ask. Each process of pytest-xdist has its own."""
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
    """A folder with a module, shifted.py, and a model folder, ``model``, that names its class, which says other tokens."""
    place = tmp_path_factory.mktemp("place")
    (place / "shifted.py").write_text(SHIFTED)
    shutil.copytree(served_folder, place / "model")
    file = place / "model" / "config.json"
    own = {"architectures": ["BumblebeeForCausalLM"], "model_type": "bumblebee", "model_class": "shifted.Shifted"}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    return place
