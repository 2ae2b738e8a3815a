"""The quickstart's text is clean, the same in every process, and read without importing the library."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import stdlib_docs

QUICKSTART = Path(stdlib_docs.__file__).parent


@pytest.fixture(scope="module")
def entries():
    return stdlib_docs.entries()


@pytest.fixture(scope="module")
def named(entries):
    return {entry.name: entry for entry in entries}


def run(code: str, **environment: str) -> str:
    """The output of a new interpreter."""
    variables = {**os.environ, **environment}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, cwd=QUICKSTART, env=variables, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_corpus_is_large_enough_to_train_on(entries):
    kinds = [entry.kind for entry in entries]
    assert set(kinds) == {"topic", "module", "class", "function"}
    assert kinds.count("topic") > 60
    assert 6000 < len(kinds) < 12000
    assert 1_500_000 < sum(len(entry.document.encode()) for entry in entries) < 5_000_000


@pytest.mark.slow
def test_content_is_the_same_in_every_process():
    code = """
import hashlib, json, stdlib_docs
whole = json.dumps([[vars(entry), entry.document] for entry in stdlib_docs.entries()])
print(hashlib.sha256(whole.encode()).hexdigest())
"""
    assert run(code, PYTHONHASHSEED="1") == run(code, PYTHONHASHSEED="2")


@pytest.mark.slow
def test_names_and_texts_are_unique(entries):
    texts = [" ".join(entry.text.split()) for entry in entries]
    assert len(set(texts)) == len(texts)
    assert len({entry.name for entry in entries}) == len(texts)
    assert len({entry.document for entry in entries}) == len(texts)


def test_every_text_is_informative_and_encodable(entries):
    for entry in entries:
        assert entry.text == entry.text.strip()
        assert len(entry.text) >= stdlib_docs.MIN_CHARACTERS
        assert not stdlib_docs.CONTROL_CHARACTERS.search(entry.text)
        entry.text.encode()


def test_no_signature_shows_an_address(entries):
    assert not [entry.signature for entry in entries if " at 0x" in entry.signature]


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
def test_well_known_objects_have_their_usual_names(named, name, kind, heading):
    assert named[name].kind == kind
    assert named[name].heading.startswith(heading)


def test_json_dumps_has_its_signature_and_docstring(named):
    entry = named["json.dumps"]
    assert entry.signature == (
        "dumps(obj, *, skipkeys=False, ensure_ascii=True, check_circular=True, allow_nan=True, cls=None, indent=None, "
        "separators=None, default=None, sort_keys=False, **kw)"
    )
    assert entry.text == (json.dumps.__doc__ or "").replace("\n    ", "\n").strip()
    assert entry.document == f"json.{entry.signature}\n\n{entry.text}"


@pytest.mark.parametrize(
    ("text", "signature", "rest"),
    [
        ("f(a[, b]) --> int\n\nReturn it.", "f(a[, b])", "Return it."),
        ("D.f(a, b=(1, 2)) -- insert a", "f(a, b=(1, 2))", "D.f(a, b=(1, 2)) -- insert a"),
        ("f(a) -> int\nf(a, b) -> int\n\nReturn it.", "", "f(a) -> int\nf(a, b) -> int\n\nReturn it."),
        ("Return f(a).", "", "Return f(a)."),
    ],
)
def test_call_in_the_first_line_is_the_signature(text, signature, rest):
    assert stdlib_docs._split_call("f", text) == (signature, rest)


def test_properties_have_no_parentheses(named):
    assert named["fractions.Fraction.limit_denominator"].signature == "limit_denominator(self, max_denominator=1000000)"
    assert named["threading.Thread.name"].signature == "name"


def test_topics_are_documents_of_their_own(entries, named):
    assert entries[0].document == entries[0].text
    assert named["topic:for"].text.startswith('The "for" statement\n***')


def test_tests_and_applications_are_left_out(entries):
    tops = {entry.name.partition(".")[0] for entry in entries}
    assert not tops & {"test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pip", "setuptools", "antigravity"}
    assert not [entry.name for entry in entries if ".test." in entry.name or ".tests." in entry.name]


def test_library_is_read_without_being_imported():
    code = """
import sys, stdlib_docs
stdlib_docs.entries()
print(*sys.modules)
"""
    loaded = set(run(code).split())
    assert "pydoc_data.topics" in loaded
    assert not loaded & {"antigravity", "asyncio", "ctypes", "distutils", "readline", "this", "tkinter", "turtle"}


@pytest.mark.slow
def test_replaced_hook_does_not_change_the_content(monkeypatch, named):
    monkeypatch.setattr(sys, "excepthook", lambda *_: None)
    assert {entry.name: entry for entry in stdlib_docs.entries()} == named


def test_python_without_library_sources_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(stdlib_docs.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(ValueError, match=f"{tmp_path}: this Python comes without the source files"):
        stdlib_docs.entries()
