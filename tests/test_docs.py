"""The commands in the documentation work: each is executed, or only parsed if it needs several GPUs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.documents import DOCUMENTS, RESEARCH, RL, ROOT, SWEEPS, bumblebee_words, commands, run_in_shell, served

from bumblebee.cli.main import main

FITS = sorted(
    {c for d in DOCUMENTS if d not in (RESEARCH, RL, SWEEPS) for c in commands(d) if (bumblebee_words(c) or [""])[0] == "fit"}
)


@pytest.mark.parametrize("command", FITS)
def test_training_commands_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as done:
        main([*(bumblebee_words(command) or []), "--print_config"])
    assert not done.value.code


def test_chinese_readme_has_the_same_commands_code_and_links() -> None:
    english, chinese = ROOT / "README.md", ROOT / "README.zh.md"
    assert commands(chinese) == commands(english)
    for pattern in (r"```python\n.*?```", r"\]\(((?!README)[^)]+)\)"):
        texts = [path.read_text(encoding="utf-8").replace(".zh.md)", ".md)") for path in (english, chinese)]
        assert sorted(re.findall(pattern, texts[0], re.DOTALL)) == sorted(re.findall(pattern, texts[1], re.DOTALL))


@pytest.mark.parametrize("page", ["tutorial", "configuration"])
def test_chinese_page_has_the_same_commands(page: str) -> None:
    english, chinese = ROOT / "docs" / f"{page}.md", ROOT / "docs" / f"{page}.zh.md"
    assert commands(chinese) == commands(english)
    assert f"]({chinese.name})" in english.read_text(encoding="utf-8")
    assert f"]({english.name})" in chinese.read_text(encoding="utf-8")


def test_chinese_configuration_guide_names_existing_options() -> None:
    guide, reference = (
        (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("configuration.zh.md", "configuration.md")
    )
    named = set(re.findall(r"`(?:trainer|data|callbacks\.checkpoint)\.(\w+)`", guide))
    known = set(re.findall(r"^\| `(?:trainer\.)?(\w+)`", reference, re.MULTILINE))
    assert len(named) > 15 and named <= known


def test_chinese_tutorial_has_the_same_links_and_sections() -> None:
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("tutorial.md", "tutorial.zh.md")]
    links = [sorted(set(re.findall(r"\]\(((?!tutorial)[^)]+)\)", page))) for page in pages]
    headings = [[line.split()[0] for line in page.splitlines() if re.match("#+ ", line)] for page in pages]
    assert links[0] == links[1] and headings[0] == headings[1]


def test_make_targets_in_the_docs_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = {target for d in DOCUMENTS for target in re.findall(r"(?:^|`)make ([a-z-]+)", d.read_text(), re.MULTILINE)}
    assert {"quickstart", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"no target {target!r} in the Makefile"


TUTORIAL = "tokenizer preview fit generate fit fit evaluate fit fit fit merge evaluate generate chat serve"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("document", "expected"),
    [("README.md", "tokenizer fit generate validate fit"), ("docs/tutorial.md", TUTORIAL)],
)
def test_commands_run_as_written(document: str, expected: str, tmp_path: Path) -> None:
    """Run in order, in a folder that contains only the recipes and the documentation."""
    _copy_recipes_and_docs(tmp_path)
    run = [c for c in commands(ROOT / document) if c.startswith("bumblebee ") and "quickstart" not in c]
    assert [shlex.split(c)[1] for c in run] == expected.split()
    for command in run:
        if command.startswith("bumblebee serve"):
            with served(command, tmp_path):
                pass
        else:
            run_in_shell(command, tmp_path, timeout=600)
    if document == "README.md":
        _check_curve(tmp_path / "runs" / "pretrain")


def _check_curve(run: Path) -> None:
    """The first training of a newcomer shows that the model learns."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    validation = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert len(losses) == 100
    assert len(validation) >= 4
    assert sum(losses[-10:]) / 10 < losses[0] - 2
    assert validation == sorted(validation, reverse=True)
    assert (run / "loss.png").is_file()


def _copy_recipes_and_docs(folder: Path) -> None:
    for name in ("recipes", "docs"):
        shutil.copytree(ROOT / name, folder / name)
    for page in ("README.md", "README.zh.md"):
        shutil.copy(ROOT / page, folder)


@pytest.mark.slow
def test_serving_commands_run_as_written(tokenizer_folder: Path, tiny: Callable, tmp_path: Path) -> None:
    """The first command serves a model with random weights; the others and the Python program send it requests."""
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
            printed = run_in_shell(command.replace("8000", str(port)), tmp_path, timeout=120)
            assert not command.startswith("curl") or json.loads(printed)["choices"]
        (program,) = re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)
        (tmp_path / "ask.py").write_text(program.replace("8000", str(port)))
        assert run_in_shell("python ask.py", tmp_path, timeout=60)


@pytest.mark.slow
def test_evaluation_commands_run_as_written(tokenizer_folder: Path, tiny: Callable, tmp_path: Path) -> None:
    """With a model of random weights."""
    from bumblebee import Bumblebee

    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copytree(tokenizer_folder, tmp_path / "runs" / "sft")
    torch.manual_seed(0)
    Bumblebee(tiny(max_position_embeddings=1024)).save_pretrained(tmp_path / "runs" / "sft")
    run = commands(ROOT / "docs" / "evaluation.md")
    assert len(run) >= 4
    printed = [run_in_shell(command, tmp_path, timeout=120) for command in run]
    assert "bits_per_byte" in printed[0] and "acc_norm" in printed[0] and "exact match: " in printed[-1]
    results = json.loads((tmp_path / "runs" / "evaluation" / "results.json").read_text())
    assert [*results["tasks"]] == ["bees", "answers", "conversations"]


@pytest.mark.slow
def test_preview_commands_run_as_written(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Without measuring."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copytree(tokenizer_folder, tmp_path / "runs" / "tokenizer")
    pages = [d for d in DOCUMENTS if d != RL]
    run = [words for d in pages for c in commands(d) if (words := bumblebee_words(c) or [""])[0] == "preview"]
    assert len(run) >= 3
    for words in run:
        command = [sys.executable, "-m", "bumblebee", *words, "--measure", "never"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        assert "memory per device" in done.stdout


def test_linked_files_and_images_exist() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} points at {target}"
