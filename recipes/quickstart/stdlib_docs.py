"""Read the documentation of the running Python: text that every machine already has.

Three sources, in this order: the language reference that `help()` shows (pydoc's topics), the docstrings of the standard
library's source files, and the docstrings of the modules written in C. On CPython 3.11 this is 2.6 MB of text in 8,200
documents, read in less than two seconds.

Choices made:
- Source files are parsed, never imported: importing `antigravity` opens a browser, importing `tkinter` needs a display. C
  modules have to be imported; COMPILED_MODULES lists only those whose import has no side effects.
- A name is the one a user types: `_collections_abc.Mapping` is `collections.abc.Mapping`, `posix.listdir` is `os.listdir`,
  built-ins have no prefix (`len`, `str.join`). Each name occurs once, with its documentation from the first source.
- Each text occurs once too (up to whitespace): `posixpath` and `ntpath`, or six methods that share one sentence, would
  otherwise count twice in a small corpus.

    python -c "import stdlib_docs; print(*stdlib_docs.entries()[200:210], sep='\\n\\n')"
"""

import ast
import copy
import importlib
import inspect
import os
import re
import sys
import sysconfig
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MIN_CHARACTERS = 20  # shorter docstrings only repeat the name: "Close.", "x + y"
SHORT_CHARACTERS = 40  # below this length at least MIN_WORDS are needed: "Return the square root of x."
MIN_WORDS = 4

CONTROL_CHARACTERS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\ufeff]")  # a few docstrings contain them literally

# Tests, applications, character tables (encodings) and jokes.
SKIPPED_MODULES = {
    *("__hello__", "__phello__", "antigravity", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "this"),
    "turtledemo",
}
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "test", "tests"}

# Implementation module -> the module through which users reach it.
PUBLIC_NAMES = {
    "_collections_abc": "collections.abc",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
    "_threading_local": "threading",
    "_weakrefset": "weakref",
    os.path.__name__: "os.path",
}

# C modules that are safe to import and have no counterpart in Python -> the module that users import instead.
COMPILED_MODULES = (
    {"builtins": "", "nt": "os", "posix": "os", "pyexpat": "xml.parsers.expat", "_thread": "_thread"}
    | {
        f"_{name}": name
        for name in (
            "ast bz2 codecs collections contextvars csv functools hashlib io locale lzma operator queue random signal "
            "socket sqlite3 ssl stat struct symtable tracemalloc warnings weakref"
        ).split()
    }
    | {
        name: name
        for name in (
            "array atexit binascii cmath errno faulthandler fcntl gc grp itertools marshal math mmap msvcrt pwd "
            "resource select sys syslog termios time unicodedata zlib"
        ).split()
    }
)

# Types that no C module exports.
HIDDEN_TYPES: dict[str, type] = {
    "re.Match": re.Match,
    "re.Pattern": re.Pattern,
    "types.CodeType": types.CodeType,
    "types.CoroutineType": types.CoroutineType,
    "types.FunctionType": types.FunctionType,
    "types.GeneratorType": types.GeneratorType,
    "types.MappingProxyType": types.MappingProxyType,
    "types.MethodType": types.MethodType,
    "types.ModuleType": types.ModuleType,
    "types.SimpleNamespace": types.SimpleNamespace,
}

Function = ast.FunctionDef | ast.AsyncFunctionDef
BRANCHES = (ast.If, ast.Try, ast.ExceptHandler, ast.With)
METHOD_TYPES = (types.MethodDescriptorType, types.ClassMethodDescriptorType, staticmethod)


