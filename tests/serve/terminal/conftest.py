"""Fixtures of the terminal chat: a model folder, and chats through pipes."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bumblebee import Generator
from bumblebee.cli.main import main


@pytest.fixture(scope="session")
def folder(tokenizer_folder: Path, tiny: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a long context."""
    import torch

    from bumblebee import Bumblebee

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("chat")
    Bumblebee(tiny(max_position_embeddings=16384, initializer_range=0.3)).save_pretrained(folder)
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def generator(folder: Path) -> Generator:
    return Generator.from_pretrained(folder)


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str, int]]:
    """Pipe inputs into ``bumblebee chat``; returns stdout, stderr and the exit code."""

    def run(*args: str | Path, inputs: str) -> tuple[str, str, int]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(inputs))
        with pytest.raises(SystemExit) as ended:
            main(["chat", *map(str, args)])
        printed = capsys.readouterr()
        return printed.out, printed.err, int(ended.value.code or 0)

    return run
