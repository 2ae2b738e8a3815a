"""SamplingParams: values out of range raise with the name, the rule and the value."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bumblebee import SamplingParams

NAN, INFINITY = float("nan"), float("inf")
BIASES = "a mapping of up to 1024 token ids to numbers between -100 and 100"
TEXTS = "a list of up to 16 strings of 1 to 256 characters"
IDS = "a list of token ids, 0 or more"


@pytest.mark.parametrize(
    ("name", "rule", "values"),
    [
        ("max_new_tokens", "at least 1", [0, -5, 1.5, NAN, "7", None, True]),
        ("temperature", "0 or more", [-0.1, INFINITY, NAN, "hot", None, True]),
        ("top_k", "0 or more", [-1, 2.0, None]),
        ("top_p", "more than 0 and at most 1", [0.0, 1.1, NAN, None]),
        ("min_p", "between 0 and 1", [-0.1, 1.1, NAN]),
        ("repetition_penalty", "more than 0", [0.0, -1.0, INFINITY, NAN]),
        ("presence_penalty", "between -2 and 2", [-2.1, 2.1, NAN, INFINITY, None]),
        ("frequency_penalty", "between -2 and 2", [-2.1, 2.1, NAN, "1"]),
        ("logit_bias", BIASES, [{-1: 0.0}, {1: 101}, {1: NAN}, {"1": 0.0}, {1: None}, [1], None]),
        ("stop", TEXTS, ["###", [""], ["a", 5], [None], None, {"a": 1}]),
        ("stop_ids", IDS, [[-1], [1.0], [True], 5, None]),
        ("spelled_ids", IDS, [[-1], [True], 5]),
        ("logprobs", "between 0 and 100", [-1, 101, True, 1.0]),
        ("seed", "a 64-bit integer", [2**64, -(2**63) - 1, 1.0, "x", True]),
        ("ignore_eos", "true or false", [1, None, "yes"]),
        ("min_new_tokens", "0 or more", [-1, 1.5, True, None]),
        ("include_stop_str_in_output", "true or false", [1, None]),
    ],
)
def test_values_out_of_range_raise(name, rule, values):
    for value in values:
        with pytest.raises(ValueError) as caught:
            SamplingParams(**{name: value})
        assert str(caught.value) == f"{name} must be {rule}, got {value!r}"


@pytest.mark.parametrize(
    "values", [{"stop": ["a" * 257]}, {"stop": list("abcdefghijklmnopq")}, {"logit_bias": dict.fromkeys(range(1025), 1.0)}]
)
def test_oversized_values_raise_with_a_short_message(values):
    with pytest.raises(ValueError) as caught:
        SamplingParams(**values)
    assert len(str(caught.value)) < 250 and "\n" not in str(caught.value)


VALUES = st.builds(
    dict,
    max_new_tokens=st.integers(1, 10**9),
    temperature=st.floats(0, 1e30),
    top_k=st.integers(0, 10**9),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0, 1e30, exclude_min=True),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.integers(-2, 2),
    logit_bias=st.dictionaries(st.integers(0, 2**31), st.floats(-100, 100), max_size=5),
    stop=st.lists(st.text(min_size=1, max_size=256), max_size=16),
    stop_ids=st.lists(st.integers(0, 2**31)),
    spelled_ids=st.lists(st.integers(0, 2**31)),
    logprobs=st.none() | st.integers(0, 100),
    seed=st.none() | st.integers(-(2**63), 2**64 - 1),
    ignore_eos=st.booleans(),
    min_new_tokens=st.integers(0, 10**9),
    include_stop_str_in_output=st.booleans(),
)


@given(VALUES)
def test_valid_values_are_kept_and_can_be_pickled(values):
    params = SamplingParams(**values)
    assert dataclasses.asdict(params) == values
    assert pickle.loads(pickle.dumps(params)) == params


def test_params_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 0.5


def test_defaults_are_not_shared():
    assert SamplingParams().stop is not SamplingParams().stop


@pytest.mark.parametrize(("name", "values"), [("logit_bias", {9: 1.0, 10: 1.0}), ("stop_ids", [9, 10])])
def test_ids_out_of_the_vocabulary_raise(name, values):
    params = SamplingParams(**{name: values})
    params.check_ids(11)
    with pytest.raises(ValueError, match=f"{name}: token id 10 is out of the vocabulary; the model.s ids are 0 to 9"):
        params.check_ids(10)
