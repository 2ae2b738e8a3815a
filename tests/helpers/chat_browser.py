"""The chat page in a real browser, as the tests see it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
expect = playwright.expect

CHECKS = (Path(__file__).parents[1] / "serve" / "page" / "page_checks.js").read_text().partition("\n\n")[2].strip()


class ChatPage:
    """The chat page in a browser: its elements and actions."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.question = page.get_by_label("Your message")
        self.answers = page.locator(".of-model .prose")
        self.questions = page.locator(".question")
        self.items = page.locator("#conversations .item")
        self.fault = page.locator(".fault")
        self.end = page.locator(".of-model .ends").last

    def ask(self, text: str) -> None:
        self.question.fill(text)
        self.question.press("Enter")

    def answered(self, text: str, count: int = 1, seconds: float = 5.0) -> None:
        """Wait until there are ``count`` answers, the last one contains the text, and none is running."""
        expect(self.answers).to_have_count(count)
        expect(self.answers.last).to_contain_text(text, timeout=1000 * seconds)
        expect(self.page.locator("#stop")).to_be_hidden(timeout=1000 * seconds)

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True)

    def check(self, name: str, argument: Any = None) -> Any:
        """Call a function of page_checks.js in the page."""
        return self.page.evaluate(f"(argument) => {CHECKS}.{name}(argument)", argument)

    def setting(self, **values: str) -> None:
        self.page.keyboard.press("Control+,")
        for name, value in values.items():
            field = self.page.locator(f"#settings [name={name}]")
            field.fill(value)
            field.blur()
        self.button("Done").click()

    def import_messages(self, messages: list[dict[str, str]]) -> None:
        """Import one conversation through the settings dialog."""
        buffer = json.dumps({"messages": messages}).encode()
        file = {"name": "conversation.json", "mimeType": "application/json", "buffer": buffer}
        self.page.locator("#import-file").set_input_files(file)

    def export(self, label: str, folder: Path) -> Path:
        self.button("Conversation menu: rename, export, delete").click()
        with self.page.expect_download() as download:
            self.button(label).click()
        path = folder / download.value.suggested_filename
        download.value.save_as(path)
        return path


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for something that happens in another thread."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.02)
