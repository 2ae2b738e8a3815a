"""Compile a C++ file of the package into a shared library at first use, and keep it in the cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bumblebee.utils.cache_dir import resolve_cache_dir

FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_TIMEOUT = 300.0  # seconds


class CompilationError(RuntimeError):
    """No library; the message says why."""


def load_library(source: Path, flags: Sequence[str]) -> ctypes.CDLL:
    """Load the library of a source file, compiled unless the cache folder has it.

    A library is named after its source and flags, and written completely before it gets its name: processes that compile at the
    same time do not disturb each other, and one that is killed leaves nothing that others would wait for.

    Args:
        source: a C++ file.
        flags: for the compiler, besides ``FLAGS``: of the instructions that it may use, and of OpenMP.

    Raises:
        CompilationError: there is no compiler, it fails, or what it made cannot be loaded.
    """
    arguments = [*FLAGS, *flags]
    key = hashlib.sha256("\0".join([*arguments, source.read_text()]).encode()).hexdigest()[:20]
    folder, name = resolve_cache_dir(None) / "native", f"{source.stem}-{key}.so"
    try:
        if (folder / name).is_file():
            return ctypes.CDLL(str(folder / name))
        keep = _is_writable(folder)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=folder if keep else None) as temporary:
            built = Path(temporary) / name
            _compile(source, arguments, built)
            library = ctypes.CDLL(str(built))  # before it gets its name: a file that cannot be loaded is not kept
            if keep:
                os.replace(built, folder / name)
            return library
    except OSError as error:
        raise CompilationError(f"{source.name}: {error}") from error


def _is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _compile(source: Path, arguments: Sequence[str], target: Path) -> None:
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(compiler[0]) is None:
        raise CompilationError(f"the C++ compiler {compiler[0]} was not found: install it, or set CXX to another one")
    command = [*compiler, *arguments, str(source), "-o", str(target)]
    english = {**os.environ, "LC_ALL": "C"}
    try:
        result = subprocess.run(
            command, env=english, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise CompilationError(f"{compiler[0]} did not end within {_TIMEOUT:.0f} s") from None
    if result.returncode:
        first = next((line for line in result.stderr.splitlines() if "error:" in line), f"exit code {result.returncode}")
        raise CompilationError(f"{compiler[0]}: {first}")
