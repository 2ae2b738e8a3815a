"""Fixtures of the tests of sweeps: search spaces as files, and sweeps of stand-ins for training runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.fake_sweeps import fake_launch

from bumblebee.sweep.recipe import SweepRecipe
from bumblebee.sweep.runner import Launch
from bumblebee.sweep.sweep import Sweep
from bumblebee.sweep.sweep_file import SweepFile
from bumblebee.sweep.sweep_options import SweepOptions

SPACE = """\
method: random
metric: {name: validation_loss, goal: minimize}
parameters:
  x: {min: -1.0, max: 1.0}
  kind: {values: [a, b]}
"""


@pytest.fixture
def space(tmp_path: Path) -> Callable[[str], SweepFile]:
    """A function from YAML to a SweepFile."""

    def read(text: str = SPACE) -> SweepFile:
        path = tmp_path / "space.yaml"
        path.write_text(text)
        return SweepFile.read(str(path))

    return read


@pytest.fixture
def make_sweep(tmp_path: Path, space: Callable[[str], SweepFile]) -> Callable[..., Sweep]:
    """A function that makes a sweep of stand-ins in the temporary folder."""

    def make(text: str = SPACE, launch: Launch | None = None, recipe: str = "{}", **options) -> Sweep:
        base = f"output_dir: {tmp_path}\nseed: 3\ntrainer: {{resume: null}}\ncallbacks: {recipe}\n"
        options = {"sweep": "space.yaml", "count": 4, **options}
        return Sweep(
            space(text),
            SweepRecipe(base, options.get("wandb")),
            SweepOptions(**options),
            launch=launch or fake_launch(),
            poll=0.02,
        )

    return make
