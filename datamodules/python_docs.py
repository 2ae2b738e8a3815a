"""`python_docs`: a corpus that every machine already has, read from the running interpreter; nothing is downloaded.

Three sources, in this order: the language reference that `help()` shows (pydoc's topics), the docstrings of the
standard library's source files, and the docstrings of the modules written in C. On CPython 3.11: 2.6 MB of text in
8,200 documents, built in less than two seconds.

Choices made:
- Source files are parsed, never imported: importing `antigravity` opens a browser, importing `tkinter` wants a display.
  C modules have to be imported to be read; the list below holds only those whose import changes nothing.
- A name is the one a user would type: `_collections_abc.Mapping` is `collections.abc.Mapping`, `posix.listdir` is
  `os.listdir`, and built-ins have no prefix (`len`, `str.join`). It occurs once; the first source that documents it
  wins.
- A text occurs once too (whitespace aside): `posixpath` and `ntpath`, or six methods that share one sentence, would
  otherwise weigh double in a small corpus.
- The content depends on the interpreter and its platform alone, so `fingerprint()` can name it without building it.
  (One exception: a process that replaced a built-in function, say `print`, does not see that function's docstring.)

    python -c "from datamodules import python_docs; print(*python_docs.documents()[200:210], sep='\\n\\n')"
"""

import ast
import copy
import hashlib
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
from functools import lru_cache
from pathlib import Path

FORMAT = 1  # raise it whenever the same interpreter would give other entries or another layout: caches are keyed by it

MIN_CHARACTERS = 20  # a shorter docstring only repeats its function's name: "Close.", "x + y"
SHORT_CHARACTERS = 40  # below this it has to be a sentence of MIN_WORDS: "Return the square root of x."
MIN_WORDS = 4

CONTROL_CHARACTERS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\ufeff]")  # a few topics and docstrings quote them raw

# Tests, applications, translations of nothing but numbers (encodings), and modules that are jokes.
SKIPPED_MODULES = {
    *("__hello__", "__phello__", "antigravity", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "this"),
    "turtledemo",
}
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "test", "tests"}

# Where the documented things are reached, for the modules that only implement them.
PUBLIC_NAMES = {
    "_collections_abc": "collections.abc",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
    "_threading_local": "threading",
    "_weakrefset": "weakref",
    os.path.__name__: "os.path",
}

# C modules that are safe to import and have no twin in Python, with the name under which their content is public.
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

# Types that no C module exports: one meets their instances.
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
    """One documented thing.

    Attributes:
        name: dotted, as one would type it (`json.dumps`, `str.join`); for a topic `topic:for`.
        kind: "topic", "module", "class" or "function" (methods and properties are functions).
        signature: the call without its prefix, `dumps(obj, *, skipkeys=False)`. A class shows the arguments of its
            constructor, where it defines one; a property is its bare name. Empty for topics and modules, and where C
            code does not tell.
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


def entries() -> list[Entry]:
    """All entries, each name and each text once, in an order that is always the same.

    Raises:
        ValueError: this interpreter comes without the source of its standard library.
    """
    return list(_entries())  # a copy: what a caller does to the list must not reach the next caller


def documents() -> list[str]:
    """The corpus as pretraining text: a heading, an empty line, the docstring; topics have their own headings."""
    return [f"{entry.heading}\n\n{entry.text}" if entry.heading else entry.text for entry in entries()]


def fingerprint() -> str:
    """Names the content without building it: equal on two machines that run the same build of Python."""
    identity = (FORMAT, sys.implementation.name, sys.version, sys.platform)
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]


@lru_cache(maxsize=1)
def _entries() -> tuple[Entry, ...]:
    names: set[str] = set()
    texts: set[str] = set()
    kept = []
    for entry in _all_entries():
        text = " ".join(entry.text.split())
        if entry.name not in names and text not in texts and _says_something(text):
            kept.append(entry)
            names.add(entry.name)
            texts.add(text)
    return tuple(kept)


def _all_entries() -> Iterator[Entry]:
    yield from _topics()
    yield from _source_entries()
    for module, public in COMPILED_MODULES.items():
        yield from _compiled_entries(module, public)
    for name, owner in HIDDEN_TYPES.items():
        yield from _compiled_class(name, owner)


def _says_something(text: str) -> bool:
    sentence = len(text) >= MIN_CHARACTERS and len(text.split()) >= MIN_WORDS
    return sentence or len(text) >= SHORT_CHARACTERS


def _clean(text: str) -> str:
    text = CONTROL_CHARACTERS.sub("", inspect.cleandoc(text))
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()


# ---- topics


def _topics() -> Iterator[Entry]:
    from pydoc_data import topics  # half a megabyte of literals: not at import time

    for name, text in sorted(topics.topics.items()):
        yield Entry(f"topic:{name}", "topic", "", _clean(text))


# ---- Python source


def _source_entries() -> Iterator[Entry]:
    folder = Path(sysconfig.get_path("stdlib"))
    modules = [(*_module_names(path.relative_to(folder)), path) for path in _source_files(folder)]
    if not modules:
        raise ValueError(f"python_docs: this Python has no source files of its standard library in {str(folder)!r}")
    # Modules under their own name first: when io and _pyio document the same thing, io's words are kept.
    for _, name, path in sorted(modules):
        tree = _parse(path)
        yield Entry(name, "module", "", _docstring(tree))
        yield from _definitions(tree, name)


def _source_files(folder: Path) -> Iterator[Path]:
    wanted = sys.stdlib_module_names - SKIPPED_MODULES  # leaves out site-packages and sitecustomize as well
    for top in folder.iterdir():
        if top.stem in wanted:
            files = [top] if top.suffix == ".py" else top.rglob("*.py")
            yield from (path for path in files if not SKIPPED_FOLDERS.intersection(path.relative_to(folder).parts))


def _module_names(path: Path) -> tuple[bool, str]:
    """(is it known under another name, its public name) of a file, given relative to the library."""
    name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    return name in PUBLIC_NAMES, PUBLIC_NAMES.get(name, name)


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules: not our user's concern
        return ast.parse(path.read_bytes(), str(path))  # bytes, so that a coding line is obeyed


def _definitions(parent: ast.AST, prefix: str) -> Iterator[Entry]:
    """The functions and classes of a module or a class, those under `if` and `try` included, not those in functions."""
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
    """The constructor's arguments without self or cls; the bare name where the class inherits its constructor."""
    for item in node.body:
        if isinstance(item, Function) and item.name in ("__init__", "__new__"):
            return f"{node.name}({ast.unparse(_without_first(item.args))})"
    return node.name


