"""Imports: the contracts of pyproject.toml hold, modules form no cycle, and late imports have a reason."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import networkx
import pytest
from helpers.processes import ROOT

PACKAGES = ("bumblebee", "callbacks", "datamodules", "serve")

# Files that import inside functions, so that `bumblebee --help` and the parsers of all commands start without what is named.
LATE_IMPORTS = {
    "bumblebee/cli/commands/*": "torch and whatever else the command needs after its options are parsed",
    "bumblebee/cli/evaluation_tasks.py": "the tasks, which import torch, and the readers of their files",
    "bumblebee/cli/errors/parse_errors.py": "the shipped classes, needed for errors only",
    "bumblebee/cli/recipe_options.py": "the readers of model folders, which import torch",
    "bumblebee/cli/parser.py": "the shipped classes, needed for help only",
    "bumblebee/distributed/deepspeed/*": "deepspeed, which takes seconds and reads environment variables on import",
    "bumblebee/distributed/local_main_first.py": "torch",
    "bumblebee/distributed/process_group.py": "torch",
    "bumblebee/hardware/flops.py": "torch",
    "bumblebee/hardware/gpu_utilization.py": "torch",
    "bumblebee/inference/decode_attention.py": "triton, which is optional",
    "bumblebee/lora/*": "peft, which imports transformers",
    "bumblebee/models/float8_layers.py": "torchao, which is optional",
    "bumblebee/models/huggingface.py": "transformers",
    "bumblebee/nn/attention_kernels.py": "flash-attn, which is optional",
    "bumblebee/optim.py": "torch",
    "bumblebee/plotting/curves.py": "matplotlib",
    "bumblebee/preview/dry_run_process.py": "modules whose memory must not count as the model's",
    "bumblebee/recipe.py": "torch",
    "bumblebee/rewards/judge.py": "openai, which takes a second",
    "bumblebee/rewards/math_answer.py": "math-verify, which is optional",
    "bumblebee/rewards/reward_model.py": "torch: worker processes of other rewards do without it",
    "bumblebee/trainer.py": "torch",
    "bumblebee/training/*": "torch and tqdm",
    "bumblebee/verify/checks/machine_throughput.py": "torch.distributed, which some builds of torch lack",
    "callbacks/*": "torch, numpy, tqdm, matplotlib and optional packages such as wandb",
    "datamodules/readers.py": "pyarrow",
    "serve/server.py": "torch: the server process runs without it",
    "serve/terminal/chat.py": "prompt_toolkit, openai or torch, whichever the chat needs",
    "serve/workers/worker.py": "torch: only worker processes load it",
}


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the import contracts over the packages in a folder."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    env = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)


def test_import_contracts_hold():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("bumblebee/nn/norm.py", "from bumblebee.config import BumblebeeConfig", "nn"),
        ("bumblebee/inference/scheduler.py", "def f():\n    import bumblebee.trainer", "bumblebee.trainer"),
        ("bumblebee/trainer.py", "from callbacks import Checkpoint", "callbacks"),
        ("callbacks/checkpoint.py", "import deepspeed", "deepspeed"),
        ("datamodules/pretrain.py", "from callbacks import Checkpoint", "callbacks"),
    ],
)
def test_planted_violation_is_reported(file, line, message, tmp_path):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "page"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a") as source:
        source.write(f"\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1 and "BROKEN" in done.stdout
    module = file.removesuffix(".py").replace("/", ".")
    assert f"{module} -> " in done.stdout and message in done.stdout


def test_modules_form_no_cycle_late_imports_included():
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True, cache_dir=None)
    edges = [(module, target) for module in graph.modules for target in graph.find_modules_directly_imported_by(module)]
    cycles = [sorted(group) for group in networkx.strongly_connected_components(networkx.DiGraph(edges)) if len(group) > 1]
    assert cycles == []


def late_imports() -> set[str]:
    """Files with an import inside a function."""
    files = set()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        functions = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))
        if any(isinstance(node, ast.Import | ast.ImportFrom) for function in functions for node in ast.walk(function)):
            files.add(path.relative_to(ROOT).as_posix())
    return files


def test_late_imports_are_listed_with_a_reason():
    files = late_imports()
    listed = {file: {pattern for pattern in LATE_IMPORTS if Path(file).match(pattern)} for file in files}
    assert sorted(file for file, patterns in listed.items() if not patterns) == []
    assert set(LATE_IMPORTS) == set().union(*listed.values()), "a listed file has no late import any more"


def test_every_folder_of_modules_is_a_package():
    folders = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []
