"""The flag that searches for the settings of a training: which it may name, and the trials they make."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from research.errors import FlagErrors
from research.flags import Grid, fields_that_decide, parse_grid, setting
from research.names import BOTH_MODELS

# What validation may choose: the settings of a training that are not its kind, nor what it is judged by.
SEARCHED = (
    "lr",
    "static_lr",
    "epochs",
    "teacher_epochs",
    "early_stopping_patience",
    "batch",
    "gradient_accumulation",
    "weight_decay",
    "warmup_ratio",
    "dropout",
    "gradient_clip_norm",
    "ema_decay",
)


@dataclass(frozen=True)
class SearchSettings:
    """The grid of a search."""

    search: tuple[str, ...] = setting(
        (),
        "training",
        "train teacher, student and control with every combination of these values, as in lr=5e-5,1e-4 epochs=6,12, and keep "
        "of each model the training that is best on validation by --select_by",
        metavar="FLAG=V1,V2",
        decides=BOTH_MODELS,
        repeatable=True,
        keyed_at_default=False,
    )


def parse_search(config: Any) -> Grid:
    """Return {flag: values} of --search.

    Raises:
        FlagErrors: every problem in them.
    """

    def forbid(name: str) -> str | None:
        return None if name in SEARCHED else f"is no setting that validation may choose; these are: {', '.join(SEARCHED)}"

    return parse_grid(type(config), "search", config.search, forbid)


def smallest_batch(config: Any) -> int:
    """Return the fewest rows that a batch of any training of a run has."""
    return int(min(parse_search(config).get("batch", (config.batch,))))


def list_trials(config: Any, model: str) -> list[dict[str, Any]]:
    """Return the settings of each trial of --search for a model, in their order; {} is the config as it is.

    Args:
        model: "teacher", or "student", whose trials are the control's as well.
    """
    # A static student has a learning rate of its own.
    other_rate = "lr" if model == "student" and config.student_kind == "static" else "static_lr"
    own = set(fields_that_decide(config, model)) - {other_rate}
    grid = {name: values for name, values in parse_search(config).items() if name in own}
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def settle_search(config: Any, model: str) -> Any:
    """Return the config by which a model is trained where it has one trial only, else the config as it is.

    Args:
        model: As in `list_trials`.
    """
    trials = list_trials(config, model)
    return dataclasses.replace(config, search=(), **trials[0]) if len(trials) == 1 else config


def check_search(config: Any, trained: Collection[str], check: Callable[[Any], list[str]]) -> list[str]:
    """Return the problems of --search: of its values, and flags that no training of the run reads.

    Args:
        trained: Which of "teacher" and "student" the run trains.
        check: Returns the problems of a config without a search.
    """
    try:
        grid = parse_search(config)
    except FlagErrors as error:
        return list(error.problems)
    trials = [settings for model in trained for settings in list_trials(config, model) if settings]
    read = {name for settings in trials for name in settings}
    # Each run of a sweep is asked for itself, since the sweep may choose what it trains.
    unread = [] if config.sweep else [name for name in grid if name not in read]
    problems = [f"--search: no training of this run reads --{name}" for name in unread]
    swept = {entry.partition("=")[0].removeprefix("--") for entry in config.sweep}
    problems += [f"--search: {name} is swept as well; leave it to one of --search and --sweep" for name in grid if name in swept]
    known = set(check(dataclasses.replace(config, search=())))
    for settings in trials:
        tried = dataclasses.replace(config, search=(), **settings)
        problems += [f"--search: {problem}" for problem in check(tried) if problem not in known]
    return list(dict.fromkeys(problems))
