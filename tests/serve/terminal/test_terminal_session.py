"""Interactive sessions of the terminal chat at a pseudo terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.pseudo_terminal import PseudoTerminal
from helpers.terminal_chat import GREEDY, answer


@pytest.fixture
def terminal(folder: Path, tmp_path: Path) -> Iterator[Callable[..., PseudoTerminal]]:
    """Start the chat at a pseudo terminal and wait for its prompt."""
    started = []

    def start(*words: str, **environment: str) -> PseudoTerminal:
        started.append(PseudoTerminal("chat", "--model", str(folder), *words, state=tmp_path / "state", **environment))
        started[-1].expect(">")
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.mark.slow
def test_interactive_session(terminal, generator, tmp_path) -> None:
    chat = terminal("--temperature", "0", "--max_new_tokens", "4000", "--ignore_eos", "true")
    assert "/help" in chat.text and "context of 16384 tokens" in chat.text
    chat.type("ctrl-c")
    chat.expect("/quit or Ctrl-D exits")
    chat.expect(">")
    chat.type("Who", "alt-enter", "flies\\", "enter", "here?", "enter")
    chat.expect("here?")
    chat.more(0.4)  # the answer streams
    before = len(chat.raw)
    chat.more(0.4)
    assert len(chat.raw) > before
    chat.type("ctrl-c")
    chat.expect("stopped by Ctrl-C")
    chat.expect(">")
    chat.type("/set max_new_tokens 12", "enter", "Why?", "enter")
    chat.expect("tokens/s")
    chat.expect(">")
    chat.type(f"/save {tmp_path}/a.json", "enter")
    chat.expect("saved ")
    chat.expect(">")
    messages = json.loads((tmp_path / "a.json").read_text())["messages"]
    partial, second = messages[1]["content"], messages[3]["content"]
    assert messages[0]["content"] == "Who\nflies\nhere?" and len(partial) > 50
    assert second == answer(generator, "Who\nflies\nhere?", partial, "Why?")
    chat.type("ctrl-d")
    assert chat.end() == 0
    assert "Traceback" not in chat.text


@pytest.mark.slow
def test_input_history_persists(terminal, tmp_path) -> None:
    chat = terminal(*GREEDY)
    chat.type("/set seed 4711", "enter")
    chat.expect("seed 4711\n")
    chat.expect(">")
    chat.type("/quit", "enter")
    assert chat.end() == 0
    assert (tmp_path / "state" / "bumblebee" / "chat_history").stat().st_mode & 0o077 == 0
    chat = terminal(*GREEDY)
    chat.type("up", "up", "ctrl-c", "up", "up", "enter")
    chat.expect("seed 4711\n")
    chat.expect(">")
    chat.type("/qu", "tab", "enter")
    assert chat.end() == 0


@pytest.mark.slow
def test_no_color_disables_colours(terminal) -> None:
    for environment, dim in (({}, True), ({"NO_COLOR": "1"}, False)):
        chat = terminal(*GREEDY, **environment)
        chat.type("Why?", "enter")
        chat.expect("tokens/s")
        chat.expect(">")
        chat.type("ctrl-d")
        assert chat.end() == 0
        assert ("\x1b[2m" in chat.raw) == dim
