"""Run every kernel benchmark, each in a process of its own.

    python -m benchmarks.kernels [--device cuda] [--dtype bf16] [--only attention rope]

Other options are passed on. Takes a few minutes. The exit code is 1 if a variant is wrong or a script fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

KERNELS = (
    "attention", "decode_attention", "rms_norm", "rope", "qk_norm", "swiglu", "linear_cross_entropy", "experts", "sampler",
    "optimizer_step",
)  # fmt: skip


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", choices=KERNELS, default=KERNELS, metavar="KERNEL")
    chosen, rest = options.parse_known_args()
    failed = [
        name for name in chosen.only if subprocess.run([sys.executable, "-m", f"benchmarks.kernels.{name}", *rest]).returncode
    ]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
