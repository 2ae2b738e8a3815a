"""Libraries are compiled once and kept. A failure is reported in one line and leaves no files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bumblebee.utils.native_library import CompilationError, load_library

SOURCE = 'extern "C" int triple(int x) { return 3 * x; }\n'
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BUMBLEBEE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    source = tmp_path / "triple.cpp"
    source.write_text(SOURCE)
    return source


def kept(source: Path) -> list[Path]:
    """What the cache folder holds."""
    return list((source.parent / "cache").rglob("*.*"))


def test_a_library_is_compiled_once(source, monkeypatch):
    assert load_library(source, []).triple(14) == 42
    (library,) = kept(source)
    monkeypatch.setenv("CXX", "/no/compiler")
    assert load_library(source, []).triple(5) == 15
    assert kept(source) == [library]
    with pytest.raises(CompilationError, match="the C\\+\\+ compiler /no/compiler was not found: .* CXX"):
        load_library(source, ["-DOTHER"])  # other flags, another library
    source.write_text(SOURCE.replace("3 *", "4 *"))
    monkeypatch.delenv("CXX")
    assert load_library(source, []).triple(5) == 20
    assert len(kept(source)) == 2


def test_an_error_of_the_compiler_is_named_and_nothing_is_kept(source):
    source.write_text(SOURCE.replace("3", "three"))
    with pytest.raises(CompilationError, match="triple.cpp:1:.*three"):
        load_library(source, [])
    assert kept(source) == []


def test_a_library_that_cannot_be_loaded_is_not_kept(source):
    source.write_text('extern "C" int missing(int); extern "C" int triple(int x) { return missing(x); }')
    with pytest.raises(CompilationError, match="triple.cpp: .*missing"):
        load_library(source, ["-Wl,-z,now"])
    assert kept(source) == []


def test_a_cache_folder_that_cannot_be_written_is_not_needed(source):
    (source.parent / "cache").write_text("a file")
    assert load_library(source, []).triple(2) == 6


def test_processes_compile_at_the_same_time(source):
    command = "import sys; from bumblebee.utils.native_library import load_library; from pathlib import Path"
    command += "; assert load_library(Path(sys.argv[1]), []).triple(3) == 9"
    processes = [subprocess.Popen([sys.executable, "-c", command, str(source)]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert len(kept(source)) == 1
