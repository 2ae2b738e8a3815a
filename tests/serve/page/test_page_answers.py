"""Streaming, rendering, stopping and editing answers in the chat page."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from helpers.chat_browser import ChatPage, eventually, expect
from helpers.scripted_server import CONTEXT, Reply, ScriptedServer

pytestmark = [pytest.mark.browser, pytest.mark.slow]


# -- examples -------------------------------------------------------------------------------------------------------------


def test_example_can_be_edited_before_sending(chat: ChatPage, script: ScriptedServer) -> None:
    examples = chat.page.locator("#examples button")
    expect(examples).to_have_count(3)
    text = examples.nth(1).inner_text()
    examples.nth(1).click()
    expect(chat.question).to_have_value(text)
    chat.question.press_sequentially(" Please.")
    chat.question.press("Enter")
    chat.answered("Fine, thank you.")
    assert script.bodies[0]["messages"][0]["content"] == f"{text} Please."
    expect(examples.first).to_be_hidden()


@pytest.mark.parametrize("offered", [[], ["What does `copy.copy` do?", "<b>Bold</b>"]])
def test_server_examples_replace_the_generic_ones(
    offered: list[str], open_page: Callable[..., ChatPage], script: ScriptedServer
) -> None:
    script.examples = offered
    expect(open_page().page.locator("#examples button")).to_have_text(offered)


# -- answers --------------------------------------------------------------------------------------------------------------


def test_answer_is_rendered_as_markdown_with_statistics(chat: ChatPage, script: ScriptedServer) -> None:
    script.replies.append(Reply("# Title\n\nSome **bold** text\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n- [x] done", pause=0.05))
    chat.ask("Show me")
    chat.answered("Some bold text")
    expect(chat.answers.locator("strong")).to_have_text("bold")
    expect(chat.answers.locator("td")).to_have_text(["1", "2"])
    expect(chat.answers.locator("h3")).to_have_text("Title")
    expect(chat.answers.locator("li")).to_contain_text("☑ done")
    expect(chat.page.locator(".figures")).to_have_text(
        re.compile(r"bumblebee · \d+ tokens · [\d.]+ tokens/s · first token after [\d.]+ s")
    )
    assert script.bodies[0]["messages"] == [{"role": "user", "content": "Show me"}]


def test_text_is_rendered_while_streaming(chat: ChatPage, script: ScriptedServer) -> None:
    script.replies.append(Reply("first **second** " + "word " * 200, pause=0.05))
    chat.ask("Slowly")
    expect(chat.answers.locator("strong")).to_have_text("second")
    expect(chat.page.locator("#stop")).to_be_visible()
    chat.page.keyboard.press("Escape")


STRUCTURED = """3. three
4. four

   1. inner

```
code
```

5. five

| left | middle | right |
|:-----|:------:|------:|
| a    | b      | c     |

<table>
<tr><th colspan="2" align="right" onclick="alert(1)" style="color: red">both</th></tr>
<tr><td rowspan=2>x</td><td>y</td></tr>
</table>

Write `<table>` or <table> for a table."""


def test_lists_keep_numbers_and_tables_their_layout(chat: ChatPage, script: ScriptedServer) -> None:
    script.replies.append(Reply(STRUCTURED))
    chat.ask("Structure")
    chat.answered("five")
    lists = chat.answers.locator(".block > ol")
    assert [each.get_attribute("start") for each in lists.all()] == ["3", "5"]
    cells = chat.answers.locator("table").first.locator("th, td")
    assert [cell.evaluate("e => getComputedStyle(e).textAlign") for cell in cells.all()] == ["left", "center", "right"] * 2
    both, x, _ = chat.answers.locator("table").nth(1).locator("th, td").all()
    assert both.evaluate("e => [e.colSpan, e.align, e.attributes.length]") == [2, "right", 2]
    assert x.evaluate("e => e.rowSpan") == 2
    expect(chat.answers).to_contain_text("Write <table> or <table> for a table.")


@pytest.mark.parametrize("count", [1, 12])
def test_wide_list_numbers_fit_on_a_phone(open_page: Callable[..., ChatPage], script: ScriptedServer, count: int) -> None:
    """Numbers stand to the left of the text, in the list's padding."""
    chat = open_page(viewport={"width": 390, "height": 844})
    script.replies.append(Reply("\n".join(f"{number}. item" for number in range(99_999, 99_999 + count))))
    chat.ask("Count")
    chat.answered("item")
    room, number = chat.answers.locator("ol").evaluate(
        """list => {
          const canvas = new OffscreenCanvas(1, 1).getContext("2d");
          canvas.font = getComputedStyle(list).font;
          return [parseFloat(getComputedStyle(list).paddingLeft), canvas.measureText("99999. ").width];
        }"""
    )
    assert room >= number


