"""Dispatch: help, version, renamed commands, --log_level and the help of classes."""

from __future__ import annotations

import json
import logging
import re

import pytest

import bumblebee
from bumblebee.cli.commands import COMMANDS
from bumblebee.cli.errors import parse_errors, renamed
from bumblebee.cli.logs import pop_log_level
from bumblebee.cli.main import main
from bumblebee.cli.shipped_classes import GROUPS, shipped


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(words, capsys):
    main(words)
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", out, re.MULTILINE) for name in COMMANDS)


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"{bumblebee.__version__}\n"


@pytest.mark.parametrize("option", ["--trainer.max_steps", "--output_dir", "--overwrite", "--config"])
def test_help_of_fit_lists_its_options(option, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--help"])
    assert ended.value.code in (0, None)
    assert option in capsys.readouterr().out


def test_environment_variable_shows_the_traceback(workdir, monkeypatch):
    monkeypatch.setenv("BUMBLEBEE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="dato.jsonl"):
        main(["fit", "--config", "recipe.yaml", "--data.files", "dato.jsonl"])


# -- renamed commands and options ----------------------------------------------------------------------------------------


def test_renamed_command_names_the_new_one(error_line):
    assert error_line("answer", "--config", "recipe.yaml") == "command 'answer' was renamed; use 'bumblebee evaluate'"
    assert all(new in COMMANDS and old not in COMMANDS for old, new in renamed.COMMANDS.items())


def test_renamed_option_names_the_new_one(workdir, error_line, monkeypatch):
    monkeypatch.setitem(parse_errors.RENAMED, "trainer.steps", "trainer.max_steps")
    expected = "unknown option 'trainer.steps': it was renamed to 'trainer.max_steps'"
    assert error_line("fit", "--config", "recipe.yaml", "--trainer.steps", "3") == expected
    recipe = (workdir / "recipe.yaml").read_text()
    (workdir / "recipe.yaml").write_text(recipe.replace("max_steps", "steps"))
    assert re.fullmatch(rf"recipe.yaml:\d+: {expected}", error_line("fit", "--config", "recipe.yaml"))


# -- --log_level ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def logger():
    """The package's logger, with its level restored afterwards."""
    logger = logging.getLogger("bumblebee")
    level = logger.level
    yield logger
    logger.setLevel(level)


def run_to_the_end(*words: str) -> None:
    """Run a command that may exit with code 0."""
    try:
        main(list(words))
    except SystemExit as ended:
        assert not ended.code


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_accepts_log_level(command, logger, capsys):
    for words in (["--log_level", "debug", command], [command, "--log_level=debug"]):
        logger.setLevel("INFO")
        run_to_the_end(*words, "--help")
        assert logger.level == logging.DEBUG


@pytest.mark.parametrize(("level", "lines"), [("debug", 2), ("info", 1), ("warning", 0)])
def test_log_level_selects_what_is_printed(level, lines, logger, capsys):
    run_to_the_end("--log_level", level, "--version")
    logger.debug("details")
    logger.info("a note")
    printed = capsys.readouterr().err.splitlines()
    assert printed == ["debug: details", "a note"][2 - lines :]


@pytest.mark.parametrize(
    ("words", "got"),
    [("--log_level loud fit", "'loud'"), ("fit --log_level=", "nothing"), ("fit --log_level", "nothing")],
)
def test_unknown_log_level_is_refused(words, got, error_line):
    assert error_line(*words.split()) == f"--log_level: expected debug, info, warning or error, got {got}"


def test_serve_keeps_log_level_as_its_own_option():
    for words in (["--log_level", "debug", "serve", "--port", "1"], ["serve", "--port", "1", "--log_level=debug"]):
        assert pop_log_level(words) == ("debug", ["serve", "--port", "1", "--log_level", "debug"])
    assert pop_log_level(["serve"]) == ("info", ["serve"])


# -- --GROUP.help --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
def test_group_help_lists_the_shipped_classes(group, capsys):
    run_to_the_end("fit", f"--{group}.help")
    out = capsys.readouterr().out
    assert shipped(group)
    for path in shipped(group):
        assert re.search(rf"^  {re.escape(path)} +\S", out, re.MULTILINE), path


@pytest.mark.parametrize(
    ("group", "path", "option"),
    [
        ("callbacks", "callbacks.Checkpoint", "--callbacks.NAME.every EVERY"),
        ("data", "datamodules.SFT", "--data.max_length MAX_LENGTH"),
        ("optimizer", "torch.optim.SGD", "--optimizer.momentum MOMENTUM"),
        ("task.model", "bumblebee.Bumblebee.from_pretrained", "--task.model.folder FOLDER"),
        ("task.transforms", "bumblebee.lora.LoRA", "--task.transforms.rank RANK"),
    ],
)
def test_class_help_lists_its_options(group, path, option, capsys):
    for words in ([f"--{group}.help", path], [f"--{group}.help={path}"]):
        run_to_the_end("fit", *words)
        assert option in capsys.readouterr().out


def test_class_help_of_an_unknown_class_is_refused(error_line):
    line = error_line("fit", "--callbacks.help", "callbacks.Chekpoint")
    assert line.startswith("--callbacks.help: cannot import a class named 'callbacks.Chekpoint' (did you mean 'callbacks.Check")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--data sftt", "data: expected the class_path of a DataModule, got 'sftt' (did you mean 'datamodules.SFT'?)"),
        ("--data Zzz", "data: expected the class_path of a DataModule, got 'Zzz'; shipped classes: datamodules."),
        ("--callbacks.x callbacks.Zzz", "callbacks.x: callbacks has no class 'Zzz'; shipped classes: callbacks."),
        ("--callbacks.x chekpoint", "callbacks.x: expected the class_path of a Callback, got 'chekpoint' (did you mean"),
    ],
)
def test_unknown_class_suggests_shipped_ones(words, expected, workdir, error_line):
    assert error_line("fit", "--config", "recipe.yaml", *words.split()).startswith(expected)


def test_torchruns_report_names_the_error(workdir, error_line, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    line = error_line("fit", "--config", "recipe.yaml", "--trainer.max_step", "3")
    report = json.loads((tmp_path / "error.json").read_text())["message"]
    assert report["message"] == report["extraInfo"]["py_callstack"] == f"bumblebee: {line}"
