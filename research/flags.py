"""Flags made from a dataclass of settings."""

from __future__ import annotations

import json
from typing import Any

LONGEST_SHOWN = 120


def describe(value: Any) -> str:
    """Return a value as an error line shows it: on one line, and not at any length."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "..."


def format_flag(value: Any) -> str:
    """Return a flag's value as it is typed: on or off, lists by spaces, nothing for an unset one."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, float):
        return str(value).removesuffix(".0")
    return "" if value is None else str(value)
