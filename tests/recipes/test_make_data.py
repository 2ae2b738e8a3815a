"""make_data.py writes valid, repeatable JSON Lines that the DataModules read, with nothing held out that is trained on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import make_data
import pytest
import stdlib_docs

from bumblebee.tokenizer.tokenizer import Tokenizer
from datamodules import SFT, Preferences, Pretrain

SCRIPT = Path(make_data.__file__)


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the script without installed packages."""
    return subprocess.run([sys.executable, "-S", SCRIPT, *words], cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the script writes."""
    root = tmp_path_factory.mktemp("quickstart")
    done = run(root, "--output", "data")
    assert len(done.stdout.splitlines()) == 7 and not done.stderr
    assert done.stdout.startswith("data/documents.jsonl: ")
    return root / "data"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_files_have_the_documented_records(data: Path) -> None:
    counts = {path.name: len(read(path)) for path in data.iterdir()}
    documents = counts.pop("documents.jsonl") + counts["documents_validation.jsonl"]
    assert 6000 < documents < 12000
    assert counts == {
        "documents_validation.jsonl": round(0.05 * documents),
        "conversations.jsonl": 2700,
        "questions.jsonl": 135,
        "preferences.jsonl": 2160,
        "preferences_validation.jsonl": 240,
        "multiple_choice.jsonl": 600,
    }


def test_held_out_records_are_not_trained_on(data: Path) -> None:
    for name in ("documents", "preferences"):
        train, held_out = ({json.dumps(r) for r in read(data / f"{name}{part}.jsonl")} for part in ("", "_validation"))
        assert train and held_out and not train & held_out


def test_questions_are_those_of_the_conversations(data: Path) -> None:
    def exchanges(name: str) -> list[tuple[str, str]]:
        messages = [m["content"] for record in read(data / name) for m in record["messages"]]
        return list(zip(messages[::2], messages[1::2], strict=True))

    asked = exchanges("questions.jsonl")
    assert len(asked) == len(set(asked)) == 600
    assert sorted(exchanges("conversations.jsonl")) == sorted(asked * 20)
    multiple_choice = {(r["context"], r["choices"][r["gold"]]) for r in read(data / "multiple_choice.jsonl")}
    assert multiple_choice == set(asked)


@pytest.mark.slow
def test_files_follow_from_the_seed() -> None:
    entries = stdlib_docs.entries()[::5]
    first, again, other = (make_data.make_files(entries, seed) for seed in (1, 1, 2))
    assert first == again
    assert all(first[name] != other[name] for name in first)
    assert {name: len(records) for name, records in first.items()} == {name: len(records) for name, records in other.items()}


@pytest.mark.slow
def test_every_file_is_read_by_its_datamodule(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    Tokenizer.train([record["text"] for record in read(data / "documents_validation.jsonl")], 500).save_pretrained(folder)
    options = {"tokenizer": str(folder), "cache_dir": str(tmp_path / "cache")}
    for kind, train, validation in (
        (Pretrain, "documents_validation", "documents_validation"),
        (SFT, "conversations", "questions"),
        (Preferences, "preferences", "preferences_validation"),
    ):
        files = {"files": str(data / f"{train}.jsonl"), "validation_files": str(data / f"{validation}.jsonl")}
        module = kind(**files, **options, max_length=2048)
        module.setup(seed=0)
        assert len(module.kept) == len(read(data / f"{train}.jsonl"))
        assert len(module.held_out) == len(read(data / f"{validation}.jsonl"))


def test_rerun_replaces_the_files_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    make_data.write_jsonl(path, [{"n": 1}, {"n": 2}])
    make_data.write_jsonl(path, [{"text": "é\n"}])
    assert path.read_text(encoding="utf-8") == '{"text": "é\\n"}\n'
    with pytest.raises(TypeError):
        make_data.write_jsonl(path, [{"text": "new"}, {"text": object()}])
    assert path.read_text(encoding="utf-8") == '{"text": "é\\n"}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "x"], "make_data.py: argument --seed: invalid int value: 'x'\n"),
        (["--out", "data"], "make_data.py: unrecognized arguments: --out data\n"),
        (["--output", "file/data"], "make_data.py: [Errno 20] Not a directory: 'file/data'\n"),
    ],
    ids=["seed", "unknown", "output"],
)
def test_bad_argument_is_reported_in_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run(tmp_path, *words)
    assert done.returncode and done.stderr == message and not done.stdout
