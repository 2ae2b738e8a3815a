"""The chat page with the real server."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from helpers.chat_browser import ChatPage, expect
from helpers.echo_model import write_echo_model
from helpers.page_attacks import ATTACKS
from helpers.server_process import Running, serving

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def echoing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with an API key whose model answers everything with ATTACKS."""
    with serving(write_echo_model(tmp_path_factory.mktemp("echo"), ATTACKS), "--api_key", "secret") as running_server:
        yield running_server


def test_real_model_output_is_sanitized(open_page: Callable[..., ChatPage], echoing: Running) -> None:
    chat = open_page(url=echoing.url, keyed=True)
    chat.page.locator("#banner").get_by_role("button", name="Enter API key").click()
    chat.page.keyboard.type("secret")
    chat.page.keyboard.press("Enter")
    expect(chat.page.locator("#model")).to_have_text("bumblebee")
    chat.setting(temperature="0")
    chat.ask("Attack")
    chat.answered("ten", seconds=30)
    assert chat.check("harm", "#thread") == []
    expect(chat.page.locator("#meter")).to_have_text(re.compile(r"[\d,]+ of 4,096 tokens"))
    expect(chat.page.locator(".figures")).to_have_text(re.compile(r"tokens/s · first token after"))


def test_stopping_cancels_at_the_real_server(open_page: Callable[..., ChatPage], server: Running) -> None:
    chat = open_page(url=server.url)
    chat.ask("Write and write")
    server.wait_for_metric("bumblebee_running", 1)
    chat.question.press("Escape")
    server.wait_for_metric("bumblebee_running", 0)
    expect(chat.end).to_contain_text("Stopped.")


def test_real_context_length_error_is_shown(open_page: Callable[..., ChatPage], server: Running) -> None:
    chat = open_page(url=server.url)
    chat.ask("Too long. " * 1000)
    expect(chat.fault).to_contain_text("This model's maximum context length is 2048 tokens")


def test_real_server_accepts_all_settings(open_page: Callable[..., ChatPage], server: Running) -> None:
    chat = open_page(url=server.url)
    chat.setting(
        temperature="0.5", top_p="0.9", top_k="5", min_p="0.01", max_tokens="8", seed="3",
        repetition_penalty="1.2", presence_penalty="0.1", frequency_penalty="0.1", system="Be short.",
    )  # fmt: skip
    chat.ask("Hello")
    expect(chat.page.locator(".figures")).to_contain_text("tokens")
    expect(chat.fault).to_have_count(0)
    chat.page.get_by_role("radio", name="Completion").check()
    chat.page.get_by_label("Text to continue").fill("Once")
    chat.button("Continue text").click()
    expect(chat.page.locator("#text-end .figures")).to_contain_text("tokens")
    expect(chat.fault).to_have_count(0)
