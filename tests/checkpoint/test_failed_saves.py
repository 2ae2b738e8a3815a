"""A failed save leaves an existing folder byte-identical, creates no new folder, and leaves no temporary files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bumblebee import Bumblebee
from bumblebee.checkpoint import atomic, model_files, weight_writer
from bumblebee.checkpoint.atomic import written_aside
from bumblebee.utils.json_files import read_json, write_json

ROOT = Path(__file__).parents[2]


def tree(root: Path) -> dict[str, bytes]:
    """All files below a folder, including hidden ones, with their content."""
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


@pytest.fixture
def model(tiny):
    torch.manual_seed(1)
    return Bumblebee(tiny(vocab_size=64))


@pytest.fixture(params=["earlier", "new"])
def place(request, tiny, tmp_path) -> Path:
    """Where to save: an existing folder with other weights and a tokenizer, or a new one."""
    if request.param == "earlier":
        Bumblebee(tiny(vocab_size=64)).save_pretrained(tmp_path / "m", max_shard_size="30KB")
        (tmp_path / "m" / "tokenizer.json").write_text("{}")
    return tmp_path / "m"


def fail_at_call(monkeypatch, module, name: str, call: int, error: Exception) -> None:
    """Make the n-th call of a module's function write a partial file and fail."""
    original, calls = getattr(module, name), []

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == call:
            next(Path(arg) for arg in args if isinstance(arg, Path)).write_bytes(b"half")
            raise error
        return original(*args, **options)

    monkeypatch.setattr(module, name, failing)


@pytest.mark.parametrize(
    ("module", "name", "call", "error"),
    [
        (weight_writer, "save_file", 1, OSError("No space left on device")),
        (weight_writer, "save_file", 3, OSError("No space left on device")),
        (weight_writer, "write_json", 1, OSError("No space left on device")),
        (model_files, "write_json", 2, OSError("No space left on device")),
    ],
)
def test_failing_write_changes_nothing(model, place, monkeypatch, module, name, call, error):
    before = tree(place.parent)
    fail_at_call(monkeypatch, module, name, call, error)
    with pytest.raises(OSError, match="No space left on device"):
        model.save_pretrained(place, max_shard_size="20KB")
    assert tree(place.parent) == before
    assert place.exists() == bool(before) and [entry.name for entry in place.parent.iterdir()] == ["m"] * bool(before)


def test_a_failing_flush_changes_nothing(model, place, monkeypatch):
    before = tree(place.parent)

    def failing(path):
        raise OSError("Input/output error")

    monkeypatch.setattr(atomic, "flush_tree", failing)
    with pytest.raises(OSError, match="Input/output error"):
        model.save_pretrained(place)
    assert tree(place.parent) == before and place.exists() == bool(before)


def test_an_unreadable_size_changes_nothing(model, place):
    before = tree(place.parent)
    with pytest.raises(ValueError, match="expected a size with a unit, .*, got 'huge'"):
        model.save_pretrained(place, max_shard_size="huge")
    assert tree(place.parent) == before and place.exists() == bool(before)


LIMITED = """
import resource, sys, torch
from pathlib import Path
from bumblebee import Bumblebee, BumblebeeConfig
torch.set_num_threads(1)
model = Bumblebee(BumblebeeConfig(vocab_size=64, hidden_size=32, intermediate_size=512, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2))
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
for folder in sys.argv[1:]:
    for size in ("5GB", "10KB"):  # with 10KB, the first shards fit
        try:
            model.save_pretrained(folder, max_shard_size=size)
        except OSError as error:
            assert Path(folder).name in str(error), error
            print("refused")
"""


def test_full_disk_changes_nothing(model, tmp_path):
    """Uses the operating system's file size limit, in a subprocess; the MLP matrices exceed it."""
    model.save_pretrained(tmp_path / "earlier")
    before = tree(tmp_path)
    limited = [sys.executable, "-c", LIMITED, str(tmp_path / "earlier"), str(tmp_path / "new")]
    result = subprocess.run(limited, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.stdout.split() == ["refused"] * 4, result.stdout + result.stderr
    assert tree(tmp_path) == before and [entry.name for entry in tmp_path.iterdir()] == ["earlier"]


def test_next_save_clears_interrupted_save(model, tmp_path):
    (tmp_path / ".m.partial").mkdir()
    (tmp_path / ".m.partial" / "model-00000.partial").write_text("half")
    model.save_pretrained(tmp_path / "m")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]
    assert "model-00000.partial" not in tree(tmp_path / "m")


def test_saving_again_keeps_other_files(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine.txt").write_text("mine")
    (tmp_path / "m" / "a").write_text("old")
    with written_aside(tmp_path / "m") as aside:
        (aside / "a").write_text("new")
        (aside / "b").write_text("new")
        assert tree(tmp_path / "m") == {"mine.txt": b"mine", "a": b"old"}, "nothing is seen before the end"
    assert tree(tmp_path) == {"m/mine.txt": b"mine", "m/a": b"new", "m/b": b"new"}


def test_json_is_replaced_as_a_whole(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"text": "ä 🐝"})
    assert read_json(tmp_path / "a.json") == {"text": "ä 🐝"}
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"text": object()})
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_json(tmp_path / "a.json", {"text": "other"})
    assert read_json(tmp_path / "a.json") == {"text": "ä 🐝"}


def test_model_without_tensors_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"cannot write weights to {tmp_path}: the model has no tensors"):
        weight_writer.write_weights(tmp_path, [], "5GB")
    assert not list(tmp_path.iterdir())