@pytest.mark.parametrize(
    ("text", "pause", "rated"), [("Two words", 0.0, False), ("word " * 400, 0.0, False), ("word " * 40, 0.02, True)]
)
def test_rate_needs_several_tokens_and_some_time(
    chat: ChatPage, script: ScriptedServer, text: str, pause: float, rated: bool
) -> None:
    script.replies.append(Reply(text, pause=pause))
    chat.ask("How fast?")
    chat.answered(text.split()[0])
    expect(chat.page.locator(".figures")).to_contain_text("tokens")
    assert ("tokens/s" in chat.page.locator(".figures").inner_text()) == rated


VARIED = """1. one

   ```py
   x = 1
   ```
2. two

[link][l] and *em*

> quote
> more

```
open

[l]: https://example.com/
```

[l]: https://example.org/"""


def test_streamed_text_renders_like_complete_text(chat: ChatPage, script: ScriptedServer) -> None:
    script.replies += [Reply(VARIED, pause=0.02), Reply(VARIED)]
    chat.ask("In pieces")
    chat.answered("quote")
    chat.ask("At once")
    chat.answered("quote", 2)
    pieces, whole = chat.answers.all()
    assert pieces.inner_html() == whole.inner_html()
    assert pieces.locator("a").get_attribute("href") == "https://example.org/"


def test_code_is_highlighted_and_copied(chat: ChatPage, script: ScriptedServer) -> None:
    chat.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    script.replies.append(Reply("```python\ndef f():\n    return '<b>'\n```"))
    chat.ask("Code")
    chat.answered("def f()")
    expect(chat.answers.locator(".hljs-keyword").first).to_have_text("def")
    chat.button("Copy code").click()
    assert chat.page.evaluate("navigator.clipboard.readText()") == "def f():\n    return '<b>'"


def test_copying_an_answer_keeps_its_markdown(chat: ChatPage, script: ScriptedServer) -> None:
    chat.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    script.replies.append(Reply("Some **bold** text"))
    chat.ask("Text")
    chat.answered("bold")
    chat.button("Copy answer").click()
    expect(chat.page.locator("#spoken")).to_contain_text("Copied")
    assert chat.page.evaluate("navigator.clipboard.readText()") == "Some **bold** text"


