"""Flags made from a frozen dataclass of settings: declared at its fields, read, checked and written.

The dataclass is an argument everywhere, so nothing here knows what its settings are for. Only the standard
library is imported, so `--help` and a bad flag answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import os
import re
import stat
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from research.errors import FlagErrors, first_line, quote_value

Settings = TypeVar("Settings")
Check = Callable[[Any], str | None]
Grid = dict[str, tuple[Any, ...]]
# What a value is beyond its type: a file, a name in its header, or a folder.
Kind = Literal["value", "table", "column", "model", "folder"]
PATHS: tuple[Kind, ...] = ("table", "model", "folder")
METAVARS = {"table": "FILE", "column": "NAME", "model": "MODEL", "folder": "FOLDER"}
# Past this a seed, a size or a count overflows in one of the libraries below.
LARGEST_WHOLE_NUMBER = 2**31 - 1


def setting(
    default: Any,
    group: str,
    help_text: str,
    *,
    decides: str | Collection[str],
    kind: Kind = "value",
    rows: str | None = None,
    choices: Sequence[str] | None = None,
    check: Check | None = None,
    metavar: str | None = None,
    repeatable: bool = False,
    keyed_at_default: bool = True,
) -> Any:
    """Declare one field together with everything there is to know of its flag.

    Args:
        decides: What a change of the value can change, in words of the dataclass's own choice.
        rows: For a table, what its rows are called where several tables are told apart.
        choices: The texts it may hold.
        check: Returns what is wrong with a value, None when nothing is.
        metavar: What the help shows for the value, where neither kind nor type say it.
        repeatable: For a list, whether a second flag adds to the first.
        keyed_at_default: Whether cache keys name it at its default too; False for a field that came later, so that what
            was kept before it is still found.
    """
    metadata = {
        "group": group,
        "help": help_text,
        "decides": frozenset({decides} if isinstance(decides, str) else decides),
        "kind": kind,
        "rows": rows,
        "choices": choices,
        "check": check,
        "metavar": metavar or METAVARS.get(kind),
        "repeatable": repeatable,
        "keyed_at_default": keyed_at_default,
    }
    return dataclasses.field(default=default, metadata=metadata)


def between(low: float, high: float = math.inf, *, open_low: bool = False, note: str = "") -> Check:
    """Return a check that a number lies in [low, high], or in (low, high] with `open_low`."""
    bounds = [f"greater than {low}" if open_low else f"at least {low}"]
    if high < math.inf:
        bounds.append(f"at most {high}")

    def check(value: float) -> str | None:
        inside = (low < value if open_low else low <= value) and value <= high
        return None if inside else f"must be {' and '.join(bounds)}, got {value}" + (f" ({note})" if note else "")

    return check


def matching(pattern: str, wanted: str) -> Check:
    """Return a check that a text has a form, told in words."""
    return lambda value: None if re.fullmatch(pattern, value) else f"must be {wanted}, got {quote_value(value)}"


def find_package(name: str) -> str | None:
    """Say so when a package is not there, before anything is computed for it; None when it is."""
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return None
    return f"the package {name} is not installed; pip install {name}, or choose another"


def as_tuple(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the values of a field that holds one text, several or none."""
    return (value,) if isinstance(value, str) else value or ()


def fields_that_decide(settings: Any, *what: str) -> tuple[str, ...]:
    """Return the names of the fields, of a dataclass or of one of its instances, that decide any of `what`."""
    return tuple(entry.name for entry in dataclasses.fields(settings) if entry.metadata["decides"] & set(what))


def fields_of_kind(settings: Any, kind: Kind) -> tuple[str, ...]:
    """Return the names of the fields of a kind."""
    return tuple(entry.name for entry in dataclasses.fields(settings) if entry.metadata["kind"] == kind)


