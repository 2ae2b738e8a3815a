"""The chat page's files: headers, caching, content security policy, checksums and JavaScript modules."""

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

TESTS = Path(__file__).parent / "page"
VENDOR = chat_page.FOLDER / "vendor"


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(Starlette(routes=chat_page.routes()))


@pytest.mark.parametrize("path", [route.path for route in chat_page.routes()])
def test_every_file_has_content_type_and_policy(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"] == chat_page.CONTENT_TYPES[Path(path).suffix or ".html"]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy


def test_etag_avoids_sending_a_file_again(client: TestClient) -> None:
    first = client.get("/")
    again = client.get("/", headers={"If-None-Match": f'W/"other", {first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path", ["vendor/README.md", "vendor/fetch.sh", "vendor/SHA256SUMS", "../chat_page.py", "..%2fchat_page.py", "vendor"]
)
def test_other_files_are_not_served(client: TestClient, path: str) -> None:
    assert client.get(f"/page/{path}").status_code == 404


def test_page_has_no_inline_code_and_no_remote_resources() -> None:
    html = (chat_page.FOLDER / "index.html").read_text()
    assert re.findall(r"<style|\sstyle=|\son\w+=", html) == []
    assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", html))
    own = [path.read_text() for path in chat_page.FOLDER.glob("*.*") if path.suffix in (".js", ".css", ".html")]
    assert [found for text in own for found in re.findall(r"(?:src|href|import|from|url\()\W{0,3}https?://", text)] == []


def test_vendored_files_match_their_checksums() -> None:
    lines = [line.split() for line in (VENDOR / "SHA256SUMS").read_text().splitlines()]
    assert {name: sha256((VENDOR / name).read_bytes()).hexdigest() for _, name in lines} == {name: sum for sum, name in lines}
    libraries = {path.name for path in VENDOR.glob("*.js")}
    assert libraries == {Path(name).name for _, name in lines if name.endswith(".js")}
    assert all((VENDOR / name).with_suffix(".LICENSE.txt").exists() for name in libraries)


def test_javascript_modules(tmp_path: Path) -> None:
    """Check the syntax of all modules, and run ``page/page_modules.mjs`` on those that need no browser."""
    if not shutil.which("node"):
        pytest.skip("needs node: apt-get install nodejs")
    shutil.copytree(chat_page.FOLDER, tmp_path / "page")
    (tmp_path / "package.json").write_text('{"type": "module"}')
    shutil.copy(TESTS / "page_modules.mjs", tmp_path / "page_modules.test.js")
    command = ["node", "--experimental-vm-modules", "--test", "page_modules.test.js"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