def test_copying_works_over_plain_http(open_page: Callable[..., ChatPage], script: ScriptedServer) -> None:
    """Without TLS on another machine, the browser provides no clipboard API."""
    chat = open_page(init="Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    chat.ask("Text")
    chat.answered("Fine, thank you.")
    chat.button("Copy answer").click()
    chat.question.press("Control+v")
    expect(chat.question).to_have_value("Fine, thank you.")


def test_stop_aborts_the_request_and_keeps_the_text(chat: ChatPage, script: ScriptedServer) -> None:
    script.replies.append(Reply("one two three " + "more " * 500, pause=0.05))
    chat.ask("Long")
    expect(chat.answers).to_contain_text("three")
    chat.button("Stop generating").click()
    expect(chat.end).to_contain_text("Stopped.")
    expect(chat.answers).to_contain_text("one two three")
    expect(chat.question).to_be_focused()
    eventually(lambda: script.left == 1)


def test_regenerating_can_be_undone(chat: ChatPage, script: ScriptedServer) -> None:
    script.replies += [Reply("The first"), Reply("The second")]
    chat.ask("Which?")
    chat.answered("The first")
    chat.button("Regenerate").click()
    chat.answered("The second")
    assert script.bodies[0]["messages"] == script.bodies[1]["messages"]
    chat.button("Undo").click()
    chat.answered("The first")


def test_edited_message_is_answered_again(chat: ChatPage, script: ScriptedServer) -> None:
    for word in ("one", "two"):
        chat.ask(f"Question {word}")
        chat.answered("Fine", len(script.bodies) or 1)
    script.replies.append(Reply("Changed."))
    chat.questions.first.hover()
    chat.button("Edit and resend").first.click()
    chat.page.get_by_label("Edit message").fill("Question three")
    chat.page.get_by_label("Edit message").press("Enter")
    chat.answered("Changed.")
    expect(chat.questions).to_have_text(["Question three"])
    assert [message["content"] for message in script.bodies[-1]["messages"]] == ["Question three"]


def test_editing_can_be_cancelled(chat: ChatPage, script: ScriptedServer) -> None:
    chat.ask("Question")
    chat.answered("Fine")
    chat.button("Edit and resend").focus()
    chat.page.keyboard.press("Enter")
    chat.page.get_by_label("Edit message").fill("Another")
    chat.page.keyboard.press("Escape")
    expect(chat.questions).to_have_text("Question")
    assert len(script.bodies) == 1


def test_truncated_answer_can_be_continued(chat: ChatPage, script: ScriptedServer) -> None:
    script.replies += [Reply("It begins", finish="length"), Reply("and ends.")]
    chat.ask("Tell me")
    expect(chat.end).to_contain_text("token limit was reached")
    chat.button("Continue").click()
    chat.answered("and ends.", 2)
    roles = [message["role"] for message in script.bodies[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    expect(chat.button("Continue")).to_have_count(0)


def test_thoughts_are_collapsed(chat: ChatPage, script: ScriptedServer) -> None:
    script.replies.append(Reply("<think>hm hm</think>\n\nForty-two."))
    chat.ask("Think")
    chat.answered("Forty-two.")
    expect(chat.page.get_by_text("hm hm")).to_be_hidden()
    chat.page.get_by_text("Thoughts").click()
    expect(chat.page.get_by_text("hm hm")).to_be_visible()


def test_meter_shows_tokens_of_the_context(chat: ChatPage, script: ScriptedServer) -> None:
    script.replies += [Reply("a b c", prompt_tokens=1000), Reply("a b c", prompt_tokens=CONTEXT - 100)]
    chat.ask("One")
    expect(chat.page.locator("#meter")).to_have_text(re.compile(r"1,003 of 4,096 tokens"))
    chat.ask("Two")
    expect(chat.page.locator("#meter")).to_have_class("nearly-full")


def test_view_scrolls_with_the_text_only_at_the_end(chat: ChatPage, script: ScriptedServer) -> None:
    script.replies.append(Reply("line\n\n" * 60 + "then " + "more\n\n word " * 60, pause=0.02))
    chat.ask("Long")
    eventually(lambda: chat.check("atEnd"))
    chat.page.locator("#scroller").evaluate("e => e.scrollTop = 0")
    expect(chat.page.locator("#jump")).to_be_visible()
    chat.page.wait_for_timeout(300)
    assert chat.page.locator("#scroller").evaluate("e => e.scrollTop") == 0
    chat.button("Latest").click()
    eventually(lambda: chat.check("atEnd"))


def test_view_follows_answers_in_a_long_mixed_conversation(chat: ChatPage, script: ScriptedServer) -> None:
    """Short and very long messages, as in practice: the view stays at the end, without a jump up."""
    code = "```python\n" + "value = compute(value)\n" * 40 + "```"
    answers = ["Yes.", "Some **text**.\n\n" * 40, code, "| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * 30, "- item\n" * 60]
    messages = [
        {"role": role, "content": text}
        for index in range(30)
        for role, text in (("user", "Question " * (1 + 40 * (index % 3))), ("assistant", answers[index % len(answers)]))
    ]
    chat.import_messages(messages)
    expect(chat.questions).to_have_count(30)
    eventually(lambda: chat.check("atEnd"))
    chat.check("observeScrolling")
    for count, text in enumerate(("Fine.\n\n" * 60, "Short.", "word " * 30 + "\n\n" + code), 31):
        script.replies.append(Reply(f"{text} end", pause=0.01))
        chat.ask("Next")
        chat.answered("end", count)
        eventually(lambda: chat.check("atEnd"))
    scrolling = chat.page.evaluate("window.scrolling")
    assert scrolling["up"] < 30 and scrolling["away"] < 400, scrolling


def test_streaming_leaves_finished_elements_unchanged(chat: ChatPage, script: ScriptedServer) -> None:
    """Elements of finished messages and blocks are not replaced."""
    chat.ask("One")
    chat.answered("Fine")
    script.replies.append(Reply("first\n\nsecond\n\nthird\n\n" + "word " * 60, pause=0.02))
    chat.ask("Two")
    expect(chat.answers.last).to_contain_text("word word")
    chat.check("mark")
    chat.answered("word", 2)
    assert chat.check("marked") == 3
