"""Sampling options: only explicit values are returned, exactly as they were written."""

from __future__ import annotations

from dataclasses import fields

import pytest

from bumblebee.cli.parser import Parser
from bumblebee.cli.sampling_options import add_sampling_options, explicit_sampling
from bumblebee.inference.sampling.sampling_params import SamplingParams


def explicit(*words: str, group: str = "", leave_out: tuple[str, ...] = ()) -> dict:
    parser = Parser(prog="test")
    add_sampling_options(parser, group, leave_out)
    return explicit_sampling(parser.parse(list(words)), group)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["--temperature", "0", "--top_k", "0"], {"temperature": 0.0, "top_k": 0}),
        (["--temperature", "1", "--max_new_tokens=128"], {"temperature": 1.0, "max_new_tokens": 128}),
        (["--seed", "null", "--logprobs", "0"], {"logprobs": 0}),
        (["--ignore_eos"], {"ignore_eos": True}),
        (["--no_ignore_eos"], {"ignore_eos": False}),
        (["--stop", "###"], {"stop": ["###"]}),
        (["--stop", "5", "null", "[INST]", "a: {x}", "--seed", "7"], {"stop": ["5", "null", "[INST]", "a: {x}"], "seed": 7}),
        (["--stop=a=b"], {"stop": ["a=b"]}),
        (['--stop=["--", "a"]'], {"stop": ["--", "a"]}),
        (["--stop", '["--", "a"]'], {"stop": ["--", "a"]}),
        (["--stop", "[1]"], {"stop": ["[1]"]}),
        (["--stop_ids", "[5, 6]"], {"stop_ids": [5, 6]}),
        (["--stop_ids", "5"], {"stop_ids": [5]}),
        (["--stop_ids", "5", "6"], {"stop_ids": [5, 6]}),
        (["--spelled_ids", "5"], {"spelled_ids": [5]}),
        (["--logit_bias", "{50: -100, 7: 0.5}"], {"logit_bias": {50: -100.0, 7: 0.5}}),
        (["--logit_bias", '{"50": -100}'], {"logit_bias": {50: -100.0}}),
    ],
    ids=" ".join,
)  # fmt: skip
def test_only_explicit_values_are_returned(words, expected):
    assert explicit(*words) == expected
    if words:
        grouped = [word.replace("--", "--sampling.", 1) if word.startswith("--") else word for word in words]
        grouped = [word.replace("--sampling.no_", "--no_sampling.") for word in grouped]
        assert explicit(*grouped, group="sampling") == expected


def test_every_field_is_an_option_with_help():
    parser = Parser(prog="test")
    add_sampling_options(parser)
    options = {action.dest: action.help for action in parser._actions}
    assert all(len(options[field.name]) > 10 for field in fields(SamplingParams))


def test_left_out_field_is_not_an_option(capsys):
    with pytest.raises(SystemExit):
        explicit("--logprobs", "3", leave_out=("logprobs",))
    assert "unknown option 'logprobs'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "hot"], "temperature: expected a number or null, got 'hot'"),
        (["--temperature"], "--temperature: expected a value"),
        (["--stop"], "--stop: expected a value"),
        (["--stop_ids", "x"], "stop_ids: expected an integer or null, got 'x'"),
    ],
)
def test_value_of_the_wrong_type_is_refused(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        explicit(*words)
    assert ended.value.code == 2 and capsys.readouterr().err == f"bumblebee: {message}\n"


def test_value_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"top_p must be more than 0 and at most 1, got 2\.0"):
        explicit("--top_p", "2")
