"""What `datamodules.python_docs` promises: a clean, repeatable corpus, read without importing the library."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from datamodules import python_docs
from datamodules.python_docs import documents, entries, fingerprint

ROOT = Path(python_docs.__file__).parents[1]


@pytest.fixture(scope="module")
def named():
    return {entry.name: entry for entry in entries()}


def run(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    variables = {**os.environ, **environment}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, cwd=ROOT, env=variables, check=True, capture_output=True, text=True).stdout


def test_the_corpus_is_large_enough_to_learn_from():
    kinds = [entry.kind for entry in entries()]
    assert set(kinds) == {"topic", "module", "class", "function"}
    assert kinds.count("topic") > 60
    assert 6000 < len(kinds) < 12000
    assert 1_500_000 < sum(len(text.encode()) for text in documents()) < 5_000_000


def test_the_content_is_the_same_in_every_process():
    code = """
import hashlib, json
from datamodules import python_docs
whole = json.dumps([python_docs.documents(), [vars(entry) for entry in python_docs.entries()]])
print(hashlib.sha256(whole.encode()).hexdigest(), python_docs.fingerprint())
"""
    assert run(code, PYTHONHASHSEED="1") == run(code, PYTHONHASHSEED="2")


def test_no_name_and_no_text_occurs_twice():
    texts = [" ".join(entry.text.split()) for entry in entries()]
    assert len(set(texts)) == len(texts)
    assert len({entry.name for entry in entries()}) == len(texts)
    assert len(set(documents())) == len(texts)


def test_every_text_says_something_and_can_be_encoded():
    for entry in entries():
        assert entry.text == entry.text.strip()
        assert len(entry.text) >= python_docs.MIN_CHARACTERS
        assert not python_docs.CONTROL_CHARACTERS.search(entry.text)
        entry.text.encode()


def test_no_signature_shows_an_address():
    assert not [entry.signature for entry in entries() if " at 0x" in entry.signature]


@pytest.mark.parametrize(
    ("name", "kind", "heading"),
    [
        ("json", "module", "module json"),
        ("len", "function", "len(obj, /)"),
        ("str.join", "function", "str.join(self, iterable, /)"),
        ("range", "class", "class range"),
        ("math.sqrt", "function", "math.sqrt(x, /)"),
        ("os.path.join", "function", "os.path.join("),
        ("os.listdir", "function", "os.listdir(path=None)"),
        ("itertools.chain", "class", "class itertools.chain(*iterables)"),
        ("collections.deque.insert", "function", "collections.deque.insert("),
        ("collections.abc.Mapping", "class", "class collections.abc.Mapping"),
        ("decimal.Decimal.sqrt", "function", "decimal.Decimal.sqrt(self, context=None)"),
        ("json.decoder.JSONDecoder", "class", "class json.decoder.JSONDecoder(*, object_hook=None"),
        ("re.Pattern.match", "function", "re.Pattern.match(self, /, string"),
        ("sys.excepthook", "function", "sys.excepthook("),
        ("topic:for", "topic", ""),
    ],
)
def test_known_things_have_their_usual_names(named, name, kind, heading):
    assert named[name].kind == kind
    assert named[name].heading.startswith(heading)


def test_json_dumps_has_its_signature_and_its_docstring(named):
    entry = named["json.dumps"]
    assert entry.signature == (
        "dumps(obj, *, skipkeys=False, ensure_ascii=True, check_circular=True, allow_nan=True, cls=None, indent=None, "
        "separators=None, default=None, sort_keys=False, **kw)"
    )
    assert entry.text == (json.dumps.__doc__ or "").replace("\n    ", "\n").strip()
    assert f"json.{entry.signature}\n\n{entry.text}" in documents()


@pytest.mark.parametrize(
    ("text", "signature", "rest"),
    [
        ("f(a[, b]) --> int\n\nReturn it.", "f(a[, b])", "Return it."),
        ("D.f(a, b=(1, 2)) -- insert a", "f(a, b=(1, 2))", "D.f(a, b=(1, 2)) -- insert a"),
        ("f(a) -> int\nf(a, b) -> int\n\nReturn it.", "", "f(a) -> int\nf(a, b) -> int\n\nReturn it."),
        ("Return f(a).", "", "Return f(a)."),
    ],
)
def test_a_call_in_the_first_line_is_the_signature(text, signature, rest):
    assert python_docs._split_call("f", text) == (signature, rest)


def test_a_property_is_named_without_parentheses(named):
    assert named["fractions.Fraction.limit_denominator"].signature == "limit_denominator(self, max_denominator=1000000)"
    assert named["threading.Thread.name"].signature == "name"


def test_a_topic_is_its_own_document(named):
    assert documents()[0] == entries()[0].text
    assert named["topic:for"].text.startswith('The "for" statement\n***')


def test_tests_and_applications_are_left_out():
    tops = {entry.name.partition(".")[0] for entry in entries()}
    assert not tops & {"test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pip", "setuptools", "antigravity"}
    assert not [entry.name for entry in entries() if ".test." in entry.name or ".tests." in entry.name]


def test_the_library_is_read_without_being_imported():
    code = """
import sys
from datamodules import python_docs
python_docs.entries()
print(*sys.modules)
"""
    loaded = set(run(code).split())
    assert "pydoc_data.topics" in loaded
    assert not loaded & {"antigravity", "asyncio", "ctypes", "distutils", "readline", "this", "tkinter", "turtle"}


def test_a_replaced_hook_does_not_change_the_content(monkeypatch, named):
    monkeypatch.setattr(sys, "excepthook", lambda *_: None)
    python_docs._entries.cache_clear()
    assert {entry.name: entry for entry in entries()} == named


def test_callers_cannot_spoil_the_cached_list():
    entries().clear()
    assert entries()


def test_the_fingerprint_changes_with_the_format(monkeypatch):
    before = fingerprint()
    assert before == fingerprint()
    monkeypatch.setattr(python_docs, "FORMAT", python_docs.FORMAT + 1)
    assert fingerprint() != before


def test_an_interpreter_without_sources_is_named(monkeypatch, tmp_path):
    python_docs._entries.cache_clear()
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(ValueError, match="no source files"):
        entries()
