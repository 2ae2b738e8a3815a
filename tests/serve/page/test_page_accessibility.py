"""Keyboard, focus, contrast, phones, screen readers and speed of the chat page."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from helpers.chat_browser import ChatPage, expect
from helpers.scripted_server import Reply, ScriptedServer

pytestmark = [pytest.mark.browser, pytest.mark.slow]


PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


def test_page_works_by_keyboard_alone(chat: ChatPage, script: ScriptedServer) -> None:
    keys = chat.page.keyboard
    expect(chat.question).to_be_focused()
    keys.type("first")
    keys.press("Shift+Enter")
    keys.type("second")
    keys.press("Enter")
    chat.answered("Fine")
    assert script.bodies[0]["messages"][0]["content"] == "first\nsecond"
    keys.press("Control+/")
    expect(chat.page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_visible()
    keys.press("Escape")
    expect(chat.question).to_be_focused()
    keys.press("Control+Shift+O")
    expect(chat.questions).to_have_count(0)
    keys.press("Control+k")
    keys.type("first")
    keys.press("Tab")
    expect(chat.items.locator(".open")).to_be_focused()
    keys.press("F2")
    keys.type("Named by keyboard")
    keys.press("Enter")
    chat.page.get_by_label("Search conversations").fill("")
    expect(chat.items).to_have_text(["Named by keyboard"])
    chat.items.locator(".open").press("Enter")
    expect(chat.page.get_by_role("heading", level=1)).to_have_text("Named by keyboard")
    expect(chat.question).to_be_focused()
    chat.items.locator(".open").press("Delete")
    expect(chat.items).to_have_count(0)


def test_focus_is_always_visible(chat: ChatPage, script: ScriptedServer) -> None:
    chat.ask("Question")
    chat.answered("Fine")
    chat.page.locator(".skip").focus()
    unseen, seen = [], set()
    for _ in range(40):
        chat.page.keyboard.press("Tab")
        name, visible = chat.check("focused")
        seen.add(name)
        unseen += [] if visible else [name]
    assert unseen == []
    assert {"question", "send", "search", "open-settings", "menu", "more", "Copy answer", "Regenerate"} <= seen


@pytest.mark.parametrize("where", ["conversation", "settings", "shortcuts"])
def test_controls_have_names_and_ids_are_unique(chat: ChatPage, where: str) -> None:
    chat.ask("Question")
    chat.answered("Fine")
    if where != "conversation":
        chat.page.keyboard.press({"settings": "Control+,", "shortcuts": "Control+/"}[where])
    assert chat.check("nameless") == []
    ids = chat.check("ids")
    assert len(ids) == len(set(ids))
    assert set(chat.check("referred")) <= set(ids)
    for landmark in ("main", "h1", "aside[aria-label]", "nav[aria-label]"):
        expect(chat.page.locator(landmark)).to_have_count(1)


COLOURS = """Text [link](https://example.org) `code`

> quote

| a |
|---|
| b |

```python
@wrap
class A(int):
    'text'
    def f(self, x: int = 1.5) -> None:  # note
        return print(None)
```

```diff
- a
+ b
```
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_contrast_meets_wcag(open_page: Callable[..., ChatPage], script: ScriptedServer, theme: str) -> None:
    """WCAG 2.2, 1.4.3: a contrast of at least 4.5 : 1, measured on the rendered colours."""
    chat = open_page(color_scheme=theme, reduced_motion="reduce")
    script.replies += [Reply(COLOURS), Reply(status=500, message="oops")]
    chat.ask("Colours")
    chat.answered("quote")
    chat.ask("An error")
    expect(chat.fault).to_be_visible()
    assert chat.check("faint") == []
    chat.page.keyboard.press("Control+,")
    assert chat.check("faint") == []


def test_sidebar_is_a_drawer_on_a_phone(open_page: Callable[..., ChatPage], script: ScriptedServer) -> None:
    chat = open_page(**PHONE)
    script.replies.append(
        Reply(
            "| a | b | c | d | e | f |\n|-|-|-|-|-|-|\n| 1 | 2 | 3 | 4 | 5 | 6 |\n\n```\n" + "x" * 300 + "\n```\n\n" + "y" * 300
        )
    )
    chat.ask("On a phone")
    chat.answered("1")
    assert chat.page.evaluate("document.documentElement.scrollWidth") == 390
    expect(chat.items).to_be_hidden()
    chat.button("Conversations").tap()
    expect(chat.items).to_be_visible()
    assert chat.check("small") == []
    assert chat.check("smallestField") >= 16  # phones zoom in on focused fields with smaller text
    chat.items.locator(".open").tap()
    expect(chat.items).to_be_hidden()
    chat.button("Conversations").tap()
    expect(chat.items).to_be_visible()
    chat.page.keyboard.press("Escape")
    expect(chat.items).to_be_hidden()
    expect(chat.button("Conversations")).to_be_focused()


@pytest.mark.parametrize("size", [(320, 568), (844, 390)])
def test_new_conversation_fits_small_screens(
    open_page: Callable[..., ChatPage], script: ScriptedServer, size: tuple[int, int]
) -> None:
    script.ready = False  # with a banner
    chat = open_page(viewport={"width": size[0], "height": size[1]}, has_touch=True)
    expect(chat.page.locator("#banner")).to_be_visible()
    expect(chat.page.locator("#examples button").first).to_be_in_viewport(ratio=1)
    for each in (chat.page.locator(".greeting"), chat.question, chat.page.locator("#examples")):
        expect(each).to_be_in_viewport(ratio=1)


def test_screen_readers_get_whole_blocks(chat: ChatPage, script: ScriptedServer) -> None:
    script.replies.append(Reply("The first paragraph.\n\nThe second one.\n\nThe third.", pause=0.03))
    chat.check("hear")
    chat.ask("Speak")
    chat.answered("The third.")
    assert chat.page.evaluate("window.heard") == ["The first paragraph.", "The second one.", "The third."]


def test_reduced_motion_is_respected(open_page: Callable[..., ChatPage], script: ScriptedServer) -> None:
    chat = open_page(reduced_motion="reduce")
    assert chat.check("moving") == 0


def test_long_conversation_stays_responsive(chat: ChatPage, script: ScriptedServer) -> None:
    """With 200 messages, no frame of the next answer takes half a second."""
    script.replies.append(Reply("One **word** after another.\n\n" * 30 + "end", pause=0.002))
    chat.ask("Short conversation")
    chat.answered("end")
    messages = [{"role": role, "content": "Some **text**.\n\n" * 10} for _ in range(100) for role in ("user", "assistant")]
    file = {"name": "x.json", "mimeType": "application/json", "buffer": json.dumps({"messages": messages}).encode()}
    chat.page.locator("#import-file").set_input_files(file)
    expect(chat.questions).to_have_count(100)
    chat.check("watch")
    script.replies.append(Reply("One **word** after another.\n\n" * 30 + "end", pause=0.002))
    chat.ask("Long conversation")
    chat.answered("end", 101)
    assert chat.page.evaluate("window.longest") < 500
