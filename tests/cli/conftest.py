"""Fixtures of the command line's tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.recipe_files import RECIPE, SAMPLES

from bumblebee.cli.main import main


@pytest.fixture
def workdir(tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with recipe.yaml, data.jsonl, a tokenizer and files that cannot be used."""
    shutil.copytree(tokenizer_folder, tmp_path / "tok")
    shutil.copy(SAMPLES / "pretrain.jsonl", tmp_path / "data.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": 1}\n')
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def error_line(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that runs a command, checks that it ends with exit code 2 and one line, and returns the line."""

    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(list(words))
        captured = capsys.readouterr()
        assert ended.value.code == 2
        assert captured.out == ""
        assert captured.err.startswith("bumblebee: ") and captured.err.count("\n") == 1, captured.err
        return captured.err[len("bumblebee: ") : -1]

    return run
