"""The command that stands in for ``bumblebee fit`` in sweeps."""

from __future__ import annotations

import sys
from pathlib import Path

from bumblebee.sweep.runner import Launch
from bumblebee.sweep.trials.devices import Devices
from bumblebee.sweep.trials.trial import Trial

FAKE_TRIAL = Path(__file__).with_name("fake_trial.py")


def fake_launch(steps: int = 2, seconds: float = 0.0, modes: dict[int, str] | None = None) -> Launch:
    """The command of ``fake_trial.py``, whose metric falls to the square of the parameter x."""

    def launch(trial: Trial, folder: Path, devices: Devices) -> list[str]:
        value = float(str(trial.values["x"])) ** 2
        words = [str(folder), repr(value), str(steps), str(seconds), (modes or {}).get(trial.number, "")]
        return [sys.executable, "-S", "-E", str(FAKE_TRIAL), *words]

    return launch
