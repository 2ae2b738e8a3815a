"""One browser and one scripted server for all tests of the chat page; each test opens the page in a fresh profile (context)."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers.chat_browser import ChatPage, expect, playwright
from helpers.scripted_server import ScriptedServer, running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
# The browser logs this for every error response; how the page handles it is what the tests check.
EXPECTED_ERROR = "Failed to load resource"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=[*ARGS, "--disable-sync"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def scripted() -> Iterator[ScriptedServer]:
    with running() as server:
        yield server


@pytest.fixture
def script(scripted: ScriptedServer) -> ScriptedServer:
    scripted.reset()
    return scripted


@pytest.fixture
def open_page(browser: Any, script: ScriptedServer) -> Iterator[Callable[..., ChatPage]]:
    """Opens the page in a new profile; `allowed` matches console errors that the test provokes.

    At the end of each test the page must not have sent a request to another server, logged an error to the console, or opened
    a browser dialog.
    """
    contexts, problems = [], []

    def opened(allowed: str = r"$.", url: str = "", keyed: bool = False, init: str = "", **options: Any) -> ChatPage:
        url = url or script.url
        context = browser.new_context(**{"viewport": {"width": 1100, "height": 760}, **options})
        context.set_default_timeout(10_000)
        contexts.append(context)
        context.add_init_script(init)
        page = context.new_page()

        def note(text: str) -> None:
            if not re.search(f"{EXPECTED_ERROR}|{allowed}", text):
                problems.append(text)

        page.on("request", lambda request: request.url.startswith((url, "blob:")) or note(f"request to {request.url}"))
        page.on("pageerror", lambda error: note(f"error {error}"))
        page.on("dialog", lambda dialog: (note(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("console", lambda line: line.type != "error" or note(line.text))
        page.goto(url)
        expect(page.locator("#model")).to_have_text("" if keyed else "bumblebee")
        return ChatPage(page)

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def chat(open_page: Callable[..., ChatPage]) -> ChatPage:
    return open_page()
