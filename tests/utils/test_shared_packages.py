"""Package names shared with the user's repository: both sides are found, collisions are refused.

Each test runs a fresh interpreter, since the packages are extended once, when they are imported.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.processes import ROOT

HELLO = "from bumblebee import Callback\n\n\nclass Hello(Callback):\n    pass\n"


def run(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code as the command line would import packages, with the user's folder first on the path."""
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    start += "from bumblebee.utils.shared_packages import prefer_ours; prefer_ours()\n"
    start += f"sys.path.insert(0, {str(folder)!r})\n"
    return subprocess.run([sys.executable, "-c", start + code], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder with a ``callbacks`` package of the user's."""
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "mine.py").write_text(HELLO)
    return tmp_path


@pytest.mark.parametrize("init", [None, "", "from .mine import Hello\n"], ids=["no init", "empty init", "init"])
def test_both_sides_are_found(repository, init):
    if init is not None:
        (repository / "callbacks" / "__init__.py").write_text(init)
    done = run(repository, "import callbacks.mine; print(callbacks.RunSummary.__name__, callbacks.mine.Hello.__name__)")
    assert done.stdout == "RunSummary Hello\n", done.stderr


def test_names_of_the_users_init_are_found(repository):
    (repository / "callbacks" / "__init__.py").write_text("from .mine import Hello\nfrom callbacks import mine\nLIMIT = 3\n")
    done = run(repository, "from callbacks import Hello, LIMIT, RunSummary; print(Hello.__module__, LIMIT)")
    assert done.stdout == "callbacks.mine 3\n", done.stderr


def test_the_users_init_runs_only_when_needed(repository):
    (repository / "callbacks" / "__init__.py").write_text("print('running')\n")
    assert run(repository, "from callbacks import RunSummary").stdout == ""
    assert run(repository, "import callbacks; hasattr(callbacks, 'x'); hasattr(callbacks, 'y')").stdout == "running\n"


def test_unknown_names_are_attribute_errors(repository):
    done = run(repository, "import callbacks; callbacks.Nothing")
    assert done.stderr.splitlines()[-1] == "AttributeError: module 'callbacks' has no attribute 'Nothing'"


@pytest.mark.parametrize(
    ("file", "text", "name"),
    [("early_stopping.py", "", "early_stopping"), ("__init__.py", "class Checkpoint: ...\n", "Checkpoint")],
)
def test_names_on_both_sides_are_refused(repository, file, text, name):
    (repository / "callbacks" / file).write_text(text)
    done = run(repository, "import callbacks")
    message = done.stderr.splitlines()[-1]
    assert message.startswith("bumblebee.utils.shared_packages.NameCollision: " + str(repository / "callbacks" / file)), message
    assert f"callbacks.{name} is taken by Bumblebee" in message


def test_another_copy_of_bumblebee_is_not_an_extension(tmp_path):
    for package in ("bumblebee", "callbacks"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    done = run(tmp_path, "import callbacks; print(len(callbacks.__path__))")
    assert done.stdout == "1\n", done.stderr