def _without_first(arguments: ast.arguments) -> ast.arguments:
    """A copy without self or cls: the tree is still needed for the method's own entry."""
    rest = copy.copy(arguments)
    if rest.posonlyargs:
        rest.posonlyargs = rest.posonlyargs[1:]
    else:
        rest.args = rest.args[1:]
    return rest


# ---- C modules


def _compiled_entries(module_name: str, public: str) -> Iterator[Entry]:
    try:
        module = importlib.import_module(module_name)
    except ImportError:  # another platform, or a Python built without it
        return
    prefix = f"{public}." if public else ""
    yield Entry(public or module_name, "module", "", _text(module))
    for name, value in sorted(_compiled_members(module, {module_name, public}).items()):
        if inspect.isclass(value):
            yield from _compiled_class(f"{prefix}{name}", value)
        else:
            yield _compiled_entry(f"{prefix}{name}", "function", value)


def _compiled_members(module: types.ModuleType, homes: set[str]) -> dict[str, object]:
    """The functions of a module, and those of its classes that say they are at home there, by their own names.

    Their own names matter: tools replace `sys.excepthook`, but its original stays reachable as `sys.__excepthook__`.
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
        if isinstance(value, METHOD_TYPES):  # leaves out operators ("Return self+value.") and plain attributes
            yield _compiled_entry(f"{name}.{method}", "function", getattr(owner, method))


def _compiled_entry(name: str, kind: str, value: object) -> Entry:
    last = name.rpartition(".")[2]
    signature, text = _split_call(last, _text(value))
    try:
        signature = f"{last}{inspect.signature(value)}"  # type: ignore[arg-type]
    except Exception:  # ValueError where there is none; but defaults are evaluated, which fails in other ways as well
        pass  # old docstrings begin with the call instead
    return Entry(name, kind, signature, text)


def _text(value: object) -> str:
    text = value.__doc__
    return _clean(text) if isinstance(text, str) else ""  # a class with an attribute named __doc__ gives a descriptor


def _split_call(name: str, text: str) -> tuple[str, str]:
    """(signature, rest) of a docstring whose first line is a call: "chain(*iterables) --> chain object".

    The line is taken off where it stands alone. One that goes on ("D.insert(index, object) -- insert object before
    index") stays in the text, and of several calls ("range(stop) ...", "range(start, stop[, step]) ...") none is taken.
    """
    first, _, rest = text.partition("\n")
    pattern = rf"(?:\w+\.)*({re.escape(name)}\((?:[^()]|\([^()]*\))*\))"
    call = re.match(pattern, first)
    if not call or re.match(pattern, rest):
        return "", text
    return call[1], rest.strip() if rest.startswith("\n") else text
