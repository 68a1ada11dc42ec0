"""Flags come from any frozen dataclass: these tests have one of their own, which is about nothing."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from research.errors import FlagErrors, InputError, first_line, naming_flag, quote_value
from research.flags import (
    between,
    check_fields,
    fields_of_kind,
    fields_that_decide,
    format_value,
    make_parser,
    parse_flags,
    parse_value,
    setting,
    write_flags,
)


@dataclass(frozen=True)
class Cake:
    name: str = setting("sponge", "dough", "what it is called", decides="taste")
    eggs: int = setting(2, "dough", "how many", check=between(1, 12), decides=("taste", "size"))
    sugar: float = setting(0.5, "dough", "how much, in parts", decides="taste")
    iced: bool = setting(False, "top", "put icing on it", decides="looks")
    toppings: tuple[str, ...] = setting((), "top", "what lies on it", metavar="FRUIT", decides="looks")
    notes: tuple[str, ...] = setting((), "top", "more to say", metavar="NOTE", decides="looks", repeatable=True)
    layers: int | None = setting(None, "top", "how many (default: by the eggs)", decides="size")
    recipe: str | None = setting(None, "top", "its recipe", decides="taste", kind="table", rows="steps")


def parse(*argv: str, other_keys: tuple[str, ...] = ()) -> Cake:
    cake, _ = parse_flags(Cake, make_parser(Cake, ("dough", "top"), prog="bake"), argv, check_fields, other_keys)
    return cake


def problems_of(*argv: str) -> tuple[str, ...]:
    with pytest.raises(FlagErrors) as caught:
        parse(*argv)
    return caught.value.problems


def test_fields_are_found_by_what_they_decide_and_what_they_are() -> None:
    assert fields_that_decide(Cake, "size") == ("eggs", "layers")
    assert fields_that_decide(Cake(), "size", "looks") == ("eggs", "iced", "toppings", "notes", "layers")
    assert fields_of_kind(Cake, "table") == ("recipe",)


def test_field_that_does_not_say_what_it_decides_cannot_be_declared() -> None:
    with pytest.raises(TypeError, match="decides"):
        setting(1, "dough", "how many")  # type: ignore[call-arg]


def test_help_shows_groups_kinds_and_defaults() -> None:
    text = make_parser(Cake, ("dough", "top"), prog="bake").format_help()
    assert 0 < text.index("dough:") < text.index("top:")
    assert "--recipe FILE" in text and "--toppings FRUIT" in text and "--layers N" in text
    assert "put icing on it (default: off)" in text and "how many (default: 2)" in text


def test_list_is_given_once_unless_it_is_repeatable() -> None:
    assert parse("--notes", "a", "b", "--notes", "c").notes == ("a", "b", "c")
    assert problems_of("--toppings", "a", "--toppings", "b") == (
        "--toppings: is given twice; list its values after one --toppings",
    )


def test_problems_of_reading_and_of_checking_are_reported_together() -> None:
    assert problems_of("--eggs", "13", "--sugar", "x", "--egs", "2") == (
        "--egs: unknown flag; did you mean --eggs?",
        "--sugar: must be a number, got 'x'",
        "--eggs: must be at least 1 and at most 12, got 13",
    )


def test_other_keys_of_a_config_file_are_passed_over(tmp_path: Any) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"eggs": 3, "fold": 2}')
    assert parse("--config", str(path), other_keys=("fold",)).eggs == 3
    assert problems_of("--config", str(path)) == (f"--config: {path} names an unknown flag 'fold'",)


TEXTS = st.text(min_size=1).filter(lambda text: bool(text.strip()) and text.isprintable())
WORDS = TEXTS.filter(lambda text: text.split() == [text])
CAKES = st.builds(
    Cake,
    name=TEXTS,
    eggs=st.integers(1, 12),
    sugar=st.floats(allow_nan=False, allow_infinity=False),
    iced=st.booleans(),
    toppings=st.lists(WORDS.filter(lambda word: not word.startswith("-")), min_size=1).map(tuple),
    layers=st.integers(0, 2**31 - 1),
)


@given(CAKES)
def test_written_flags_give_the_values_back(cake: Cake) -> None:
    values = {entry.name: getattr(cake, entry.name) for entry in fields(cake)}
    assert parse(*write_flags({name: value for name, value in values.items() if value != ()})) == cake


@given(CAKES)
def test_written_values_are_read_back(cake: Cake) -> None:
    for name in ("name", "eggs", "sugar", "iced", "toppings", "layers"):
        value = getattr(cake, name)
        assert parse_value(Cake, name, format_value(value)) == value


def test_text_that_looks_like_a_flag_is_written_so_that_it_is_none() -> None:
    assert write_flags({"name": "--odd", "iced": False, "layers": None}) == ["--name=--odd", "--no-iced"]


def test_problem_gets_its_flag_in_front_and_other_errors_pass() -> None:
    with pytest.raises(InputError, match=r"^--recipe: is burnt$"), naming_flag("recipe"):
        raise InputError("is burnt")
    with pytest.raises(ValueError, match=r"^a bug$"), naming_flag("recipe"):
        raise ValueError("a bug")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("first\nsecond"), "first"),
        (ValueError("  \n "), "ValueError"),
        (OSError(), "OSError"),
        (ValueError("a\tb\x1b[0m"), "a\\tb\\x1b[0m"),
        (ValueError("x" * 1000), "x" * 300 + "..."),
    ],
)
def test_reason_is_the_first_line_of_an_error(error: Exception, line: str) -> None:
    assert first_line(error) == line


@pytest.mark.parametrize(
    ("value", "shown"),
    [("a\nb", r"'a\nb'"), (None, "null"), (True, "true"), ([1], "a list"), ({}, "an object"), (1.5, "1.5")],
)
def test_value_is_quoted_on_one_line(value: Any, shown: str) -> None:
    assert quote_value(value) == shown
    assert quote_value("x" * 1000, longest=10) == "'xxxxxxxxx..."
