"""Untrusted model output in the chat page cannot run scripts or load resources."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers.chat_browser import ChatPage, expect
from helpers.page_attacks import ATTACKS
from helpers.scripted_server import Reply, ScriptedServer

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_model_output_cannot_run_or_load_anything(chat: ChatPage, script: ScriptedServer) -> None:
    script.replies.append(Reply(ATTACKS, pause=0.005))
    chat.ask("Attack <img src=x onerror=alert(0)>")
    chat.answered("ten")
    chat.page.wait_for_timeout(200)
    harm = chat.check("harm", "#thread")
    assert harm == []
    links = chat.check("links", "#thread")
    assert links == [["https://evil.example/spy.png?q=secret", "_blank", "noopener noreferrer nofollow"]]
    expect(chat.page.locator(".prose .fault")).to_have_count(0)


def test_sanitizer_alone_removes_attacks(open_page: Callable[..., ChatPage], script: ScriptedServer) -> None:
    """The attacks as HTML; as Markdown, tags with attributes are escaped before the sanitizer."""
    chat = open_page(allowed="violates")  # blocked by the policy while parsing
    chat.check("insertSanitized", ATTACKS)
    chat.page.wait_for_timeout(200)
    assert chat.check("harm", "#thread") == []
    links = chat.check("links", "#thread")
    assert links == [["https://example.org", "_blank", "noopener noreferrer nofollow"]]


def test_content_security_policy_is_enforced(open_page: Callable[..., ChatPage], script: ScriptedServer) -> None:
    """The second layer: nothing that bypasses the sanitizer can run."""
    chat = open_page(allowed="Content Security Policy|requires 'Trusted|^request to https://evil.example/x.png$")
    result = chat.check("attempts")
    assert result["ended"] == ["TypeError", "TypeError", "TypeError"]
    assert {"require-trusted-types-for", "connect-src", "img-src", "style-src-attr"} <= set(result["seen"])
    assert result["color"] != "rgb(255, 0, 0)"
