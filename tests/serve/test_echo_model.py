"""The echo model used by the server's tests outputs exactly its text."""

from __future__ import annotations

import pytest
from helpers.echo_model import write_echo_model
from hypothesis import given, settings
from hypothesis import strategies as st

from bumblebee.inference.generator import Generator
from bumblebee.inference.sampling.sampling_params import SamplingParams

TEXT = "# Hello\n\nHello, hello!\n\n- a a a a b\n- a a a c 🐝\n\n```python\nprint('Hello')\nprint('Hello')\n```\n"


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return Generator.from_pretrained(write_echo_model(tmp_path_factory.mktemp("echo"), TEXT))


@pytest.mark.parametrize("params", [SamplingParams(512, temperature=0), SamplingParams(512, temperature=1.0, seed=3)])
def test_echo_model_answers_any_chat_with_its_text(generator, params):
    long = "Tell me more about #, a and Hello.\n" * 40
    prompts = [generator.encode_chat(question) for question in ("Hi", TEXT, long, "", "a a a")]
    assert [(answer.text, answer.finish_reason) for answer in generator.generate(prompts, params)] == [(TEXT, "stop")] * 5


@settings(max_examples=20)
@given(st.text(min_size=1, max_size=20).filter(lambda text: "#" not in text))
def test_echo_model_continues_any_text_with_its_own(generator, prompt):
    assert generator.generate([prompt], SamplingParams(512, temperature=0))[0].text == TEXT


def test_repetitive_text_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="repeats more than"):
        write_echo_model(tmp_path, "a b " * 200)
