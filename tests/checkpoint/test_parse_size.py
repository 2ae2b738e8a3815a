"""Sizes such as "5GB": all documented spellings, and the error for others."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bumblebee.checkpoint.weight_writer import parse_size

UNITS = {"": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
SPACE = st.sampled_from(["", " ", "  "])


@settings(deadline=None)
@given(st.integers(1, 10**6), st.sampled_from(list(UNITS)), SPACE, SPACE, st.sampled_from([str, str.upper, str.lower]))
def test_whole_number_is_multiplied_by_its_unit(number, unit, before, between, spell):
    assert parse_size(spell(f"{before}{number}{between}{unit}")) == number * UNITS[unit]


@settings(deadline=None)
@given(st.decimals("0.001", 1000, places=3), st.sampled_from(["KB", "MB", "GB"]))
def test_a_fraction_is_rounded_down_to_bytes(number, unit):
    assert abs(parse_size(f"{number}{unit}") - int(number * UNITS[unit])) <= 1


@settings(deadline=None)
@given(st.integers(1, 10**6), st.sampled_from(["KB", "MB", "GB"]))
def test_a_binary_unit_is_larger_than_its_decimal_one(number, unit):
    assert parse_size(f"{number}{unit[0]}iB") > parse_size(f"{number}{unit}")


@pytest.mark.parametrize(
    "text", ["", "GB", "5 apples", "-5GB", "0GB", "0", "5TB", "5G", "5IB", "1e9", "nan", "5GBGB", "0.1", "9" * 400]
)
def test_invalid_size_is_named(text):
    with pytest.raises(ValueError) as caught:
        parse_size(text)
    assert str(caught.value).endswith(f"such as 5GB, 500MB or 2GiB, got {text!r}")


@settings(deadline=None)
@given(st.text())
def test_any_text_parses_or_raises_value_error(text):
    try:
        assert parse_size(text) > 0
    except ValueError as error:
        assert repr(text) in str(error)
