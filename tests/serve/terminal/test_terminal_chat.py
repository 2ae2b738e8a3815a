"""The terminal chat with a model folder, through pipes."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from helpers.processes import start_command
from helpers.terminal_chat import GREEDY, PARAMS, InterruptedScreen, Typing, answer

from bumblebee import Generator
from serve.terminal.backends import Delta, LocalBackend
from serve.terminal.chat import Chat
from serve.terminal.console import raise_interrupt
from serve.terminal.conversation import Conversation


def test_pipe_receives_only_answers(folder, generator, talk) -> None:
    first = answer(generator, "Who flies?")
    second = answer(generator, "Who flies?", first, "Why?")
    assert first != second
    out, err, code = talk("--model", folder, *GREEDY, inputs="Who flies?\nWhy?\n")
    assert (out, err, code) == (f"{first}\n{second}\n", "", 0)


def test_disabled_history_sends_questions_alone(folder, generator, talk) -> None:
    out, _, _ = talk("--model", folder, *GREEDY, "--enable_history", "false", inputs="Who flies?\nWhy?")
    assert out == f"{answer(generator, 'Who flies?')}\n{answer(generator, 'Why?')}\n"


def test_backslash_continues_a_line(folder, generator, talk) -> None:
    out, _, _ = talk("--model", folder, *GREEDY, inputs="Who\\\nflies?\n\n")
    assert out == answer(generator, "Who\nflies?") + "\n"


def test_system_prompt_can_be_changed(folder, generator, talk) -> None:
    words = ("--model", folder, *GREEDY, "--system_prompt", "Be brief.")
    out, err, _ = talk(*words, inputs='Why?\n/reset\n/system Be kind.\nWhy?\n/reset\n/system ""\nWhy?')
    assert out.count("\n") >= 3
    assert out == "".join(answer(generator, "Why?", system=system) + "\n" for system in ("Be brief.", "Be kind.", None))
    assert "system prompt: Be kind.\n" in err and "no system prompt\n" in err


def test_retry_replaces_the_last_turn(folder, generator, talk, tmp_path) -> None:
    out, _, _ = talk("--model", folder, *GREEDY, inputs=f"Why?\n/retry\n/save {tmp_path}/a.json")
    again = answer(generator, "Why?")
    assert out == f"{again}\n{again}\n"
    assert [one["content"] for one in json.loads((tmp_path / "a.json").read_text())["messages"]] == ["Why?", again]


def test_set_changes_the_next_answer(folder, generator, talk) -> None:
    out, err, _ = talk("--model", folder, *GREEDY, inputs="Why?\n/reset\n/set max_new_tokens 1\nWhy?\n/set temperature\n")
    whole = answer(generator, "Why?")
    short = out.removeprefix(f"{whole}\n").removesuffix("\n")
    assert whole.startswith(short) and 0 < len(short) < len(whole)
    assert err == "started a new conversation\nmax_new_tokens 1\ntemperature 0.0\n"


ERRORS = {
    "/sistem Be kind.": "unknown command /sistem (did you mean '/system'?) (to send it as a question, start with a space)",
    "/xyz": "unknown command /xyz; /help lists the commands (to send it as a question, start with a space)",
    "/set temprature 1": "/set: unknown setting 'temprature' (did you mean 'temperature'?)",
    "/set temperature -1": "temperature must be 0 or more, got -1",
    "/save": "/save: expected a file name that ends in .json or .md",
    "/save chat.txt": "chat.txt: expected a file name that ends in .json or .md",
    "/save there.json": "there.json already exists; choose another name",
    "/save nowhere/a.json": "folder not found: nowhere",
    "/load nowhere.json": "file not found: nowhere.json",
    "/load there.json": 'there.json is not a saved conversation: expected {"messages": [...]}',
    "/retry": "/retry: there is no question to send again",
}


def test_errors_are_one_line_and_the_chat_continues(folder, generator, talk, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.json").write_text("{}")
    out, err, code = talk("--model", folder, *GREEDY, inputs="\n".join([*ERRORS, "Why?"]))
    assert err.splitlines() == [f"bumblebee: {line}" for line in ERRORS.values()]
    assert out == answer(generator, "Why?") + "\n" and code == 1


def test_full_context_reports_tokens_and_reset_helps(folder, generator, talk) -> None:
    inputs = f"{'honey ' * 20000}\nWhy?\n/reset\nWhy?"
    out, err, code = talk("--model", folder, *GREEDY, inputs=inputs)
    expected = r"bumblebee: the conversation has \d+ tokens .*context of 16384 tokens; /reset .*\nstarted a new conversation\n"
    assert re.fullmatch(expected, err)
    assert (out, code) == (2 * (answer(generator, "Why?") + "\n"), 1)


def test_no_chat_template_continues_plain_text(folder, generator, talk, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "base")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
    plain = [generator.generate([text], PARAMS)[0].text for text in ("The bees", "fly")]
    out, err, _ = talk("--model", tmp_path / "base", *GREEDY, inputs="The bees\nfly")
    assert out == "".join(text + "\n" for text in plain)
    assert err.count("\n") == 1 and "no chat template" in err
    assert talk("--model", folder, *GREEDY, "--raw", "true", inputs="The bees\nfly")[:2] == (out, "")
    ids = generator.tokenizer.prompt_ids(spelled := "fly<|im_end|>", parse_special=True)  # as at /v1/completions
    expected = generator.generate([ids], PARAMS)[0].text
    assert talk("--model", folder, *GREEDY, "--raw", "true", inputs=spelled)[0] == expected + "\n"


def test_flags_override_the_recipe(folder, generator, talk, tmp_path) -> None:
    recipe = tmp_path / "chat.yaml"
    recipe.write_text("system_prompt: Be brief.\ntemperature: 0.0\nmax_new_tokens: 3\n")
    out, _, _ = talk("--model", folder, "--config", recipe, "--max_new_tokens", "12", inputs="Why?")
    assert out == answer(generator, "Why?", system="Be brief.") + "\n"


INVALID = {
    "": "expected --model FOLDER or --url http://127.0.0.1:8000",
    "--model a --url http://b": "expected --model FOLDER or --url http://127.0.0.1:8000, not both",
    "--url localhost:8000": "url: expected http://HOST:PORT, got localhost:8000",
    "--model a --temperature -1": "temperature must be 0 or more, got -1.0",
    "--model a --temprature 1": "unknown option 'temprature' (did you mean 'temperature'?)",
}


@pytest.mark.parametrize("words", INVALID)
def test_invalid_options_are_one_line(words: str, talk) -> None:
    assert talk(*words.split(), inputs="")[1:] == (f"bumblebee: {INVALID[words]}\n", 2)


def test_stopped_answer_frees_blocks_and_stays_cached(generator: Generator) -> None:
    model = LocalBackend(generator, "here")
    screen = InterruptedScreen(at=6)
    chat = Chat(model, Conversation(), {"max_new_tokens": 1000, "ignore_eos": True}, Typing(), screen)
    assert chat.ask("honey " * 100)
    assert screen.notes[-1].startswith("6 tokens") and screen.notes[-1].endswith("stopped by Ctrl-C")
    assert chat.conversation.turns == [("honey " * 100, "".join(screen.writes).rstrip("\n"))]
    messages = [{"role": "user", "content": "honey " * 100}]
    stats = model.engine.stats()
    assert not model.engine.busy
    assert stats.blocks_free + stats.blocks_cached == stats.blocks_total
    for _ in model.stream(messages, {"max_new_tokens": 1}):
        pass
    stats = model.engine.stats()
    assert stats.cached_tokens > 300 and stats.blocks_free + stats.blocks_cached == stats.blocks_total


def test_swallowed_interrupt_stops_after_the_delta() -> None:
    """Like an interrupt inside a destructor, which Python reports and ignores."""
    yielded: list[int] = []

    class Swallowing:
        raw = False

        def stream(self, messages, sampling):
            for number in range(100):
                with raise_interrupt(), contextlib.suppress(KeyboardInterrupt):
                    if number == 3:
                        signal.raise_signal(signal.SIGINT)
                yielded.append(number)
                yield Delta(f"{number} ", number)

    before, screen = signal.getsignal(signal.SIGINT), InterruptedScreen(at=-1)
    chat = Chat(Swallowing(), Conversation(), {}, Typing(), screen)
    assert chat.ask("Who flies?") and yielded == [0, 1, 2, 3]
    assert chat.conversation.turns == [("Who flies?", "0 1 2 3 ")] and "stopped by Ctrl-C" in screen.notes[-1]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_closed_stdout_ends_the_chat_silently(folder: Path) -> None:
    chat = start_command("chat", "--model", str(folder), *GREEDY, stdin=subprocess.PIPE)
    chat.stdin.write("Who flies?\n" * 50)
    chat.stdin.flush()
    assert chat.stdout.readline()
    chat.stdout.close()
    assert chat.wait(60) == 1
    assert chat.stderr.read() == ""


@pytest.mark.slow
def test_ctrl_c_ends_a_piped_chat(folder: Path) -> None:
    chat = start_command("chat", "--model", str(folder), *GREEDY, stdin=subprocess.PIPE)
    chat.stdin.write("Who flies?\n")
    chat.stdin.flush()
    assert chat.stdout.readline()
    chat.send_signal(signal.SIGINT)
    assert chat.wait(60) == 130
    assert "Traceback" not in chat.stderr.read()


def test_custom_model_class_needs_trust_remote_code(shifted_place, served_folder, talk, monkeypatch) -> None:
    monkeypatch.chdir(shifted_place)
    out, err, code = talk("--model", "model", *GREEDY, inputs="Who flies?\n")
    assert (out, code) == ("", 2) and err.count("\n") == 1
    assert "model was saved by shifted.Shifted, whose code would have to be imported" in err
    own, _, code = talk("--model", "model", *GREEDY, "--trust_remote_code", inputs="Who flies?\n")
    assert code == 0 and own != talk("--model", served_folder, *GREEDY, inputs="Who flies?\n")[0]
