"""The chat page as files: how they are served, and that nothing in them needs more than the policy allows."""

from __future__ import annotations

import re
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from serve import chat_page

TESTS = Path(__file__).parent
VENDOR = chat_page.FOLDER / "vendor"


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(Starlette(routes=chat_page.routes()))


@pytest.mark.parametrize("path", [route.path for route in chat_page.routes()])
def test_every_file_has_its_type_and_the_policy(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == chat_page.CONTENT_TYPES[Path(path).suffix or ".html"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy


def test_a_browser_that_has_a_file_is_not_sent_it_again(client: TestClient) -> None:
    first = client.get("/")
    again = client.get("/", headers={"If-None-Match": f'W/"other", {first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path", ["vendor/README.md", "vendor/fetch.sh", "vendor/SHA256SUMS", "../page.py", "..%2fpage.py", "vendor"]
)
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    assert client.get(f"/page/{path}").status_code == 404


def test_the_page_has_no_inline_code_and_loads_nothing_from_elsewhere() -> None:
    html = (chat_page.FOLDER / "index.html").read_text()
    assert re.findall(r"<style|\sstyle=|\son\w+=", html) == []
    assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", html))
    own = [path.read_text() for path in chat_page.FOLDER.glob("*.*") if path.suffix in (".js", ".css", ".html")]
    assert [found for text in own for found in re.findall(r"(?:src|href|import|from|url\()\W{0,3}https?://", text)] == []


def test_vendored_files_are_those_of_their_checksums() -> None:
    lines = [line.split() for line in (VENDOR / "SHA256SUMS").read_text().splitlines()]
    assert {name: sha256((VENDOR / name).read_bytes()).hexdigest() for _, name in lines} == {name: sum for sum, name in lines}
    libraries = {path.name for path in VENDOR.glob("*.js")}
    assert libraries == {Path(name).name for _, name in lines if name.endswith(".js")}
    assert all((VENDOR / name).with_suffix(".LICENSE.txt").exists() for name in libraries)


def test_modules_keep_their_promises(tmp_path: Path) -> None:
    """Syntax of all modules, and ``page_modules.mjs`` on those that need no browser."""
    if not shutil.which("node"):
        pytest.skip("needs node: apt-get install nodejs")
    shutil.copytree(chat_page.FOLDER, tmp_path / "page")
    (tmp_path / "package.json").write_text('{"type": "module"}')
    shutil.copy(TESTS / "page_modules.mjs", tmp_path / "page_modules.test.js")
    for path in sorted((tmp_path / "page").glob("*.js")):
        checked = subprocess.run(["node", "--check", path], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
    done = subprocess.run(["node", "--test", "page_modules.test.js"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
