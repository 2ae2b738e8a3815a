"""Reward functions that worker processes import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping

Records = list[Mapping[str, object]]


def lengths(prompts: list[str], completions: list[str], records: Records) -> list[float]:
    """Lengths of prompt, completion and answer, and a side effect on stdout that must not disturb anything."""
    print("scoring", completions)
    return [len(p) + len(c) + len(str(r["answer"])) for p, c, r in zip(prompts, completions, records, strict=True)]


def by_name(prompts: list[str], completions: list[str], records: Records) -> list[object]:
    """Do what the completion says."""
    (text,) = completions
    actions = {
        "regex": lambda: re.match(r"(a+)+$", "a" * 40 + "b"), "sleep": lambda: time.sleep(60), "exit": lambda: os._exit(7),
        "kill": lambda: os.kill(os.getpid(), 9), "none": lambda: None, "raise": lambda: records[0]["absent"],
        "quit": sys.exit,
    }  # fmt: skip
    return [actions[text]() if text in actions else 0.5]


def hangs_with_a_child(prompts: list[str], completions: list[str], records: Records) -> list[float]:
    """Write the numbers of this process and of a child process to the file in the record, then hang in C code."""
    child = subprocess.Popen(["sleep", "100"])
    with open(str(records[0]["file"]), "a", encoding="utf-8") as file:
        file.write(f"{os.getpid()} {child.pid}\n")
    re.match(r"(a+)+$", "a" * 40 + "b")
    return [0.0]