@functools.cache
def field_types(settings_class: type[Any]) -> dict[str, tuple[Any, ...]]:
    """Return the types each field accepts, as {"student_layers": (int, NoneType)}."""
    hints = typing.get_type_hints(settings_class)
    options = {name: typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,) for name, hint in hints.items()}
    return {name: tuple(typing.get_origin(option) or option for option in found) for name, found in options.items()}


def accepts(settings_class: type[Any], name: str, kind: type) -> bool:
    """Say whether a field takes values of a type."""
    # mypy takes an unknown class for one that may not be hashable.
    return kind in field_types(settings_class)[name]  # type: ignore[arg-type]


class HelpAsked(Exception):
    """The command line asks for help, which is the exception's text."""


class RaisingParser(argparse.ArgumentParser):
    """An argparse parser that raises its complaint, so it can be reported together with the others."""

    def error(self, message: str) -> NoReturn:
        """Raise the complaint, where argparse would print it and leave."""
        raise FlagErrors([message.removeprefix("argument ")])

    def print_help(self, file: Any = None) -> None:
        """Hand the help to whoever parses, who knows what to do when it cannot be printed."""
        raise HelpAsked(self.format_help().rstrip())


SHELLS = ("bash", "zsh")
# What a metavar says of the values, for a shell that completes them.
FILES, FOLDERS = ("FILE", "TABLE"), ("FOLDER", "DIR", "RUN", "MODEL")


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Add the flag that prints a shell's completion of all others, and stops."""
    parser.add_argument(
        "--print_completion",
        action=PrintCompletion,
        choices=SHELLS,
        default=argparse.SUPPRESS,
        help="print a script that lets a shell complete the flags of the installed command, and stop (needs shtab)",
    )


class PrintCompletion(argparse.Action):
    """Prints what completes a command's flags in a shell, made by shtab from its parser."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Print and leave, as --help does."""
        if find_package("shtab") is not None:
            parser.error("argument --print_completion: needs the package shtab; pip install shtab")
        import shtab

        for action in parser._actions:
            metavar = action.metavar if isinstance(action.metavar, str) else ""
            if metavar.startswith("{"):
                action.choices = metavar.strip("{}").split(",")
            elif metavar in FILES or metavar in FOLDERS:
                action.complete = shtab.FILE if metavar in FILES else shtab.DIRECTORY  # type: ignore[attr-defined]
        # The name that pip installs; a shell asks for completion by a command's first word.
        parser.prog = parser.prog.removesuffix(".py").replace("_", "-")
        script = shtab.complete(parser, values)
        if isinstance(parser, RaisingParser):
            raise HelpAsked(script)
        print(script)
        parser.exit()


def make_parser(settings_class: type[Any], groups: Sequence[str], **texts: str) -> RaisingParser:
    """Build the parser from a dataclass's fields; values stay text until `convert`.

    Args:
        groups: The order of the help's sections.
        texts: What argparse says around the flags: prog, usage, description, epilog.
    """
    parser = RaisingParser(
        **texts,  # type: ignore[arg-type]
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="take the flags of an earlier run's config.json; flags given beside it win"
    )
    add_completion(parser)
    sections = {title: parser.add_argument_group(title) for title in groups}
    for entry in dataclasses.fields(settings_class):
        sections[entry.metadata["group"]].add_argument(f"--{entry.name}", **flag_options(settings_class, entry))
    return parser


def flag_options(settings_class: type[Any], entry: dataclasses.Field[Any]) -> dict[str, Any]:
    """Return what argparse needs to know of a field's flag."""
    meta, default = entry.metadata, entry.default
    shown = {True: "on", False: "off"}[default] if isinstance(default, bool) else default
    help_text = meta["help"] if shown is None or shown == () else f"{meta['help']} (default: {shown})"
    options: dict[str, Any] = {"help": help_text.replace("%", "%%")}
    if isinstance(default, bool):
        return options | {"action": argparse.BooleanOptionalAction}
    if meta["choices"]:
        return options | {"metavar": "{" + ",".join(meta["choices"]) + "}"}
    takes = functools.partial(accepts, settings_class, entry.name)
    by_type = "N" if takes(int) else "X" if takes(float) else "TEXT"
    return options | {"metavar": meta["metavar"] or by_type} | ({"nargs": "+"} if takes(tuple) else {})


