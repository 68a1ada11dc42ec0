"""--search: a model is trained with every combination of some settings, and validation chooses.

The teacher, the student and the control each have their own trials over the same grid, so that none is better searched than
the others. No trial sees a test row: only the chosen model is asked about them.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from research.errors import TrainingFault
from research.experiment.context import RunContext
from research.flags import accepts, format_value
from research.names import METRIC_OF
from research.settings.search import list_trials
from research_config import ExperimentConfig

log = logging.getLogger(__name__)
Model = TypeVar("Model")
# More of these takes longer and is hardly worse, so only their largest value is an edge.
LENGTHS = ("epochs", "teacher_epochs", "early_stopping_patience")


@dataclass(frozen=True)
class Trial(Generic[Model]):
    """A trained model and what is told of its training.

    Attributes:
        score: On validation, by --select_by.
        facts: As `summarize` returns them, after a search with those of all trials as "trials".
        settings: What --search chose for it.
    """

    model: Model
    score: float
    facts: dict[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)


def search(name: str, context: RunContext, try_out: Callable[[RunContext], Trial[Model]]) -> Trial[Model]:
    """Return the trial that is best on validation, the first of equal ones.

    Args:
        name: "teacher", "student" or "control".
        try_out: Trains a model in the context of one trial.

    Raises:
        TrainingFault, FloatingPointError: of the only trial, or of the first when all have failed; or memory ran out, which
            says nothing of the settings but of what else is on the machine, and which other processes do not know of.
    """
    config = context.inputs.config
    if not config.search:
        return try_out(context)
    trials = list_trials(config, "teacher" if name == "teacher" else "student")
    if trials == [{}]:  # of a search that is for others
        return try_out(in_trial(context, {}))
    best: Trial[Model] | None = None
    chosen = -1
    faults: list[Exception] = []
    told: list[dict[str, Any]] = []
    for number, settings in enumerate(trials):
        log.info("%s: trial %d of %d: %s", name, number + 1, len(trials), write_settings(settings))
        try:
            trial = try_out(in_trial(context, settings, f"trial_{number + 1}"))
        except (TrainingFault, FloatingPointError) as fault:
            if fault.__cause__ is not None:  # a lack of memory, see `explaining_failures`
                raise
            log.warning("warning: %s: trial %d failed: %s", name, number + 1, fault)
            faults.append(fault.with_traceback(None))  # whose frames would keep the trial's model in memory
            told.append({"settings": settings, "failed": True})
            continue
        told.append({"settings": settings, "validation": trial.score, **trial.facts})
        if best is None or rank(trial.score) > rank(best.score):
            best, chosen = trial, number  # the others' models are not needed any more
    if best is None:
        raise faults[0]
    told[chosen]["chosen"] = True
    short, place = METRIC_OF[config.select_by].short, f"{name}: trial {chosen + 1} of {len(trials)}"
    if math.isnan(best.score):
        log.warning(
            "warning: %s is taken, but not for its score: validation has no %s. Choose another --select_by.", place, short
        )
    else:
        log.info("%s is best, validation %s %.4f", place, short, best.score)
        for line in describe_edges(name, trials[chosen], trials):
            log.warning("warning: %s", line)
    return dataclasses.replace(best, facts=best.facts | {"trials": told}, settings=trials[chosen])


def in_trial(context: RunContext, settings: Mapping[str, Any], trial: str = "") -> RunContext:
    """Return the context of a run of these settings that searches for nothing."""
    config = dataclasses.replace(context.inputs.config, search=(), **settings)
    return dataclasses.replace(context, inputs=dataclasses.replace(context.inputs, config=config), trial=trial)


def rank(score: float) -> float:
    """Return what orders scores; one that cannot be computed is below all others."""
    return -math.inf if math.isnan(score) else score


def write_settings(settings: Mapping[str, Any]) -> str:
    """Return settings as flags, as in --lr 0.0001 --epochs 6."""
    return " ".join(f"--{name} {format_value(value)}" for name, value in settings.items())


def describe_edges(name: str, chosen: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say which chosen settings are the largest or smallest of several, where the flag takes some beyond."""
    lines = []
    for flag, value in chosen.items():
        tried = {settings[flag] for settings in trials}
        ends = {max(tried): "largest"} if flag in LENGTHS else {min(tried): "smallest", max(tried): "largest"}
        if len(tried) > 1 and value in ends and takes_beyond(flag, value, ends[value]):
            shown = f"--{flag} {format_value(value)}"
            lines.append(f"{name}: {shown} is the {ends[value]} that was tried, so a better one may lie beyond it")
    return lines


def takes_beyond(flag: str, value: float, end: str) -> bool:
    """Return whether a flag takes a value smaller than a "smallest", or larger than a "largest"."""
    sign = 1 if end == "largest" else -1
    check = ExperimentConfig.__dataclass_fields__[flag].metadata["check"]
    beyond = value + sign if accepts(ExperimentConfig, flag, int) else math.nextafter(value, sign * math.inf)
    return check(beyond) is None
