"""Who may import whom, read from the source of the packages: nothing is imported to find out.

`RULES` is the table, one sentence a row. Next to it stand three rules that are not about a pair of modules: no import
circles, optional packages in one file each, and every folder with Python files is a package.

An import at the top of a module runs when the module is loaded. An import inside a function, or under
`if TYPE_CHECKING`, is "late": it cannot close a circle, but it still is a dependency, so only a row with `late_ok`
lets it pass.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("bumblebee", "callbacks", "datamodules", "serve")

# Each is imported in exactly one file, whose error says what to install. An entry lists all names of the package.
OPTIONAL = {
    "bitsandbytes": ("bitsandbytes",),
    "flash-attn": ("flash_attn",),
    "matplotlib": ("matplotlib",),
    "peft": ("peft",),
    "pyarrow": ("pyarrow",),
    "tensorboard": ("tensorboard", "torch.utils.tensorboard"),
    "transformers": ("transformers",),
    "wandb": ("wandb",),
}


@dataclass(frozen=True)
class Rule:
    """The modules at and below `of`, except `but`, must not import `never`; or, where `only` is set, nothing else."""

    says: str
    of: tuple[str, ...]
    never: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    but: tuple[str, ...] = ()
    late_ok: bool = False

    def forbids(self, found: Import) -> bool:
        if not under(found.source, self.of) or under(found.source, self.but) or (self.late_ok and found.late):
            return False
        return under(found.target, self.never) or bool(self.only) and not under(found.target, self.only)


STDLIB = tuple(sys.stdlib_module_names)

RULES = (
    Rule(
        "bumblebee never imports callbacks, datamodules or serve",
        of=("bumblebee",),
        never=("callbacks", "datamodules", "serve"),
        but=("bumblebee.cli",),
    ),
    Rule(
        "cli.py reaches callbacks, datamodules and serve only inside functions",
        of=("bumblebee.cli",),
        never=("callbacks", "datamodules", "serve"),
        late_ok=True,
    ),
    Rule(
        "only bumblebee/distributed/deepspeed imports deepspeed",
        of=PACKAGES,
        never=("deepspeed",),
        but=("bumblebee.distributed.deepspeed",),
    ),
    Rule(
        "inference never imports the trainer",
        of=("bumblebee.inference",),
        never=("bumblebee.trainer", "bumblebee.distributed.deepspeed"),
    ),
    Rule(
        "nn imports torch and bumblebee.nn, nothing above",
        of=("bumblebee.nn",),
        only=(*STDLIB, "torch", "einops", "triton", "flash_attn", "bumblebee.nn"),
    ),
    Rule("callbacks and datamodules do not import each other", of=("callbacks",), never=("datamodules", "serve")),
    Rule("datamodules and callbacks do not import each other", of=("datamodules",), never=("callbacks", "serve")),
    Rule(
        "serve stands on bumblebee.inference, not on training",
        of=("serve",),
        never=(
            "callbacks",
            "datamodules",
            "bumblebee.trainer",
            "bumblebee.distributed.deepspeed.engine",
            "bumblebee.tasks",
        ),
    ),
)


@dataclass(frozen=True)
class Import:
    """One name that one line of a module imports."""

    source: str
    target: str  # a module where it is one of ours
    place: str  # file:line
    late: bool  # inside a function or under TYPE_CHECKING


def under(module: str, roots: tuple[str, ...]) -> bool:
    return any(module == root or module.startswith(root + ".") for root in roots)


def files(root: Path) -> dict[str, Path]:
    """Dotted name -> file, for every module of our packages below `root`."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path) -> list[Import]:
    modules = files(root)
    found = []
    for source, path in modules.items():
        package = source if path.name == "__init__.py" else source.rpartition(".")[0]
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        for node, late in statements(tree, late=False):
            place = f"{path.relative_to(root).as_posix()}:{node.lineno}"
            found += [Import(source, target, place, late) for target in targets(node, package, modules)]
    return found