def parse_flags(
    settings_class: type[Settings],
    parser: RaisingParser,
    argv: Sequence[str],
    check: Callable[[Settings], Sequence[str]],
    other_keys: Collection[str] = (),
) -> tuple[Settings, frozenset[str]]:
    """Return the settings of a command line, and the fields that a flag or the --config file set.

    Args:
        check: Returns what is wrong with settings that could be read, as `--flag: what` lines.
        other_keys: Keys of a --config file that are no flags and are passed over.

    Raises:
        FlagErrors: every problem found, together.
        HelpAsked: for --help.
    """
    given, problems = read_flags(settings_class, parser, argv)
    values: dict[str, Any] = {}
    if (path := given.pop("config", None)) is not None:
        values, in_file = read_config_file(settings_class, Path(path), other_keys)
        problems += in_file
    for name, value in given.items():
        try:
            values[name] = convert(settings_class, name, value)
        except ValueError as error:
            problems.append(f"--{name}: {error}")
    settings = settings_class(**values)
    # A flag that could not be read holds its default here: what is wrong with that is not the user's doing.
    unread = tuple(problem.partition(":")[0] + ":" for problem in problems)
    problems += [problem for problem in check(settings) if not problem.startswith(unread)]
    if problems:
        raise FlagErrors(problems)
    return settings, frozenset(values)


