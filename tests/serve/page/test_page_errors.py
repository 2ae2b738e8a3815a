"""Errors and reconnection in the chat page."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers.chat_browser import ChatPage, expect
from helpers.scripted_server import Reply, ScriptedServer

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_missing_key_is_requested(open_page: Callable[..., ChatPage], script: ScriptedServer) -> None:
    script.key = "secret"
    chat = open_page(keyed=True)
    expect(chat.page.locator("#banner")).to_contain_text("requires an API key")
    chat.ask("May I?")
    expect(chat.fault).to_contain_text("The server requires an API key")
    chat.fault.get_by_role("button", name="Enter API key").click()
    expect(chat.page.get_by_label("API key")).to_be_focused()
    chat.page.keyboard.type("secret")
    chat.page.keyboard.press("Enter")
    expect(chat.page.locator("#banner")).to_be_hidden()
    chat.button("Try again").click()
    chat.answered("Fine")


def test_retry_waits_for_retry_after(chat: ChatPage, script: ScriptedServer) -> None:
    script.replies.append(Reply(status=429, message="queue full", headers={"Retry-After": "4"}))
    chat.ask("Now?")
    expect(chat.fault).to_contain_text("The server is busy")
    expect(chat.fault.get_by_role("button")).to_be_disabled()
    expect(chat.fault.get_by_role("button")).to_have_text("Try again")
    chat.fault.get_by_role("button").click()
    chat.answered("Fine")


def test_page_waits_for_a_loading_server(open_page: Callable[..., ChatPage], script: ScriptedServer) -> None:
    script.ready = False
    chat = open_page()
    expect(chat.page.locator("#banner")).to_contain_text("The model is not ready")
    chat.ask("Are you there?")
    expect(chat.fault).to_contain_text("the message is sent as soon as")
    assert script.bodies == []
    script.ready = True
    chat.answered("Fine")
    expect(chat.page.locator("#banner")).to_be_hidden()
    expect(chat.fault).to_have_count(0)


def test_waiting_can_be_stopped(chat: ChatPage, script: ScriptedServer) -> None:
    script.ready = False
    chat.ask("Are you there?")
    expect(chat.fault).to_be_visible()
    chat.question.press("Escape")
    expect(chat.end).to_contain_text("Stopped.")


def test_page_reconnects_to_an_unreachable_server(chat: ChatPage, script: ScriptedServer) -> None:
    chat.page.context.set_offline(True)
    chat.ask("Hello?")
    expect(chat.fault).to_contain_text("Cannot reach the server")
    expect(chat.page.locator("#banner")).to_contain_text("Cannot reach the server")
    chat.page.context.set_offline(False)
    expect(chat.page.locator("#banner")).to_be_hidden()
    chat.button("Try again").click()
    chat.answered("Fine")


def test_lost_connection_keeps_the_text(chat: ChatPage, script: ScriptedServer) -> None:
    script.replies.append(Reply("one two three four", pause=0.05, drop=2))
    chat.ask("Count")
    expect(chat.fault).to_contain_text("The connection was lost")
    expect(chat.answers).to_have_text("one two")
    for name in ("Continue", "Try again"):
        expect(chat.fault.get_by_role("button", name=name)).to_be_visible()
    chat.fault.get_by_role("button", name="Try again").click()
    chat.answered("Fine")


def test_error_in_the_stream_is_shown(chat: ChatPage, script: ScriptedServer) -> None:
    script.replies.append(Reply("one two", fault="the worker has died"))
    chat.ask("Count")
    expect(chat.fault).to_contain_text("the worker has died")
    expect(chat.answers).to_have_text("one two")


def test_too_long_conversation_offers_a_new_one(chat: ChatPage, script: ScriptedServer) -> None:
    message = "the model reads 4096 tokens; these are 5000"
    script.replies.append(Reply(status=400, message=message, code="context_length_exceeded"))
    chat.ask("Long " * 10)
    expect(chat.fault).to_contain_text("too long for the model")
    expect(chat.fault).to_contain_text(message)
    chat.fault.get_by_role("button", name="New conversation").click()
    expect(chat.questions).to_have_count(0)


def test_markup_in_an_error_is_escaped(chat: ChatPage, script: ScriptedServer) -> None:
    script.replies.append(Reply(status=400, message="<img src=x onerror=alert(1)>"))
    chat.ask("Question")
    expect(chat.fault).to_contain_text("<img src=x")
    expect(chat.fault.locator("img")).to_have_count(0)
