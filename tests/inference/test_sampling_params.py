"""SamplingParams refuses numbers out of their range, with the name, the rule and the value."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bumblebee import SamplingParams

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("max_new_tokens", 0, "at least 1"),
        ("temperature", -0.1, "0 or more"),
        ("temperature", INFINITY, "0 or more"),
        ("temperature", NAN, "0 or more"),
        ("top_k", -1, "0 or more"),
        ("top_p", 0.0, "more than 0 and at most 1"),
        ("top_p", 1.1, "more than 0 and at most 1"),
        ("top_p", NAN, "more than 0 and at most 1"),
        ("min_p", -0.1, "between 0 and 1"),
        ("min_p", 1.1, "between 0 and 1"),
        ("min_p", NAN, "between 0 and 1"),
        ("repetition_penalty", 0.0, "more than 0"),
        ("repetition_penalty", INFINITY, "more than 0"),
        ("repetition_penalty", NAN, "more than 0"),
    ],
)
def test_a_number_out_of_its_range_is_refused(name, value, rule):
    with pytest.raises(ValueError) as caught:
        SamplingParams(**{name: value})
    assert str(caught.value) == f"{name} must be {rule}, got {value}"


@settings(deadline=None)
@given(
    st.builds(
        dict,
        max_new_tokens=st.integers(1, 10**9),
        temperature=st.floats(0, 1e30),
        top_k=st.integers(0, 10**9),
        top_p=st.floats(0, 1, exclude_min=True),
        min_p=st.floats(0, 1),
        repetition_penalty=st.floats(0, 1e30, exclude_min=True),
    )
)
def test_every_number_in_its_range_is_taken(values):
    assert dataclasses.asdict(SamplingParams(**values)) == {**values, "seed": None, "ignore_eos": False}


def test_a_request_cannot_be_changed_once_it_is_made():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 0.5
