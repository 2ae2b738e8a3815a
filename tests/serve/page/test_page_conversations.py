"""Stored conversations, settings and the completion mode of the chat page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_browser import ChatPage, eventually, expect
from helpers.scripted_server import Reply, ScriptedServer

pytestmark = [pytest.mark.browser, pytest.mark.slow]


# -- conversations --------------------------------------------------------------------------------------------------------


def test_conversations_survive_a_reload(chat: ChatPage, script: ScriptedServer) -> None:
    chat.ask("Do you remember?")
    chat.answered("Fine, thank you.")
    chat.page.reload()
    expect(chat.questions).to_have_text("Do you remember?")
    expect(chat.answers).to_have_text("Fine, thank you.")
    expect(chat.items).to_have_count(1)


# As in Firefox: the requests of a page that is being left fail before `pagehide`.
ABORTS_EARLY = """
const [real, left] = [fetch, new AbortController()];
const both = (signal) => AbortSignal.any([left.signal, signal ?? left.signal]);
window.fetch = (url, options = {}) => real(url, { ...options, signal: both(options.signal) });
addEventListener("beforeunload", () => left.abort());
"""


@pytest.mark.parametrize(("leave", "init"), [("reload", ""), ("reload", ABORTS_EARLY), ("close", "")])
def test_leaving_during_an_answer_keeps_it_as_interrupted(
    open_page: Callable[..., ChatPage], script: ScriptedServer, leave: str, init: str
) -> None:
    chat = open_page(init=init)
    script.replies.append(Reply("one two three " + "more " * 500, pause=0.05))
    chat.ask("Long")
    expect(chat.answers).to_contain_text("three")
    if leave == "reload":
        chat.page.reload()
    else:
        url, context = chat.page.url, chat.page.context
        chat.page.close()
        chat = ChatPage(context.new_page())
        chat.page.goto(url)
        chat.items.first.click()
    expect(chat.answers).to_contain_text("one two three")
    expect(chat.end).to_contain_text("Interrupted")
    expect(chat.fault).to_have_count(0)
    expect(chat.button("Continue")).to_be_visible()
    [stored] = chat.check("stored")
    assert stored["messages"][-1].get("finish") == "interrupted"
    assert "error" not in stored["messages"][-1]


def test_reloading_before_the_first_token_offers_another_try(chat: ChatPage, script: ScriptedServer) -> None:
    script.replies.append(Reply("late", pause=30))
    chat.ask("Slow")
    eventually(lambda: len(script.bodies) == 1)
    chat.page.reload()
    expect(chat.end).to_contain_text("Interrupted")
    expect(chat.fault).to_have_count(0)
    chat.button("Try again").click()
    chat.answered("Fine")


def test_reloading_while_the_model_loads_shows_no_waiting(chat: ChatPage, script: ScriptedServer) -> None:
    script.ready = False
    chat.ask("Early")
    expect(chat.fault).to_contain_text("not ready")
    chat.page.reload()
    expect(chat.end).to_contain_text("Interrupted")
    expect(chat.fault).to_have_count(0)


def test_conversations_can_be_renamed_searched_and_deleted(chat: ChatPage, script: ScriptedServer) -> None:
    for index, text in enumerate(("About lists", "About tuples")):
        chat.ask(text)
        chat.answered("Fine")
        expect(chat.items).to_have_count(index + 1)
        chat.button("New conversation").click()
    chat.items.filter(has_text="About lists").hover()
    chat.button("Rename “About lists”").click()
    chat.page.get_by_label("Conversation name").first.fill("Sequences")
    chat.page.keyboard.press("Enter")
    expect(chat.items).to_have_count(2)
    chat.page.get_by_label("Search conversations").fill("sequ")
    expect(chat.items).to_have_text(["Sequences"])
    chat.page.get_by_label("Search conversations").fill("nothing like it")
    expect(chat.page.locator("#no-results")).to_have_text("No results.")
    chat.page.get_by_label("Search conversations").fill("")
    chat.items.filter(has_text="Sequences").hover()
    chat.button("Delete “Sequences”").click()
    expect(chat.items).to_have_text(["About tuples"])
    chat.button("Undo").click()
    expect(chat.items).to_have_count(2)


def test_exports_can_be_imported(chat: ChatPage, script: ScriptedServer, tmp_path: Path) -> None:
    chat.ask("Export me")
    chat.answered("Fine")
    saved = {kind: chat.export(f"Export as {kind}", tmp_path) for kind in ("Markdown", "JSON")}
    assert saved["Markdown"].name == "Export-me.md"
    assert saved["Markdown"].read_text() == "# Export me\n\n## You\n\nExport me\n\n## Bumblebee\n\nFine, thank you.\n"
    [stored] = json.loads(saved["JSON"].read_text())["conversations"]
    assert [message["role"] for message in stored["messages"]] == ["user", "assistant"]
    chat.page.keyboard.press("Control+,")
    chat.page.locator("#import-file").set_input_files(saved["JSON"])
    expect(chat.items).to_have_text(["Export me", "Export me"])


def test_import_keeps_system_messages(chat: ChatPage, script: ScriptedServer, tmp_path: Path) -> None:
    chat.setting(system="The page's own prompt.")
    messages = [
        {"role": "system", "content": "Answer like a pirate."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Ahoy"},
    ]
    chat.import_messages(messages)
    expect(chat.page.get_by_role("heading", level=1)).to_have_text("Hello")
    chat.page.get_by_text("System prompt").first.click()
    expect(chat.page.get_by_text("Answer like a pirate.")).to_be_visible()
    chat.ask("Again")
    chat.answered("Fine", 2)
    assert script.bodies[0]["messages"] == [*messages, {"role": "user", "content": "Again"}]
    [stored] = json.loads(chat.export("Export as JSON", tmp_path).read_text())["conversations"]
    assert [message["role"] for message in stored["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert "## System\n\nAnswer like a pirate." in chat.export("Export as Markdown", tmp_path).read_text()


def test_invalid_import_is_rejected(chat: ChatPage, script: ScriptedServer) -> None:
    chat.page.keyboard.press("Control+,")
    chat.page.locator("#import-file").set_input_files({"name": "x.json", "mimeType": "application/json", "buffer": b"{oops"})
    expect(chat.page.locator("#import-error")).to_have_text("This file is not JSON.")
    expect(chat.items).to_have_count(0)


def test_answer_continues_in_the_background(chat: ChatPage, script: ScriptedServer) -> None:
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


def test_full_storage_is_reported(chat: ChatPage, script: ScriptedServer) -> None:
    chat.check("fill")
    chat.ask("Is there room?")
    expect(chat.page.locator("#notes")).to_contain_text("storage is full")
    chat.answered("Fine")


# -- settings -------------------------------------------------------------------------------------------------------------


def test_only_changed_settings_are_sent(chat: ChatPage, script: ScriptedServer) -> None:
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


def test_server_defaults_are_placeholders(chat: ChatPage, script: ScriptedServer) -> None:
    chat.page.keyboard.press("Control+,")
    expect(chat.page.get_by_label("Temperature")).to_have_attribute("placeholder", "0.7")
    expect(chat.page.get_by_label("Top k")).to_have_attribute("placeholder", "server default")


def test_out_of_range_setting_is_an_error_at_its_field(chat: ChatPage, script: ScriptedServer) -> None:
    chat.setting(temperature="0.5")
    chat.setting(temperature="9")  # "Done" keeps the dialog open
    dialog, field = chat.page.locator("#settings"), chat.page.get_by_label("Temperature")
    expect(dialog).to_be_visible()
    expect(field).to_be_focused()
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(field).to_have_accessible_description("Must be between 0 and 2.")
    chat.page.keyboard.press("Escape")
    expect(chat.page.locator("#notes")).to_contain_text("Not saved: Temperature")
    chat.ask("Question")
    chat.answered("Fine")
    assert script.bodies[0]["temperature"] == 0.5
    chat.page.keyboard.press("Control+,")
    expect(field).to_have_value("0.5")
    expect(field).not_to_have_attribute("aria-invalid", "true")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_tokens", "0", "Must be at least 1."),
        ("top_k", "1.5", "Must be a whole number."),
        ("presence_penalty", "-3", "Must be between -2 and 2."),
    ],
)
def test_setting_errors_say_what_is_valid(chat: ChatPage, script: ScriptedServer, name: str, value: str, message: str) -> None:
    chat.setting(**{name: value})
    field = chat.page.locator(f"#settings [name={name}]")
    expect(field).to_have_accessible_description(message)
    field.fill("2")
    expect(field).not_to_have_attribute("aria-invalid", "true")
    chat.button("Done").click()
    expect(chat.page.locator("#settings")).to_be_hidden()
    chat.ask("Question")
    chat.answered("Fine")
    assert script.bodies[0][name] == 2


@pytest.mark.parametrize("system", ["light", "dark"])
def test_theme_follows_the_system_until_toggled(open_page: Callable[..., ChatPage], system: str) -> None:
    chat = open_page(color_scheme=system)
    root = chat.page.locator("html")
    expect(root).to_have_attribute("data-theme", system)
    chat.page.keyboard.press("Control+Shift+L")
    other = "light" if system == "dark" else "dark"
    expect(root).to_have_attribute("data-theme", other)
    chat.page.reload()
    expect(root).to_have_attribute("data-theme", other)


# -- completion mode ------------------------------------------------------------------------------------------------------


def test_completion_can_be_undone(chat: ChatPage, script: ScriptedServer) -> None:
    script.replies += [Reply(" upon a time", finish="length"), Reply(" there was")]
    chat.page.get_by_role("radio", name="Completion").check()
    text = chat.page.get_by_label("Text to continue")
    text.fill("Once")
    text.press("Control+Enter")
    expect(text).to_have_value("Once upon a time")
    expect(chat.page.locator("#text-end")).to_contain_text("token limit was reached")
    chat.button("Continue text").click()
    expect(text).to_have_value("Once upon a time there was")
    chat.button("Undo").click()
    expect(text).to_have_value("Once upon a time")
    assert script.paths == ["/v1/completions"] * 2
    assert [body["prompt"] for body in script.bodies] == ["Once", "Once upon a time"]
    chat.page.reload()
    expect(text).to_have_value("Once upon a time")


def test_switching_right_after_typing_keeps_the_text(chat: ChatPage, script: ScriptedServer) -> None:
    chat.page.get_by_role("radio", name="Completion").check()
    text = chat.page.get_by_label("Text to continue")
    text.fill("The first")
    chat.page.keyboard.press("Control+Shift+O")
    expect(chat.items).to_have_text(["The first"])
    expect(text).to_have_value("")
    text.fill("The second")
    chat.items.first.click()
    expect(text).to_have_value("The first")
    expect(chat.items).to_have_count(2)
