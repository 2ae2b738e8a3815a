"""Every file and every name in docs/architecture.md exists."""

from __future__ import annotations

import re
from pathlib import Path
from pydoc import locate

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CODE = set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)))
PATHS = {word for word in CODE if re.fullmatch(r"[\w./-]+(/|\.(py|md|yaml))", word) and "/" in word}
NAMES = {word for word in CODE if re.fullmatch(r"(bumblebee|callbacks|datamodules|serve)(\.\w+)+", word)}


def test_page_names_files_and_functions() -> None:
    assert len(PATHS) > 40 and len(NAMES) > 40


def test_every_path_exists() -> None:
    assert not sorted(path for path in PATHS if not (ROOT / path).exists())


def test_every_name_exists() -> None:
    assert not sorted(name for name in NAMES if locate(name) is None)


def test_every_folder_of_bumblebee_is_on_the_page() -> None:
    folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "bumblebee").glob("*/__init__.py")}
    assert not sorted(f"{folder}/" for folder in folders if f"{folder}/" not in PATHS)