def read_flags(settings_class: type[Any], parser: RaisingParser, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the flags' values, as text, and the problems; each flag is parsed on its own, so none hides another."""
    given: dict[str, Any] = {}
    problems: list[str] = []
    repeatable = {entry.name for entry in dataclasses.fields(settings_class) if entry.metadata["repeatable"]}
    for words in split_at_flags(argv):
        try:
            found, extra = parser.parse_known_args(words)
        except FlagErrors as error:
            problems += error.problems
            continue
        if not vars(found):
            problems.append(explain_unknown(settings_class, words[0]))
        elif extra:
            problems.append(f"{words[0].partition('=')[0]}: has no place for {quote_value(' '.join(extra))}")
        for name, value in vars(found).items():
            if name in repeatable:
                value = [*given.get(name, []), *value]
            elif isinstance(value, list) and name in given:
                problems.append(f"--{name}: is given twice; list its values after one --{name}")
            given[name] = value
    return given, problems


def split_at_flags(argv: Sequence[str]) -> Iterator[list[str]]:
    """Yield each flag together with its values."""
    starts = [position for position, word in enumerate(argv) if position == 0 or is_flag(word)]
    for start, end in itertools.pairwise([*starts, len(argv)]):
        words = list(argv[start:end])
        # Joined, since argparse takes a lone -1e-5 for a flag.
        yield ["=".join(words)] if len(words) == 2 and words[0].startswith("--") and "=" not in words[0] else words


def is_flag(word: str) -> bool:
    """Say whether a word of the command line is a flag's name."""
    return word.startswith("--") or word == "-h"


def explain_unknown(settings_class: type[Any], word: str) -> str:
    """Return the problem with a word that is no flag, with the nearest flag."""
    if not word.startswith("--"):
        return f"{quote_value(word)}: a value without a flag"
    from difflib import get_close_matches  # only a mistake pays for importing it

    flag = word.partition("=")[0]
    near = get_close_matches(flag, [f"--{entry.name}" for entry in dataclasses.fields(settings_class)], n=1)
    return f"{flag}: unknown flag; " + (f"did you mean {near[0]}?" if near else "--help lists them")


def read_config_file(settings_class: type[Any], path: Path, other_keys: Collection[str] = ()) -> tuple[dict[str, Any], list[str]]:
    """Read an earlier run's config.json into field values and the problems found in it."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}, [f"--config: no such file: {path}"]
    except OSError as error:
        return {}, [f"--config: {path} cannot be read: {error.strerror}"]
    except (ValueError, RecursionError) as error:
        return {}, [f"--config: {path} is not JSON: {first_line(error)}"]
    if not isinstance(loaded, dict):
        return {}, [f"--config: {path} holds no settings: expected an object with a key per flag"]
    values, problems = {}, []
    names = {entry.name for entry in dataclasses.fields(settings_class)}
    for name, value in loaded.items():
        if name in other_keys:
            continue
        if name not in names:
            problems.append(f"--config: {path} names an unknown flag {quote_value(name)}")
            continue
        try:
            values[name] = convert(settings_class, name, value)
        except ValueError as error:
            problems.append(f"--{name}: {error}, in {path}")
    return values, problems


def convert(settings_class: type[Any], name: str, value: Any) -> Any:
    """Turn a flag's text or a JSON value into the field's type; `~` in a path is the user's home.

    A field that takes one text or several holds a single one as it is.

    Raises:
        ValueError: what was expected and what came, without the flag's name.
    """
    takes = functools.partial(accepts, settings_class, name)
    if value is None and takes(type(None)):
        return None
    if takes(bool):
        if isinstance(value, bool):
            return value
        raise ValueError(f"must be true or false, got {quote_value(value)}")
    # A shell leaves the ~ of --output_dir=~/run as it is.
    is_path = settings_class.__dataclass_fields__[name].metadata["kind"] in PATHS
    if takes(tuple) and isinstance(value, list) and all(map(is_plain_text, value)):
        texts = tuple(os.path.expanduser(text) if is_path else text for text in value)
        return texts[0] if takes(str) and len(texts) == 1 else texts
    if takes(str):
        if is_plain_text(value):
            return os.path.expanduser(value) if is_path else value
        raise ValueError(f"must be a text that is not empty, got {quote_value(value)}")
    if takes(tuple):
        raise ValueError(f"must be a list of names, got {quote_value(value)}")
    return convert_number(value, int if takes(int) else float)


def is_plain_text(value: Any) -> bool:
    """Whether a value is a text that can name a file or a column."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell but nothing can write
        return False
    return True


def convert_number(value: Any, kind: type[int] | type[float]) -> int | float:
    """Return a finite number of the wanted kind, and no whole number that numpy could not hold."""
    word = "a whole number" if kind is int else "a number"
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError
        number = kind(value)
        if isinstance(value, float) and number != value:
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(f"must be {word}, got {quote_value(value)}") from None
    if not math.isfinite(number):
        raise ValueError(f"must be a finite number, got {quote_value(value)}")
    if kind is int and number > LARGEST_WHOLE_NUMBER:
        raise ValueError(f"must be at most {LARGEST_WHOLE_NUMBER}, got {quote_value(value)}")
    return number


def check_fields(settings: Any) -> list[str]:
    """Return what is wrong with single fields, by their choices and ranges, as `--flag: what` lines."""
    problems = []
    for entry in dataclasses.fields(settings):
        value, meta = getattr(settings, entry.name), entry.metadata
        if meta["choices"] and value not in meta["choices"]:
            problems.append(f"--{entry.name}: must be one of {', '.join(meta['choices'])}, got {quote_value(value)}")
        elif meta["check"] and value is not None and (problem := meta["check"](value)):
            problems.append(f"--{entry.name}: {problem}")
        elif meta["kind"] in PATHS and isinstance(value, tuple):
            repeated = sorted({path for path in value if value.count(path) > 1})
            problems += [f"--{entry.name}: {quote_value(path)} is given twice" for path in repeated]
            problems += [] if value else [f"--{entry.name}: names no {meta['kind']}; leave it out"]
    return problems


def find_missing(path: str, kind: Kind) -> str | None:
    """Say that a table or a model's folder is not there; None when it is, or may be the name of a model on the hub."""
    # os.path answers no for a path the system refuses, where pathlib raises.
    if kind == "table" and not os.path.isfile(path):
        if os.path.isdir(path) and any(Path(path).glob("*.parquet")):
            return None
        what = "is a folder without .parquet files" if os.path.isdir(path) else "no such file"
        return f"{what}: {quote_value(path)}. Give a .csv, .tsv or .jsonl table."
    if kind == "model" and path.startswith((".", "/", "~")) and not os.path.isdir(os.path.expanduser(path)):
        return f"no such folder: {quote_value(path)}"
    return _refuse_bytes(path) if kind == "model" else None


def find_obstacle(folder: Path) -> str | None:
    """Say why a folder cannot be made or written; None when it can."""
    if problem := _refuse_bytes(str(folder)):
        return problem
    for place in (folder, *folder.absolute().parents):
        try:
            mode = place.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            return f"{quote_value(str(place))} cannot be used: {error.strerror}"
        if not stat.S_ISDIR(mode):
            return f"{quote_value(str(place))} is a file, not a folder"
        return None if os.access(place, os.W_OK | os.X_OK) else f"{quote_value(str(place))} is not writable"
    return f"{quote_value(str(folder))} has no folder above it"


def _refuse_bytes(path: str) -> str | None:
    """Say that the libraries which read and write models cannot spell a path."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return f"{quote_value(path)} holds bytes that are no UTF-8"
    return None


def format_value(value: Any) -> str:
    """Return a flag's value as a text: on or off, lists by spaces, nothing for an unset one."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    if isinstance(value, float):
        return str(value).removesuffix(".0")
    return "" if value is None else str(value)


def parse_value(settings_class: type[Any], name: str, text: str) -> Any:
    """Turn what `format_value` wrote back into the field's value.

    Raises:
        ValueError: what was expected and what came, without the flag's name.
    """
    if accepts(settings_class, name, bool):
        if text not in ("on", "off"):
            raise ValueError(f"must be on or off, got {quote_value(text)}")
        return text == "on"
    return convert(settings_class, name, text.split() if accepts(settings_class, name, tuple) else text)


def parse_grid(settings_class: type[Any], flag: str, entries: Sequence[str], forbid: Callable[[str], str | None]) -> Grid:
    """Return {field: values} of `FIELD=V1,V2` entries of a flag; a `;` anywhere separates values that hold commas.

    Args:
        forbid: Says why a field may not be in the grid, None for one that may.

    Raises:
        FlagErrors: every problem in them.
    """
    fields = {entry.name for entry in dataclasses.fields(settings_class)}
    values: Grid = {}
    problems = []
    for entry in entries:
        name, separator, text = entry.partition("=")
        name = name.removeprefix("--")
        if not separator or name not in fields:
            problems.append(f"--{flag}: {quote_value(entry)} is not FLAG=V1,V2 with a flag that --help lists")
        elif why := forbid(name):
            problems.append(f"--{flag}: {quote_value(entry)} {why}")
        elif name in values:
            problems.append(f"--{flag}: {quote_value(entry)} is given twice")
        else:
            try:
                parts = text.split(";" if ";" in text else ",")
                values[name] = tuple(dict.fromkeys(parse_value(settings_class, name, part) for part in parts))
            except ValueError as error:
                problems.append(f"--{flag}: {name} {error}")
    if problems:
        raise FlagErrors(problems)
    return values


def write_flags(values: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line that sets these fields; an unset one needs none."""
    words: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list | tuple):
            words += [f"--{name}", *value]
        elif is_flag(text := format_value(value)):
            words.append(f"--{name}={text}")
        elif value is not None:
            words += [f"--{name}", text]
    return words
