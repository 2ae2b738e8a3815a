"""Saved conversations, settings and completion of the terminal chat."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.terminal.commands import COMMANDS, FILE_COMMANDS, with_setting
from serve.terminal.conversation import Conversation
from serve.terminal.line_editor import CommandCompleter, Document


def test_saved_conversation_can_be_loaded_and_trained_on(tmp_path: Path) -> None:
    from datamodules import record_files

    conversation = Conversation("Be brief.")
    conversation.turns = [("Who?", "Bees.\n"), ("Why?", "花")]
    file = conversation.save(str(tmp_path / "a.json"))
    conversation.save(str(file))  # its own file may be overwritten
    loaded = Conversation()
    loaded.load(str(file))
    assert (loaded.system, loaded.turns) == (conversation.system, conversation.turns)
    assert [record.value["messages"][-1]["content"] for record in record_files.read(str(file))] == ["花"]
    assert conversation.save(str(tmp_path / "a.md")).read_text() == (
        "## system\n\nBe brief.\n\n## user\n\nWho?\n\n## assistant\n\nBees.\n\n## user\n\nWhy?\n\n## assistant\n\n花\n"
    )


def test_text_parts_of_a_loaded_file_are_joined(tmp_path: Path) -> None:
    parts = '[{"type": "text", "text": "W"}, {"type": "text", "text": "ho?"}]'
    file = tmp_path / "a.json"
    file.write_text(f'[{{"role": "user", "content": {parts}}}, {{"role": "assistant", "content": "Bees."}}]')
    (conversation := Conversation()).load(str(file))
    assert conversation.turns == [("Who?", "Bees.")]


INVALID = ["[", "3", '{"messages": [1]}', '[{"role": "user", "content": "a"}]', '[{"role": "user"}]']
IMAGE = '[{"role": "user", "content": [{"type": "image_url"}]}, {"role": "assistant", "content": "a"}]'


def test_markdown_file_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a.md: Markdown cannot be loaded; save .* to a .json file"):
        Conversation().load(str(tmp_path / "a.md"))


@pytest.mark.parametrize("text", [*INVALID, IMAGE])
def test_invalid_file_leaves_the_conversation_unchanged(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    conversation = Conversation("Be brief.")
    with pytest.raises(ValueError, match="is not a saved conversation"):
        conversation.load(str(tmp_path / "a.json"))
    assert conversation.system == "Be brief."


def test_settings_are_json_and_null_removes_one() -> None:
    assert with_setting({}, "temperature", "0.3") == {"temperature": 0.3}
    assert with_setting({"seed": 1}, "seed", "null") == {}


def test_tab_completes_commands_settings_and_files(tmp_path: Path) -> None:
    completer = CommandCompleter({name: command.words for name, command in COMMANDS.items()}, FILE_COMMANDS)

    def completed(text: str) -> list[str]:
        return [text[: len(text) + one.start_position] + one.text for one in completer.get_completions(Document(text), None)]

    assert completed("/re") == ["/reset", "/retry"]
    assert completed("/set temp") == ["/set temperature"]
    assert completed("a question") == completed("") == []
    (tmp_path / "talk.json").touch()
    assert completed(f"/load {tmp_path}/ta") == [f"/load {tmp_path}/talk.json"]
