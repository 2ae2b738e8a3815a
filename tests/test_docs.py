"""What the documents tell people to type works: every command is run, or, where it asks for many GPUs, parsed."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bumblebee.cli.main import main

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(document: Path) -> list[str]:
    """The lines of the document's ``sh`` blocks, continued lines joined, comments left out."""
    blocks = re.findall(r"```sh\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in (line.split(" #")[0].strip() for line in lines) if line]


def bumblebee_words(command: str) -> list[str] | None:
    """What follows ``bumblebee`` in a command, with or without a launcher."""
    words = shlex.split(command)
    return words[words.index("bumblebee") + 1 :] if "bumblebee" in words else None


RESEARCH = ROOT / "docs" / "research.md"  # its commands need the page's own files: tests/test_research.py runs them all
FITS = sorted({c for d in DOCUMENTS if d != RESEARCH for c in commands(d) if (bumblebee_words(c) or [""])[0] == "fit"})


@pytest.mark.parametrize("command", FITS)
def test_training_commands_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as done:
        main([*(bumblebee_words(command) or []), "--print_config"])
    assert not done.value.code


def test_the_readme_in_chinese_has_the_same_commands_code_and_pages() -> None:
    english, chinese = ROOT / "README.md", ROOT / "README.zh.md"
    assert commands(chinese) == commands(english)
    for pattern in (r"```python\n.*?```", r"\]\(((?!README)[^)]+)\)"):
        both = [re.findall(pattern, path.read_text(encoding="utf-8"), re.DOTALL) for path in (english, chinese)]
        assert sorted(both[0]) == sorted(both[1])


def test_every_make_target_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = {target for d in DOCUMENTS for target in re.findall(r"(?:^|`)make ([a-z-]+)", d.read_text(), re.MULTILINE)}
    assert {"quickstart", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"no target {target!r} in the Makefile"


TUTORIAL = "tokenizer preview fit generate fit fit answer fit fit fit merge answer generate chat serve"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("document", "expected"),
    [("README.md", "tokenizer fit generate validate fit"), ("docs/tutorial.md", TUTORIAL)],
)
def test_the_commands_run_as_written(document: str, expected: str, tmp_path: Path) -> None:
    """One after the other, in a folder that has nothing but the recipes."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    run = [c for c in commands(ROOT / document) if c.startswith("bumblebee ") and "quickstart" not in c]
    assert [shlex.split(c)[1] for c in run] == expected.split()
    for command in run:
        if command.startswith("bumblebee serve"):
            with served(command, tmp_path):
                pass
        else:
            as_typed(command, tmp_path, timeout=600)


def as_typed(command: str, folder: Path, **options: Any) -> str:
    """Run a command in a shell, with nobody at the keyboard; what it prints."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=typing(folder),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        **options,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def typing(folder: Path) -> dict[str, str]:
    """The environment of a shell that knows ``bumblebee``."""
    program = folder / "bin" / "bumblebee"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!{sys.executable}\nfrom bumblebee.cli.main import main\n\nif __name__ == '__main__':\n    main()\n")
    program.chmod(0o755)
    path = os.pathsep.join([str(program.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


@contextmanager
def served(command: str, folder: Path) -> Iterator[int]:
    """Inside, a command's server answers, at a port of its own that is given; then it ends as Ctrl-C would end it."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    words = [sys.executable, "-m", "bumblebee", *shlex.split(command)[1:], "--port", str(port)]
    server = subprocess.Popen(words, cwd=folder, env=typing(folder), stdout=subprocess.PIPE, text=True)
    try:
        assert any(line.startswith("ready: ") for line in server.stdout)
        yield port
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
def test_the_commands_of_serving_run_as_written(tokenizer_folder: Path, tiny: Callable, tmp_path: Path) -> None:
    """The first one serves, in the place of a trained model a random one; then the others, and what is asked in Python."""
    from bumblebee import Bumblebee

    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    folder = tmp_path / "runs" / "quickstart" / "chat"
    shutil.copytree(tokenizer_folder, folder)
    torch.manual_seed(0)
    Bumblebee(tiny(max_position_embeddings=4096, initializer_range=0.3)).save_pretrained(folder)
    document = ROOT / "docs" / "serving.md"
    first, *others = commands(document)
    assert first.startswith("bumblebee serve") and len(others) >= 5
    assert {c for c in commands(ROOT / "README.md") if c.startswith("bumblebee ") and "quickstart" in c} <= {first, *others}
    with served(first, tmp_path) as port:
        for command in others:
            printed = as_typed(command.replace("8000", str(port)), tmp_path, timeout=120)
            assert not command.startswith("curl") or json.loads(printed)["choices"]
        (program,) = re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)
        (tmp_path / "ask.py").write_text(program.replace("8000", str(port)))
        assert as_typed("python ask.py", tmp_path, timeout=60)


@pytest.mark.slow
def test_previews_run_as_written(tokenizer_folder: Path, tmp_path: Path) -> None:
    """All but the measuring."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copytree(tokenizer_folder, tmp_path / "runs" / "tokenizer")
    run = [words for d in DOCUMENTS for c in commands(d) if (words := bumblebee_words(c) or [""])[0] == "preview"]
    assert len(run) >= 3
    for words in run:
        command = [sys.executable, "-m", "bumblebee", *words, "--measure", "never"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        assert "memory per device" in done.stdout


def test_links_and_pictures_of_the_documents_are_there() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} points at {target}"