@dataclass(frozen=True)
class Entry:
    """A documented object.

    Attributes:
        name: dotted, as a user types it (`json.dumps`, `str.join`); `topic:for` for a topic.
        kind: "topic", "module", "class" or "function" (methods and properties are functions).
        signature: the call without its prefix, `dumps(obj, *, skipkeys=False)`. A class has the arguments of its
            constructor if it defines one, a property only its name. Empty for topics, modules, and C code without a
            signature.
        text: the docstring, without indentation.
    """

    name: str
    kind: str
    signature: str
    text: str

    @property
    def heading(self) -> str:
        """The line above the text: `json.dumps(obj, ...)`, `class str`, `module json`; empty for a topic."""
        if self.kind == "topic":
            return ""
        prefix, _, last = self.name.rpartition(".")
        call = ".".join(filter(None, (prefix, self.signature or last)))
        return call if self.kind == "function" else f"{self.kind} {call}"

    @property
    def document(self) -> str:
        """The entry as pretraining text: the heading, an empty line, the docstring."""
        return f"{self.heading}\n\n{self.text}" if self.heading else self.text


def entries() -> list[Entry]:
    """All entries, each name and each text once, in a fixed order.

    Raises:
        ValueError: this Python comes without the source files of its standard library.
    """
    names: set[str] = set()
    texts: set[str] = set()
    unique = []
    for entry in _all_entries():
        text = " ".join(entry.text.split())
        if entry.name not in names and text not in texts and _is_informative(text):
            unique.append(entry)
            names.add(entry.name)
            texts.add(text)
    return unique


def _all_entries() -> Iterator[Entry]:
    yield from _topics()
    yield from _source_entries()
    for module, public in COMPILED_MODULES.items():
        yield from _compiled_entries(module, public)
    for name, owner in HIDDEN_TYPES.items():
        yield from _compiled_class(name, owner)


def _is_informative(text: str) -> bool:
    sentence = len(text) >= MIN_CHARACTERS and len(text.split()) >= MIN_WORDS
    return sentence or len(text) >= SHORT_CHARACTERS


def _clean(text: str) -> str:
    text = CONTROL_CHARACTERS.sub("", inspect.cleandoc(text))
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()


# -- topics ------------------------------------------------------------------------------------------------------------


def _topics() -> Iterator[Entry]:
    from pydoc_data import topics  # half a megabyte of literals

    for name, text in sorted(topics.topics.items()):
        yield Entry(f"topic:{name}", "topic", "", _clean(text))


# -- Python source -----------------------------------------------------------------------------------------------------


def _source_entries() -> Iterator[Entry]:
    folder = Path(sysconfig.get_path("stdlib"))
    modules = [(*_module_names(path.relative_to(folder)), path) for path in _source_files(folder)]
    if not modules:
        raise ValueError(f"{folder}: this Python comes without the source files of its standard library")
    # Modules under their own name first: if io and _pyio document the same object, io's text is kept.
    for _, name, path in sorted(modules):
        tree = _parse(path)
        yield Entry(name, "module", "", _docstring(tree))
        yield from _definitions(tree, name)


def _source_files(folder: Path) -> Iterator[Path]:
    modules = sys.stdlib_module_names - SKIPPED_MODULES  # without site-packages and sitecustomize
    for top in folder.iterdir():
        if top.stem in modules:
            files = [top] if top.suffix == ".py" else top.rglob("*.py")
            yield from (path for path in files if not SKIPPED_FOLDERS.intersection(path.relative_to(folder).parts))


def _module_names(path: Path) -> tuple[bool, str]:
    """(has another public name, public name) of the module in a file; ``path`` is relative to the library."""
    name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    return name in PUBLIC_NAMES, PUBLIC_NAMES.get(name, name)


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        return ast.parse(path.read_bytes(), str(path))  # as bytes, for files with a coding line


