"""The chat in a terminal with a model folder: through pipes, and as a program at a pseudo terminal."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.processes import start_command
from helpers.pseudo_terminal import PseudoTerminal

from bumblebee import Generator, SamplingParams
from bumblebee.cli.main import main
from serve.terminal.backends import Delta, LocalBackend
from serve.terminal.chat import Chat
from serve.terminal.commands import COMMANDS, FILE_COMMANDS, with_setting
from serve.terminal.console import Screen, StdinReader, raise_interrupt
from serve.terminal.conversation import Conversation
from serve.terminal.line_editor import CommandCompleter, Document

GREEDY = ("--temperature", "0", "--max_new_tokens", "12")
PARAMS = SamplingParams(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def folder(tokenizer_folder: Path, tiny: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with room for very long answers."""
    import torch

    from bumblebee import Bumblebee

    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("chat")
    Bumblebee(tiny(max_position_embeddings=16384, initializer_range=0.3)).save_pretrained(place)
    shutil.copytree(tokenizer_folder, place, dirs_exist_ok=True)
    return place


@pytest.fixture(scope="module")
def generator(folder: Path) -> Generator:
    return Generator.from_pretrained(folder)


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str, int]]:
    """A function that pipes inputs into ``bumblebee chat``: gives stdout, stderr and the exit code."""

    def run(*words: str | Path, inputs: str) -> tuple[str, str, int]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(inputs))
        with pytest.raises(SystemExit) as ended:
            main(["chat", *map(str, words)])
        printed = capsys.readouterr()
        return printed.out, printed.err, int(ended.value.code or 0)

    return run


def answer(generator: Generator, *contents: str, system: str | None = None) -> str:
    """What the model says to a conversation: questions and answers by turns."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]
    template = generator.tokenizer.chat_template
    params = replace(PARAMS, stop_ids=[template.end_of_turn_id])
    return generator.generate([template.apply(messages, None, True)], params)[0].text


class InterruptedScreen(Screen):
    """Remembers; Ctrl-C is pressed while a piece is written."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.pieces, self.notes = at, [], []

    def write(self, text: str) -> None:
        self.pieces.append(text)
        if len(self.pieces) == self.at:
            signal.raise_signal(signal.SIGINT)

    def note(self, text: str) -> None:
        self.notes.append(text)


class Typing(StdinReader):
    """A keyboard whose person can be told something."""

    interactive = True


# -- pipes ---------------------------------------------------------------------------------------------------------------


def test_a_pipe_gets_the_answers_and_nothing_else(folder, generator, talk) -> None:
    first = answer(generator, "Who flies?")
    second = answer(generator, "Who flies?", first, "Why?")
    assert first != second
    out, err, code = talk("--model", folder, *GREEDY, inputs="Who flies?\nWhy?\n")
    assert (out, err, code) == (f"{first}\n{second}\n", "", 0)


def test_without_history_each_question_stands_alone(folder, generator, talk) -> None:
    out, _, _ = talk("--model", folder, *GREEDY, "--enable_history", "false", inputs="Who flies?\nWhy?")
    assert out == f"{answer(generator, 'Who flies?')}\n{answer(generator, 'Why?')}\n"


def test_lines_that_end_with_a_backslash_go_on(folder, generator, talk) -> None:
    out, _, _ = talk("--model", folder, *GREEDY, inputs="Who\\\nflies?\n\n")
    assert out == answer(generator, "Who\nflies?") + "\n"


def test_the_system_prompt_comes_first_and_commands_change_it(folder, generator, talk) -> None:
    words = ("--model", folder, *GREEDY, "--system_prompt", "Be brief.")
    out, err, _ = talk(*words, inputs='Why?\n/reset\n/system Be kind.\nWhy?\n/reset\n/system ""\nWhy?')
    assert out.count("\n") >= 3
    assert out == "".join(answer(generator, "Why?", system=system) + "\n" for system in ("Be brief.", "Be kind.", None))
    assert "system prompt: Be kind.\n" in err and "no system prompt\n" in err


def test_retry_asks_the_last_question_again_in_its_place(folder, generator, talk, tmp_path) -> None:
    out, _, _ = talk("--model", folder, *GREEDY, inputs=f"Why?\n/retry\n/save {tmp_path}/a.json")
    again = answer(generator, "Why?")
    assert out == f"{again}\n{again}\n"
    assert [one["content"] for one in json.loads((tmp_path / "a.json").read_text())["messages"]] == ["Why?", again]


def test_settings_change_the_next_answer(folder, generator, talk) -> None:
    out, err, _ = talk("--model", folder, *GREEDY, inputs="Why?\n/reset\n/set max_new_tokens 1\nWhy?\n/set temperature\n")
    whole = answer(generator, "Why?")
    short = out.removeprefix(f"{whole}\n").removesuffix("\n")
    assert whole.startswith(short) and 0 < len(short) < len(whole)
    assert err == "started a new conversation\nmax_new_tokens 1\ntemperature 0.0\n"


