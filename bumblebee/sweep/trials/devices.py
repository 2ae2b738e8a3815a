"""Which devices a trial may use."""

from __future__ import annotations

import os
from collections.abc import Sequence

from bumblebee.sweep.errors import SweepError

Devices = tuple[int, ...]  # of one trial; empty for whatever the recipe chooses
_OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def slots(devices: Sequence[int] | Sequence[Sequence[int]] | None, parallel: int | None) -> list[Devices]:
    """The devices of each trial that runs at the same time.

    Args:
        devices: one device or one group of devices for each trial; None does not assign devices.
        parallel: number of trials at the same time; by default one for each entry of devices. If there are more, they share.

    Raises:
        SweepError: a number is out of range, or a group is empty.
    """
    if parallel is not None and parallel < 1:
        raise SweepError(f"--parallel: must be at least 1, got {parallel}")
    if devices is None:
        return [()] * (parallel or 1)
    groups = [tuple(each) if isinstance(each, Sequence) else (each,) for each in devices]
    if not groups or not all(groups) or min(index for group in groups for index in group) < 0:
        raise SweepError(
            f"--devices: expected device numbers such as [0, 1], or groups such as [[0, 1], [2, 3]], got {devices}"
        )
    return [groups[index % len(groups)] for index in range(parallel or len(groups))]


def environment(devices: Devices) -> dict[str, str]:
    """The environment of a trial: it sees its own devices only, counted among those that the sweep sees.

    Raises:
        SweepError: the sweep itself does not see a device.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCHER}
    if not devices:
        return inherited
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if visible and max(devices) >= len(visible):
        raise SweepError(f"--devices: no device {max(devices)}: CUDA_VISIBLE_DEVICES is {','.join(visible)}")
    return {**inherited, "CUDA_VISIBLE_DEVICES": ",".join(visible[index] if visible else str(index) for index in devices)}