def _definitions(parent: ast.AST, prefix: str) -> Iterator[Entry]:
    """The functions and classes of a module or class, including those under `if` and `try`, without nested functions."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, Function):
            yield Entry(f"{prefix}.{node.name}", "function", _signature(node), _docstring(node))
        elif isinstance(node, ast.ClassDef):
            yield Entry(f"{prefix}.{node.name}", "class", _class_signature(node), _docstring(node))
            yield from _definitions(node, f"{prefix}.{node.name}")
        elif isinstance(node, BRANCHES):
            yield from _definitions(node, prefix)


def _docstring(node: ast.Module | ast.ClassDef | Function) -> str:
    return _clean(ast.get_docstring(node, clean=False) or "")


def _signature(node: Function) -> str:
    if any(ast.unparse(decorator).endswith("property") for decorator in node.decorator_list):
        return node.name
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){returns}"


def _class_signature(node: ast.ClassDef) -> str:
    """The constructor's arguments without self or cls; only the name if the constructor is inherited."""
    for item in node.body:
        if isinstance(item, Function) and item.name in ("__init__", "__new__"):
            return f"{node.name}({ast.unparse(_without_first(item.args))})"
    return node.name


def _without_first(arguments: ast.arguments) -> ast.arguments:
    """A copy without self or cls; the tree itself is still needed for the method's own entry."""
    rest = copy.copy(arguments)
    if rest.posonlyargs:
        rest.posonlyargs = rest.posonlyargs[1:]
    else:
        rest.args = rest.args[1:]
    return rest


# -- C modules ---------------------------------------------------------------------------------------------------------


def _compiled_entries(module_name: str, public: str) -> Iterator[Entry]:
    try:
        module = importlib.import_module(module_name)
    except ImportError:  # missing on this platform or in this build
        return
    prefix = f"{public}." if public else ""
    yield Entry(public or module_name, "module", "", _text(module))
    for name, value in sorted(_compiled_members(module, {module_name, public}).items()):
        if inspect.isclass(value):
            yield from _compiled_class(f"{prefix}{name}", value)
        else:
            yield _compiled_entry(f"{prefix}{name}", "function", value)


def _compiled_members(module: types.ModuleType, homes: set[str]) -> dict[str, object]:
    """The module's functions, and the classes whose __module__ is in ``homes``, by their own names.

    Their own names, not the module's: tools replace `sys.excepthook`, but the original remains in `sys.__excepthook__`.
    """
    members: dict[str, object] = {}
    for value in vars(module).values():
        home_class = inspect.isclass(value) and value.__module__ in homes
        if home_class or (inspect.isbuiltin(value) and inspect.ismodule(value.__self__)):
            members[value.__name__] = value
    return members


def _compiled_class(name: str, owner: type) -> Iterator[Entry]:
    yield _compiled_entry(name, "class", owner)
    for method, value in sorted(vars(owner).items()):
        if isinstance(value, METHOD_TYPES):  # no operators ("Return self+value.") or attributes
            yield _compiled_entry(f"{name}.{method}", "function", getattr(owner, method))


def _compiled_entry(name: str, kind: str, value: object) -> Entry:
    last = name.rpartition(".")[2]
    signature, text = _split_call(last, _text(value))
    try:
        signature = f"{last}{inspect.signature(value)}"  # type: ignore[arg-type]
    except Exception:  # ValueError if it has none, but evaluating the defaults may raise anything
        pass  # older docstrings begin with the call instead
    return Entry(name, kind, signature, text)


def _text(value: object) -> str:
    text = value.__doc__
    return _clean(text) if isinstance(text, str) else ""  # a descriptor if the class defines __doc__


def _split_call(name: str, text: str) -> tuple[str, str]:
    """(signature, rest) of a docstring whose first line is a call: "chain(*iterables) --> chain object".

    The line is removed only if a blank line follows: "D.insert(index, object) -- insert object before index" stays in the
    text. If several calls are listed ("range(stop) ...", "range(start, stop[, step]) ..."), the signature is empty.
    """
    first, _, rest = text.partition("\n")
    pattern = rf"(?:\w+\.)*({re.escape(name)}\((?:[^()]|\([^()]*\))*\))"
    call = re.match(pattern, first)
    if not call or re.match(pattern, rest):
        return "", text
    return call[1], rest.strip() if rest.startswith("\n") else text
