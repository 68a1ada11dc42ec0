"""How reports, tables and figures write a number, an interval and a p value; what is missing is an empty text."""

from __future__ import annotations

import math
from typing import Any

from research.runs.formats import dig
from research.runs.run import Run

UNKNOWN = "–"


def is_missing(value: float | None) -> bool:
    """Whether there is no number: None in a file, nan in an array."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def format_number(value: Any, decimals: int = 4, sign: str = "") -> str:
    """Return a count with thousands separators, another number with `decimals`; `sign` "+" marks rises too."""
    if is_missing(value):
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    return f"{round(value, decimals) + 0.0:{sign},.{decimals}f}"  # without the sum, -0.00001 would read -0.0000


def format_interval(low: float | None, high: float | None, sign: str = "") -> str:
    """Return both ends of an interval, as in "0.7012 to 0.7345"."""
    if is_missing(low) or is_missing(high):
        return ""
    return f"{format_number(low, sign=sign)} to {format_number(high, sign=sign)}"


def format_p_value(value: float | None) -> str:
    """Return a p value to three decimals; smaller ones are no better known than that."""
    if value is None or math.isnan(value):
        return ""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def show_number(value: Any, decimals: int = 4, sign: str = "") -> str:
    """Return a number for a table's cell, where a missing one is a dash."""
    return format_number(value, decimals, sign) or UNKNOWN


def format_threshold(value: Any) -> str:
    """Return a threshold with four decimals; a smaller one with two digits, since 0.0000 would say yes to everything."""
    text = format_number(value)
    return f"{value:.2g}" if text == "0.0000" and value > 0 else text


def show_threshold(run: Run, *keys: str) -> str:
    """Return a threshold of metrics.json for a table's cell; of several folds, mean and deviation."""
    text, deviation = format_threshold(dig(run.scores, *keys)) or UNKNOWN, dig(run.metrics, "std", *keys)
    return text if deviation is None else f"{text} ± {format_threshold(deviation)}"


def show_score(run: Run, *keys: str, sign: str = "") -> str:
    """Return a number of metrics.json for a table's cell; of several folds, mean and deviation."""
    text = show_number(dig(run.scores, *keys), sign=sign)
    deviation = dig(run.metrics, "std", *keys)
    return text if deviation is None else f"{text} ± {format_number(deviation)}"
