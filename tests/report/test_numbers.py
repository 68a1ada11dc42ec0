"""How numbers are written in reports and comparisons."""

from __future__ import annotations

import math

import pytest

from research.report.numbers import format_interval, format_number, format_p_value, format_threshold


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234, "1,234"), (0.71234, "0.7123"), (-0.00001, "0.0000"), (None, ""), (math.nan, ""), ("kept", "kept")],
)
def test_numbers_have_four_decimals_and_counts_none(value: object, text: str) -> None:
    assert format_number(value) == text


def test_differences_carry_their_sign() -> None:
    assert (format_number(0.02, sign="+"), format_number(-0.02, sign="+")) == ("+0.0200", "-0.0200")
    assert format_interval(-0.01, 0.03, sign="+") == "-0.0100 to +0.0300"


@pytest.mark.parametrize("missing", [None, math.nan])
def test_an_interval_or_a_p_value_that_is_missing_is_empty(missing: float | None) -> None:
    assert format_interval(missing, 0.1) == format_interval(0.1, missing) == format_p_value(missing) == ""


def test_small_p_values_are_bounded() -> None:
    assert (format_p_value(0.0004), format_p_value(0.02)) == ("<0.001", "0.020")


@pytest.mark.parametrize(
    ("value", "text"), [(0.34567, "0.3457"), (0.0000123, "1.2e-05"), (0.00005, "0.0001"), (0.0, "0.0000"), (None, "")]
)
def test_a_small_threshold_is_not_written_as_none(value: float | None, text: str) -> None:
    assert format_threshold(value) == text
