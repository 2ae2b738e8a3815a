"""``bumblebee verify`` at a precision and stage: each failed measurement with its bound, and the measured throughputs.

    python -m benchmarks.gpu.verification --device cuda --precision bf16 --zero_stage 1

The exit code is that of ``bumblebee verify``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.results import report


def main(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        words = ["--precision", options.precision, "--zero_stage", str(options.zero_stage), "--attention", options.attention]
        command = [sys.executable, "-m", "bumblebee", "verify", "--device", options.device, "--folder", folder, *words]
        code = subprocess.run(command).returncode
        record = Path(folder) / "verify.json"
        if record.is_file():
            for figures in summary(json.loads(record.read_text())):
                report(**figures)
    return code


def summary(record: dict) -> Iterator[dict[str, object]]:
    """What a report needs of verify.json: the number of checks, those that failed, and throughputs."""
    checks = record["checks"]
    yield {"checks": len(checks), "failed": [check["name"] for check in checks if check["status"] == "FAIL"]}
    for check in checks:
        if check["status"] == "FAIL" and check["error"]:
            yield {"check": check["name"], "error": check["error"]}
        for figure in check["measurements"]:
            if check["status"] == "measured" or not figure["passed"]:
                shown = {name: figure[name] for name in ("value", "bound", "unit") if figure.get(name) not in (None, "")}
                yield {"check": check["name"], "measurement": figure["name"], **shown}


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--device", choices=["cpu", "cuda"], required=True)
    arguments.add_argument("--precision", default="bf16")
    arguments.add_argument("--zero_stage", type=int, default=1)
    arguments.add_argument("--attention", default="auto")
    sys.exit(main(arguments.parse_args()))
