"""Sharing the package names ``callbacks``, ``datamodules`` and ``serve`` with the user's repository.

Repositories in the style of Lightning have folders of these names too, and a recipe may name classes from both:
``callbacks.RunSummary`` is ours, ``callbacks.mine.Hello`` theirs. Two mechanisms make this work:

- ``extend_path`` appends folders of the same name on ``sys.path`` to the ``__path__`` of our package, as
  :func:`pkgutil.extend_path` does: our modules first, then the user's.
- ``prefer_ours`` makes ``import callbacks`` find our package wherever the user's folder stands on ``sys.path``: launchers such
  as ``python -m`` put the current folder first. Called by the command line and its subprocesses, never by ``import bumblebee``.

A module or a public name that exists on both sides is ambiguous and raises ``NameCollision``.
"""

from __future__ import annotations

import ast
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

SHARED = ("callbacks", "datamodules", "serve")
HOME = Path(__file__).resolve().parents[2]  # of the installed packages, or of the checkout
_MARK = Path("bumblebee", "trainer.py")  # beside a package of ours, in every version


class NameCollision(ImportError):
    """A module or name of the user's package hides one of ours, or would be hidden by it."""


def extend_path(path: Iterable[str], package: str, names: Iterable[str] = ()) -> list[str]:
    """The ``__path__`` of one of our packages, followed by the user's folders of that name on ``sys.path``.

    Args:
        path: the ``__path__`` so far.
        package: name of the package.
        names: what our package exports, to be compared with the ``__init__.py`` of the user's package.

    Raises:
        NameCollision: a module or name exists on both sides.
    """
    ours, *candidates = pkgutil.extend_path(list(path), package)
    added = [folder for folder in candidates if not _is_copy_of_ours(Path(folder), Path(ours))]
    for folder in added:
        _check_collisions(package, Path(ours), Path(folder), set(names))
    return [ours, *added]


def lazy_attributes(package: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """A module-level ``__getattr__`` (PEP 562) that imports each name on first use.

    A name that is not ours is looked up in the ``__init__.py`` of the user's packages of that name, which runs then.

    Args:
        package: name of the package.
        homes: for each exported name the module that defines it.
    """
    extensions: dict[str, ModuleType] = {}

    def __getattr__(name: str) -> object:
        if name in homes:
            return getattr(import_module(homes[name]), name)
        if not name.startswith("__"):
            for folder in list(sys.modules[package].__path__)[1:]:
                if folder not in extensions:
                    _load_init(package, folder, extensions)
                if name in vars(extensions[folder]):
                    return getattr(extensions[folder], name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__


def prefer_ours() -> None:
    """Make imports of the shared names find our packages, whatever comes first on ``sys.path``."""
    if not any(isinstance(finder, _OurPackages) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OurPackages())


class _OurPackages(MetaPathFinder):
    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        init = HOME / fullname / "__init__.py"
        if fullname not in SHARED or not init.is_file():
            return None
        return spec_from_file_location(fullname, init, submodule_search_locations=[str(init.parent)])


def _load_init(package: str, folder: str, extensions: dict[str, ModuleType]) -> None:
    """Run the ``__init__.py`` of a user's package once; its relative imports resolve against the shared package."""
    module = extensions[folder] = ModuleType(package)
    init = Path(folder) / "__init__.py"
    if init.is_file():
        spec = spec_from_file_location(package, init, submodule_search_locations=[folder])
        assert spec is not None and spec.loader is not None
        module = extensions[folder] = module_from_spec(spec)
        spec.loader.exec_module(module)


def _is_copy_of_ours(folder: Path, ours: Path) -> bool:
    """Whether a folder is ours by another path, or belongs to another copy of Bumblebee."""
    same = folder.resolve() == ours.resolve()
    return same or (folder.parent / _MARK).is_file()


def _check_collisions(package: str, ours: Path, theirs: Path, names: set[str]) -> None:
    both = sorted(_modules_in(ours) & _modules_in(theirs))
    if both:
        module = theirs / both[0]
        where = module if module.is_dir() else module.with_suffix(".py")
        raise NameCollision(f"{where}: the name {package}.{both[0]} is taken by Bumblebee: rename the module")
    init = theirs / "__init__.py"
    if names and init.is_file() and (defined := sorted(names & _names_in(init))):
        raise NameCollision(f"{init}: the name {package}.{defined[0]} is taken by Bumblebee: rename it")


def _modules_in(folder: Path) -> set[str]:
    return {info.name for info in pkgutil.iter_modules([str(folder)])}


def _names_in(init: Path) -> set[str]:
    """Names that the top level of a file defines or imports. The file is not run."""
    try:
        tree = ast.parse(init.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return set()  # reported when it runs
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names
