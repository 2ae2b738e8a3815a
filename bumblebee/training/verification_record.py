"""verify.json: the result of ``bumblebee verify``, and whether it speaks for a run.

``bumblebee verify`` writes the file into its ``--folder``: versions, hardware, settings, date, and each check with its
measurements and bounds. The latest results for other hardware or settings are kept under "earlier". A run looks for the file in
the folders above its output folder and in the current one. If a result has the run's versions, hardware and settings, it is
copied into the output folder. The run summary reports it on one line.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

import torch

import bumblebee
from bumblebee.checkpoint.model_files import ModelFiles
from bumblebee.config import BumblebeeConfig
from bumblebee.distributed import process_group
from bumblebee.hardware.cpu import cpu_name
from bumblebee.models.base import LanguageModel
from bumblebee.nn.attention_kernels import kernel_of
from bumblebee.utils.json_files import JSON, read_json, write_json

if TYPE_CHECKING:
    from bumblebee.training.run_state import RunState

FILE = "verify.json"
MAX_EARLIER = 20
_SUBJECT = ("versions", "hardware", "settings")


class Setup(TypedDict):
    """What a verification is about.

    Args:
        versions: of packages, by name.
        hardware: name of the device, and number of ranks.
        settings: precision, ZeRO stage and attention kernel.
        recipe: digests of ``model`` and ``data`` that were checked; None for a part that no recipe named.
    """

    versions: dict[str, str]
    hardware: dict[str, str | int]
    settings: dict[str, str | int | None]
    recipe: dict[str, str | None]


class CheckRecord(TypedDict):
    """A check's row of the report; ``measurements`` have name, value, bound, unit and passed."""

    name: str
    status: str
    seconds: float
    measurements: list[dict[str, object]]
    error: str | None
    note: str


class VerificationRecord(Setup):
    """The result of one verification.

    Args:
        date: of its end, in ISO format.
        passed: whether all checks passed.
        checks: in their order.
    """

    date: str
    passed: bool
    checks: list[CheckRecord]


def current_setup(
    device: torch.device,
    precision: str,
    zero_stage: int,
    attention: str | None,
    config: BumblebeeConfig | None = None,
    data: Mapping[str, JSON] | None = None,
) -> Setup:
    """The setup of a run or a verification in this process.

    Args:
        device: of this rank.
        precision: of the run.
        zero_stage: of the run.
        attention: the kernel; None for another library's model.
        config: of the model; None if no model was named.
        data: fingerprint of the data; None or empty if no data was named, or it has none.
    """
    packages = {"torch": torch.__version__, "deepspeed": importlib.metadata.version("deepspeed")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "versions": {"bumblebee": bumblebee.__version__, **packages, "python": platform.python_version()},
        "hardware": {"device": name, "ranks": process_group.world_size()},
        "settings": {"precision": precision, "zero_stage": zero_stage, "attention": attention},
        "recipe": {
            "model": _digest([ModelFiles(config).fingerprint(), config.model_class]) if config else None,
            "data": _digest(dict(data)) if data else None,
        },
    }


def _digest(value: JSON) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write(folder: Path, record: VerificationRecord) -> None:
    """Write a result, and keep the latest ones for other hardware and settings that the folder has.

    Raises:
        OSError: the folder is not writable.
    """
    others = [other for other in _read(folder / FILE) if not _same_subject(other, record)]
    write_json(folder / FILE, {**record, "earlier": others[:MAX_EARLIER]})


def _same_subject(a: VerificationRecord, b: VerificationRecord) -> bool:
    return all(a.get(section) == b.get(section) for section in ("hardware", "settings", "recipe"))


def _read(file: Path) -> list[VerificationRecord]:
    """The results of a file, newest first; none if it is missing or not ours."""
    try:
        content = read_json(file)
    except (OSError, ValueError):
        return []
    results = [content, *content.pop("earlier", [])]
    return [cast(VerificationRecord, one) for one in results if all(name in one for name in (*_SUBJECT, "date", "checks"))]


# -- for a run -------------------------------------------------------------------------------------------------------------


def summarize_verification(run: RunState) -> dict[str, str | int | list[str]]:
    """The run summary's section: status ("passed", "failed", "outdated" or "none"), date, and what failed or differs."""
    record, differences = _find(run)
    if record is None:
        return {"status": "none"}
    if differences:
        return {"status": "outdated", "date": record["date"], "differences": differences}
    failed = [row["name"] for row in record["checks"] if row["status"] in ("FAIL", "not run")]
    passed = [row["name"] for row in record["checks"] if row["status"] == "pass"]
    return {"status": "failed" if failed else "passed", "date": record["date"], "passed": len(passed), "failed": failed}


def copy_current(run: RunState) -> None:
    """Copy the result that speaks for the run into its folder. One from an earlier setup of the same run is removed."""
    record, differences = _find(run)
    if record is not None and not differences:
        write_json(run.output_dir / FILE, record)
    else:
        (run.output_dir / FILE).unlink(missing_ok=True)


def _find(run: RunState) -> tuple[VerificationRecord | None, list[str]]:
    """The newest result for the run's setup, or else the newest of the most similar setup; and the differences."""
    setup = current_setup(
        run.device, run.precision, run.zero_stage, kernel_of(run.task.model, run.engine.options.compute_dtype),
        run.task.model.config if isinstance(run.task.model, LanguageModel) else None, run.fingerprint["data"],
    )  # fmt: skip
    found = [(differences(record, setup), record) for folder in _folders(run.output_dir) for record in _read(folder / FILE)]
    if not found:
        return None, []
    fewest = min(len(different) for different, _ in found)
    different, record = max((one for one in found if len(one[0]) == fewest), key=lambda one: one[1]["date"])
    return record, different


def _folders(output_dir: Path) -> Iterator[Path]:
    """The folders that may have a verify.json for a run: its own, those above it, and the current one."""
    absolute = output_dir.absolute()
    yield from dict.fromkeys((absolute, *absolute.parents, Path.cwd()))


def differences(record: Setup, setup: Setup) -> list[str]:
    """What has changed since a verification, such as "torch 2.12.0 then, 2.13.0 now".

    Model and data count only if the verification was of a recipe; otherwise it has checked all model families.
    """
    then, now = (_flat(one) for one in (record, setup))
    if now["attention"] is None:  # the model of another library, with its own attention
        now["attention"] = then.get("attention")
    changed = [f"{name} {then.get(name)} then, {value} now" for name, value in now.items() if then.get(name) != value]
    checked = [(name, digest) for name, digest in record.get("recipe", {}).items() if digest is not None]
    return changed + [f"another {name} then" for name, digest in checked if setup["recipe"].get(name) != digest]


def _flat(setup: Setup) -> dict[str, str | int | None]:
    return {**setup["versions"], **setup["hardware"], **setup["settings"]}