def statements(node: ast.AST, late: bool) -> Iterator[tuple[ast.stmt | ast.expr, bool]]:
    """Everything in a file that may be an import, with whether it is late."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom, ast.Call)):
            yield child, late
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for branch, is_late in ((child.body, True), (child.orelse, late)):
                yield from statements(ast.Module(body=branch, type_ignores=[]), is_late)
        else:
            in_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from statements(child, late or in_function)


def targets(node: ast.stmt | ast.expr, package: str, modules: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*parents, *([node.module] if node.module else [])])
        for alias in node.names:
            # `from a import b` names the module a.b where there is one. Outside our packages we cannot know, and the
            # longer name does no harm: rules compare prefixes, and `from torch.utils import tensorboard` must be seen.
            longer = f"{base}.{alias.name}"
            yield longer if longer in modules or not under(base, PACKAGES) else base
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        name = node.args[0].value
        if isinstance(name, str) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield name


def broken_rules(root: Path) -> list[str]:
    return sorted(f"{i.place}: imports {i.target} -- {r.says}" for i in imports(root) for r in RULES if r.forbids(i))


def scattered_packages(root: Path) -> list[str]:
    problems = []
    for package, names in OPTIONAL.items():
        places: dict[str, str] = {}
        for found in imports(root):
            if under(found.target, names):
                places.setdefault(found.source, found.place)
        if len(places) > 1:
            problems += [f"{place}: imports {package} -- one file alone imports it" for place in places.values()]
    return sorted(problems)


def circles(root: Path) -> list[str]:
    """One line for every circle a depth-first walk closes: `a.py:1 -> b.py:3 -> a`."""
    graph: dict[str, dict[str, str]] = {module: {} for module in files(root)}
    for found in imports(root):
        if not found.late and found.target in graph:
            graph[found.source].setdefault(found.target, found.place)
    problems, finished = [], set()

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            circle = trail[trail.index(module) :]
            steps = [graph[a][b] for a, b in zip(circle, [*circle[1:], module], strict=True)]
            problems.append(" -> ".join([*steps, module]) + " -- imports at module level form a circle")
        elif module not in finished:
            for target in graph[module]:
                visit(target, [*trail, module])
            finished.add(module)

    for module in graph:
        visit(module, [])
    return sorted(problems)


def folders_without_init(root: Path) -> list[str]:
    folders = {path.parent for path in files(root).values()}
    missing = [folder.relative_to(root).as_posix() for folder in folders if not (folder / "__init__.py").is_file()]
    return sorted(f"{folder}/__init__.py:1: missing -- every folder with Python files is a package" for folder in missing)


CHECKS = (broken_rules, scattered_packages, circles, folders_without_init)


def problems(root: Path) -> list[str]:
    return [line for check in CHECKS for line in check(root)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_packages_keep_the_import_rules(check):
    assert files(ROOT), f"no package found below {ROOT}"
    found = check(ROOT)
    assert not found, "\n" + "\n".join(found)


# What is planted, and the message it must draw. Folders get their __init__.py unless the row plants one.
VIOLATIONS = [
    (
        {"bumblebee/trainer.py": "import torch\nfrom callbacks import Checkpoint\n"},
        "bumblebee/trainer.py:2: imports callbacks -- bumblebee never imports callbacks, datamodules or serve",
    ),
    (
        {"bumblebee/trainer.py": "def fit():\n    import serve.app\n"},
        "bumblebee/trainer.py:2: imports serve.app -- bumblebee never imports callbacks, datamodules or serve",
    ),
    (
        {"bumblebee/x.py": "import importlib\nimportlib.import_module('datamodules.sft')\n"},
        "bumblebee/x.py:2: imports datamodules.sft -- bumblebee never imports callbacks, datamodules or serve",
    ),
    (
        {"bumblebee/cli/main.py": "def serve():\n    import serve\n\nimport callbacks\n"},
        "bumblebee/cli/main.py:4: imports callbacks -- cli.py reaches callbacks, datamodules and serve only inside functions",
    ),
    (
        {
            "bumblebee/distributed/deepspeed/engine.py": "import deepspeed\n",
            "callbacks/zero.py": "from deepspeed.utils import groups\n",
        },
        "callbacks/zero.py:1: imports deepspeed.utils.groups -- only bumblebee/distributed/deepspeed imports deepspeed",
    ),
    (
        {"bumblebee/trainer.py": "", "bumblebee/inference/model_runner.py": "from ..trainer import Trainer\n"},
        "bumblebee/inference/model_runner.py:1: imports bumblebee.trainer -- inference never imports the trainer",
    ),
    (
        {
            "bumblebee/config.py": "",
            "bumblebee/nn/rope.py": "import math\nimport torch.nn\nfrom bumblebee import config\n",
        },
        "bumblebee/nn/rope.py:3: imports bumblebee.config -- nn imports torch and bumblebee.nn, nothing above",
    ),
    (
        {"bumblebee/nn/rope.py": "from transformers import AutoModel\n"},
        "bumblebee/nn/rope.py:1: imports transformers.AutoModel -- nn imports torch and bumblebee.nn, nothing above",
    ),
    (
        {"callbacks/x.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from datamodules import SFT\n"},
        "callbacks/x.py:3: imports datamodules -- callbacks and datamodules do not import each other",
    ),
    (
        {"datamodules/sft.py": "from callbacks.plot import Plot\n"},
        "datamodules/sft.py:1: imports callbacks.plot -- datamodules and callbacks do not import each other",
    ),
    (
        {"serve/worker.py": "import bumblebee.trainer\n"},
        "serve/worker.py:1: imports bumblebee.trainer -- serve stands on bumblebee.inference, not on training",
    ),
    (
        {"bumblebee/a.py": "from bumblebee.b import x\n", "bumblebee/b.py": "import os\nfrom .a import y\n"},
        "bumblebee/a.py:1 -> bumblebee/b.py:2 -> bumblebee.a -- imports at module level form a circle",
    ),
    (
        {"bumblebee/__init__.py": "from bumblebee.a import x\n", "bumblebee/a.py": "from bumblebee import y\n"},
        "bumblebee/__init__.py:1 -> bumblebee/a.py:1 -> bumblebee -- imports at module level form a circle",
    ),
    (
        {
            "callbacks/tb.py": "from torch.utils import tensorboard\n",
            "callbacks/plot.py": "try:\n    import tensorboard\nexcept ImportError:\n    pass\n",
        },
        "callbacks/plot.py:2: imports tensorboard -- one file alone imports it",
    ),
]


def plant(root: Path, tree: dict[str, str]) -> Path:
    for name, text in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        for folder in list(path.relative_to(root).parents)[:-1]:
            (root / folder / "__init__.py").touch()
    return root


@pytest.mark.parametrize(("tree", "message"), VIOLATIONS, ids=[message for _, message in VIOLATIONS])
def test_a_planted_violation_is_found_and_named_with_file_line_and_rule(tree, message, tmp_path):
    assert message in problems(plant(tmp_path, tree))


def test_every_rule_has_a_planted_violation():
    assert [rule.says for rule in RULES if not any(rule.says in message for _, message in VIOLATIONS)] == []


def test_a_folder_without_init_is_found(tmp_path):
    (plant(tmp_path, {"bumblebee/nn/rope.py": ""}) / "bumblebee/nn/__init__.py").unlink()
    assert problems(tmp_path) == ["bumblebee/nn/__init__.py:1: missing -- every folder with Python files is a package"]


def test_imports_that_are_allowed_draw_no_message(tmp_path):
    tree = {
        "bumblebee/__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from bumblebee import x\n",
        "bumblebee/__main__.py": "from bumblebee.cli.main import main\n",
        "bumblebee/callback.py": "import typing\nif typing.TYPE_CHECKING:\n    from bumblebee.trainer import Trainer\n",
        "bumblebee/cli/main.py": "def serve():\n    from serve import app\n    import datamodules\n",
        "bumblebee/distributed/deepspeed/engine.py": "import deepspeed\n",
        "bumblebee/inference/generator.py": "from bumblebee.model import M\n",
        "bumblebee/model.py": "from bumblebee.nn import rope\n\ndef save():\n    from bumblebee.weights import save\n",
        "bumblebee/nn/attention.py": "from . import rope\nfrom .rope import rotate\n",
        "bumblebee/nn/rope.py": "import math\nimport torch\n\nclass Rope(torch.nn.Module):\n    import einops\n",
        "bumblebee/trainer.py": "from bumblebee.callback import C\nfrom bumblebee.distributed.deepspeed.engine import E\n",
        "bumblebee/weights.py": "from bumblebee.model import M\n",
        "callbacks/plot.py": "import matplotlib\nfrom matplotlib import pyplot\nfrom bumblebee import Callback\n",
        "datamodules/sft.py": "from bumblebee.datamodule import DataModule\nfrom datamodules.record_files import read\n",
        "serve/app.py": "from bumblebee.inference.generator import Generator\n",
    }
    assert problems(plant(tmp_path, tree)) == []