MISTAKES = {
    "/sistem Be kind.": "unknown command /sistem (did you mean '/system'?) (to send it as a question, start with a space)",
    "/xyz": "unknown command /xyz; /help lists the commands (to send it as a question, start with a space)",
    "/set temprature 1": "/set: unknown setting 'temprature' (did you mean 'temperature'?)",
    "/set temperature -1": "temperature must be 0 or more, got -1",
    "/save": "/save: expected a file name that ends in .json or .md",
    "/save chat.txt": "chat.txt: expected a file name that ends in .json or .md",
    "/save there.json": "there.json already exists; choose another name",
    "/save nowhere/a.json": "nowhere/a.json: No such file or directory",
    "/load nowhere.json": "nowhere.json: No such file or directory",
    "/load there.json": 'there.json is not a saved conversation: expected {"messages": [...]}',
    "/retry": "/retry: there is no question to send again",
}


def test_a_mistake_is_one_line_and_the_chat_goes_on(folder, generator, talk, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.json").write_text("{}")
    out, err, code = talk("--model", folder, *GREEDY, inputs="\n".join([*MISTAKES, "Why?"]))
    assert err.splitlines() == [f"bumblebee: {line}" for line in MISTAKES.values()]
    assert out == answer(generator, "Why?") + "\n" and code == 1


def test_a_full_context_is_told_with_its_numbers_and_reset_makes_room(folder, generator, talk) -> None:
    inputs = f"{'honey ' * 20000}\nWhy?\n/reset\nWhy?"
    out, err, code = talk("--model", folder, *GREEDY, inputs=inputs)
    expected = r"bumblebee: the conversation has \d+ tokens .*context of 16384 tokens; /reset .*\nstarted a new conversation\n"
    assert re.fullmatch(expected, err)
    assert (out, code) == (2 * (answer(generator, "Why?") + "\n"), 1)


def test_a_folder_without_a_chat_template_is_continued_as_plain_text(folder, generator, talk, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "base")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
    plain = [generator.generate([text], PARAMS)[0].text for text in ("The bees", "fly")]
    out, err, _ = talk("--model", tmp_path / "base", *GREEDY, inputs="The bees\nfly")
    assert out == "".join(text + "\n" for text in plain)
    assert err.count("\n") == 1 and "no chat template" in err
    assert talk("--model", folder, *GREEDY, "--raw", "true", inputs="The bees\nfly")[:2] == (out, "")


def test_a_recipe_gives_defaults_and_flags_win(folder, generator, talk, tmp_path) -> None:
    recipe = tmp_path / "chat.yaml"
    recipe.write_text("system_prompt: Be brief.\ntemperature: 0.0\nmax_new_tokens: 3\n")
    out, _, _ = talk("--model", folder, "--config", recipe, "--max_new_tokens", "12", inputs="Why?")
    assert out == answer(generator, "Why?", system="Be brief.") + "\n"


WRONG = {
    "": "expected --model FOLDER or --url http://127.0.0.1:8000",
    "--model a --url http://b": "expected --model FOLDER or --url http://127.0.0.1:8000, not both",
    "--url localhost:8000": "url: expected http://HOST:PORT, got localhost:8000",
    "--model a --temperature -1": "temperature must be 0 or more, got -1.0",
    "--model a --temprature 1": "unknown option 'temprature' (did you mean 'temperature'?)",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_options_are_one_line(words: str, talk) -> None:
    assert talk(*words.split(), inputs="")[1:] == (f"bumblebee: {WRONG[words]}\n", 2)


def test_a_stopped_answer_gives_its_pages_back_and_is_not_computed_again(generator: Generator) -> None:
    model = LocalBackend(generator, "here")
    screen = InterruptedScreen(at=6)
    chat = Chat(model, Conversation(), {"max_new_tokens": 1000, "ignore_eos": True}, Typing(), screen)
    assert chat.ask("honey " * 100)
    assert screen.notes[-1].startswith("6 tokens") and screen.notes[-1].endswith("stopped by Ctrl-C")
    assert chat.conversation.turns == [("honey " * 100, "".join(screen.pieces).rstrip("\n"))]
    messages = [{"role": "user", "content": "honey " * 100}]
    stats = model.engine.stats()
    assert not model.engine.busy
    assert stats.pages_free + stats.pages_cached == stats.pages_total
    for _ in model.stream(messages, {"max_new_tokens": 1}):
        pass
    stats = model.engine.stats()
    assert stats.cached_tokens > 300 and stats.pages_free + stats.pages_cached == stats.pages_total


def test_a_press_that_nobody_raised_ends_the_answer_behind_its_piece() -> None:
    """As one does that falls into a destructor: Python tells of it and goes on."""
    written: list[int] = []

    class Swallowing:
        raw = False

        def stream(self, messages, sampling):
            for number in range(100):
                with raise_interrupt(), contextlib.suppress(KeyboardInterrupt):
                    if number == 3:
                        signal.raise_signal(signal.SIGINT)
                written.append(number)
                yield Delta(f"{number} ", number)

    before, screen = signal.getsignal(signal.SIGINT), InterruptedScreen(at=-1)
    chat = Chat(Swallowing(), Conversation(), {}, Typing(), screen)
    assert chat.ask("Who flies?") and written == [0, 1, 2, 3]
    assert chat.conversation.turns == [("Who flies?", "0 1 2 3 ")] and "stopped by Ctrl-C" in screen.notes[-1]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_a_reader_that_leaves_ends_the_chat_in_silence(folder: Path) -> None:
    chat = start_command("chat", "--model", str(folder), *GREEDY, stdin=subprocess.PIPE)
    chat.stdin.write("Who flies?\n" * 50)
    chat.stdin.flush()
    assert chat.stdout.readline()
    chat.stdout.close()
    assert chat.wait(60) == 1
    assert chat.stderr.read() == ""


@pytest.mark.slow
def test_ctrl_c_ends_a_chat_that_reads_from_a_pipe(folder: Path) -> None:
    chat = start_command("chat", "--model", str(folder), *GREEDY, stdin=subprocess.PIPE)
    chat.stdin.write("Who flies?\n")
    chat.stdin.flush()
    assert chat.stdout.readline()
    chat.send_signal(signal.SIGINT)
    assert chat.wait(60) == 130
    assert "Traceback" not in chat.stderr.read()


def test_a_class_of_ones_own_is_run_only_where_that_is_asked_for(shifted_place, served_folder, talk, monkeypatch) -> None:
    monkeypatch.chdir(shifted_place)
    out, err, code = talk("--model", "model", *GREEDY, inputs="Who flies?\n")
    assert (out, code) == ("", 2) and err.count("\n") == 1
    assert "model holds a shifted.Shifted, whose code would have to be imported" in err
    own, _, code = talk("--model", "model", *GREEDY, "--trust_remote_code", inputs="Who flies?\n")
    assert code == 0 and own != talk("--model", served_folder, *GREEDY, inputs="Who flies?\n")[0]


# -- files of conversations, completion ----------------------------------------------------------------------------------


def test_a_saved_conversation_is_loaded_again_and_trains(tmp_path: Path) -> None:
    from datamodules import record_files

    talked = Conversation("Be brief.")
    talked.turns = [("Who?", "Bees.\n"), ("Why?", "花")]
    file = talked.save(str(tmp_path / "a.json"))
    talked.save(str(file))  # its own file it may write again
    again = Conversation()
    again.load(str(file))
    assert (again.system, again.turns) == (talked.system, talked.turns)
    assert [record.value["messages"][-1]["content"] for record in record_files.read(str(file))] == ["花"]
    assert talked.save(str(tmp_path / "a.md")).read_text() == (
        "## system\n\nBe brief.\n\n## user\n\nWho?\n\n## assistant\n\nBees.\n\n## user\n\nWhy?\n\n## assistant\n\n花\n"
    )


@pytest.mark.parametrize("text", ["[", "3", '{"messages": [1]}', '[{"role": "user", "content": "a"}]', '[{"role": "user"}]'])
def test_a_file_that_is_no_conversation_changes_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    talked = Conversation("Be brief.")
    with pytest.raises(ValueError, match="is not a saved conversation"):
        talked.load(str(tmp_path / "a.json"))
    assert talked.system == "Be brief."


def test_settings_are_read_as_json_and_null_removes_one() -> None:
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


# -- a person at a terminal ----------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(folder: Path, tmp_path: Path) -> Iterator[Callable[..., PseudoTerminal]]:
    """A function that starts the chat at a pseudo terminal, and waits for its prompt."""
    started = []

    def start(*words: str, **environment: str) -> PseudoTerminal:
        started.append(PseudoTerminal("chat", "--model", str(folder), *words, state=tmp_path / "state", **environment))
        started[-1].expect(">")
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.mark.slow
def test_a_person_talks_stops_an_answer_and_leaves(terminal, generator, tmp_path) -> None:
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
def test_inputs_are_found_again_another_day(terminal, tmp_path) -> None:
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
def test_colours_are_left_out_where_the_user_says_so(terminal) -> None:
    for environment, dim in (({}, True), ({"NO_COLOR": "1"}, False)):
        chat = terminal(*GREEDY, **environment)
        chat.type("Why?", "enter")
        chat.expect("tokens/s")
        chat.expect(">")
        chat.type("ctrl-d")
        assert chat.end() == 0
        assert ("\x1b[2m" in chat.raw) == dim
