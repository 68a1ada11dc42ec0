"""Runs found below the given folders and put into the rows of a comparison (no torch)."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from research.errors import InputError
from research.flags import fields_that_decide
from research.runs.directory import RunDirectory, is_fold
from research.runs.formats import dig, read_json
from research.runs.run import Predictions, Run, load_run
from research_config import ExperimentConfig, saved_settings, unused_fields

FloatArray = npt.NDArray[np.floating[Any]]
Key = tuple[int | None, int | None]  # seed and fold: what pairs a member of one row with a member of another
MAX_SEARCH_DEPTH = 4
MAX_NAMED_RUNS = 5
SEED_IN_NAME = re.compile(r"(?:^|[\W_]+)(?:seed|s)[\W_]*\d+(?![^\W_])")
FLAGS = tuple(entry.name for entry in dataclasses.fields(ExperimentConfig))
MACHINE_FLAGS = frozenset(fields_that_decide(ExperimentConfig, "machine", "place"))


@dataclass(frozen=True)
class Member:
    """One model's predictions on one test part: those of a run, or of one fold of it."""

    run: Run
    owner: Path
    key: Key
    model: str
    predictions: Predictions

    @property
    def probs(self) -> FloatArray:
        """The (N, C) probabilities of the member's own model."""
        return self.predictions.probs[self.model]

    @property
    def data(self) -> Mapping[str, Any]:
        """Hashes of the data, empty for a run that recorded none."""
        found = dig(self.run.environment, "data") if self.run.has("environment.json") else None
        return found if isinstance(found, Mapping) else {}


Folds = tuple[Member, ...]  # those of one seed, which together answer for every row


@dataclass(frozen=True)
class Row:
    """What one line of the table stands for: a run, a run's folds, or runs that differ only by seed."""

    name: str
    settings: dict[str, Any]
    members: tuple[Member, ...]

    @property
    def config(self) -> dict[str, Any]:
        """The flags of the run that the row stands for."""
        return self.members[0].run.config

    @property
    def has_one_answer(self) -> bool:
        """Whether no seed would change the row, as of a pipeline that reads none: it goes with every seed of another row."""
        return len(self.seeds) == 1 and "seed" in unused_fields(str(self.config.get("pipeline")))

    @property
    def seeds(self) -> dict[int | None, Folds]:
        """The members of each seed: one of a single split, or one per fold in the folds' order."""
        found: dict[int | None, list[Member]] = {}
        for member in sorted(self.members, key=lambda member: member.key[1] or 0):
            found.setdefault(member.key[0], []).append(member)
        # Seeds keep the order in which they were given.
        return {seed: tuple(found[seed]) for seed in dict.fromkeys(member.key[0] for member in self.members)}


def find_runs(paths: Iterable[str | Path]) -> tuple[list[Path], list[Path]]:
    """Return the finished and the unfinished run directories at or below `paths`, each once.

    Raises:
        InputError: a path does not exist or holds no run.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise InputError(f"{path}: no such directory. Name run directories, or a folder of them.")
        runs = list(_walk_runs(path, MAX_SEARCH_DEPTH))
        if not runs:
            raise InputError(f"{path} is no run directory and holds none (a run has a config.json with a pipeline).")
        for run in runs:
            found.setdefault(run.resolve(), run)
    finished: list[Path] = []
    unfinished: list[Path] = []
    for run in found.values():
        (finished if RunDirectory(run).status() == "finished" else unfinished).append(run)
    return finished, unfinished


def _walk_runs(path: Path, depth: int) -> Iterable[Path]:
    """Yield `path` if it is a run, else the runs below it; what is inside a run belongs to it."""
    if RunDirectory(path).status() in ("finished", "unfinished"):
        yield path
    elif depth:
        for child in sorted(path.iterdir(), key=_natural_order):
            if child.is_dir() and not child.name.startswith("."):
                yield from _walk_runs(child, depth - 1)


def _natural_order(path: Path) -> list[tuple[int, float, str]]:
    """Sort alpha_2 before alpha_10."""
    pieces = re.findall(r"\d+|\D+", path.name)
    return [(0, float(piece), "") if piece.isdecimal() else (1, 0.0, piece) for piece in pieces]


def load_members(paths: Iterable[Path], part: str, model: str | None, group_by: str | None) -> list[Member]:
    """Read the runs' predictions of a part; a cross-validated run gives a member per fold."""
    members: dict[Path, Member] = {}
    for path in paths:
        run = load_run(path)
        for fold in run.folds:
            fold = dataclasses.replace(fold, config=complete(fold.config))
            owner, number = path, None
            if run.num_folds > 1 or (group_by == "fold" and is_fold(path)):
                owner = path if run.num_folds > 1 else path.parent
                number = int(fold.path.name.removeprefix("fold_"))
            seed = fold.config.get("seed") if group_by == "seed" else None
            members.setdefault(fold.path.resolve(), _load_member(fold, owner, (seed, number), part, model))
    if group_by == "fold" and all(member.key[1] is None for member in members.values()):
        raise InputError("--group_by fold: none of the runs has folds (--num_folds 2 or more, or DIR/fold_1 ...).")
    return list(members.values())


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of a config.json, with those that the run's version did not have at their defaults.

    A new flag's default is what was done before there was one, so runs of two versions differ by what was asked for alone.
    """
    return saved_settings(ExperimentConfig()) | dict(config)


def _load_member(run: Run, owner: Path, key: Key, part: str, model: str | None) -> Member:
    predictions = run.predictions if part == "test" else run.validation_predictions
    if not len(predictions.index):
        raise InputError(f"{run.path}: its {part} part has no rows, so there is nothing to compare.")
    name = model or ("student" if "student" in predictions.probs else next(iter(predictions.probs), ""))
    if name not in predictions.probs:
        present = ", ".join(predictions.probs) or "no model"
        raise InputError(f"{run.path} has no predictions of the {model or 'student'}; found {present}. Set --model.")
    if np.isnan(predictions.probs[name]).any():
        raise InputError(f"{run.path}: the {name} has empty probabilities. Repeat the run with --overwrite.")
    return Member(run, owner, key, name, predictions)


def build_rows(members: Sequence[Member], group_by: str | None) -> list[Row]:
    """Gather members into rows in the order given.

    Raises:
        InputError: two runs of one group have the same seed, so that one run would count twice.
    """
    names = sorted({name for member in members for name in member.run.config})
    groups: dict[str, list[Member]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for member in members:
        shared = _row_settings(member, names, group_by)
        model = f"{member.model}, {_control_labels(member.run.config)} labels" if member.model == "control" else member.model
        identity = json.dumps([shared, model]) if group_by == "seed" else str(member.owner.resolve())
        groups.setdefault(identity, []).append(member)
        settings.setdefault(identity, shared)
    rows = [
        Row(_name_group(members), settings[identity], members)
        for identity, members in ((identity, _distinct(group)) for identity, group in groups.items())
    ]
    return _disambiguate(rows)


def _row_settings(member: Member, names: Iterable[str], group_by: str | None) -> dict[str, Any]:
    """Return the settings that the members of a row share: all but what tells the members apart."""
    settings = used_settings(member.run.config, names)
    if group_by == "seed":
        settings.pop("seed", None)
    if member.key[1] is not None:
        settings.pop("fold", None)
    return settings


def used_settings(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the flags of `names` that the run's pipeline reads; None where config.json lacks one.

    config.json holds every flag: a student_only run has a kd_alpha, which says nothing about it and must
    neither make a column nor hide a control.
    """
    unused = unused_fields(str(config.get("pipeline")))
    return {name: config.get(name) for name in names if name not in unused}


def _distinct(group: Sequence[Member]) -> tuple[Member, ...]:
    """Return the members of a row; a student beside which another run trained another control counts once."""
    seen: dict[Key, Member] = {}
    for member in group:
        earlier = seen.setdefault(member.key, member)
        if earlier is member or (earlier.run.config != member.run.config and np.array_equal(earlier.probs, member.probs)):
            continue
        raise InputError(
            f"{earlier.run.path} and {member.run.path} have the same flags and the same seed, so they would count "
            "as two seeds. Leave one out."
        )
    return tuple(seen.values())


def _name_group(group: Sequence[Member]) -> str:
    """Name a row by what its members' directories share beside the seed: `a_seed_1` and `a_seed_2` are `a`."""
    folders = [member.owner.absolute() for member in group]
    names = {folder.name for folder in folders}
    if len(names) == 1:
        return folders[0].name
    seedless = {SEED_IN_NAME.sub("", name).strip("_-. ") for name in names}
    if len(seedless) == 1:
        left = seedless.pop()
        # Nothing but seeds in a folder of their own: the folder's name says what they are.
        return f"{folders[0].parent.name} {left}".strip() if not left or left.startswith("(") else left
    shared = re.sub(r"[\W_]*(seed|s)?[\W_]*$", "", os.path.commonprefix(sorted(names)))
    return shared or f"{folders[0].name} and {len(group) - 1} more"


def _disambiguate(rows: list[Row]) -> list[Row]:
    """Name rows by as much of the end of their path as tells them apart, where two directories have the same name."""
    counts = Counter(row.name for row in rows)
    paths = {id(row): row.members[0].owner.parts for row in rows if counts[row.name] > 1}

    def shorten(parts: tuple[str, ...]) -> str:
        for length in range(1, len(parts)):
            if sum(other[-length:] == parts[-length:] for other in paths.values()) == 1:
                return str(Path(*parts[-length:]))
        return str(Path(*parts))

    return [dataclasses.replace(row, name=shorten(paths[id(row)])) if id(row) in paths else row for row in rows]


def differing_flags(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the flags with two values or more among the rows that use them, in the command line's order."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row.settings.items():
            values.setdefault(name, set()).add(json.dumps(value))
    order = {name: place for place, name in enumerate(FLAGS)}
    differing = [name for name, seen in values.items() if len(seen) > 1]
    return tuple(sorted(differing, key=lambda name: (order.get(name, len(order)), name)))


def control_key(config: Mapping[str, Any]) -> str:
    """Return what a run and its student_only control have in common: data, seed, student and training flags."""
    ignored = unused_fields("student_only") | MACHINE_FLAGS | {"pipeline", "fold"}
    return json.dumps({name: value for name, value in sorted(config.items()) if name not in ignored})


def find_sibling_controls(members: Sequence[Member]) -> list[Path]:
    """Return finished student_only runs beside the given ones that match one of them, one per match."""
    wanted = {control_key(member.run.config) for member in members}
    found: dict[str, Path] = {}
    for parent in dict.fromkeys(member.owner.resolve().parent for member in members):
        for path in sorted(parent.iterdir(), key=_natural_order):
            if path.is_dir() and RunDirectory(path).status() == "finished":
                config = complete(read_json(path / "config.json"))
                if config["pipeline"] == "student_only" and control_key(config) in wanted:
                    found.setdefault(control_key(config), _relative_to_here(path))
    return list(found.values())


def _relative_to_here(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def own_controls(members: Sequence[Member]) -> list[Member]:
    """Return the controls that --with_control trained beside the given students, one for each that differs.

    A control is what a student_only run of the same flags gives, so it joins the comparison as one; one that also
    learned from the teacher's decisions on unlabelled rows is named so.
    """
    found: dict[tuple[str, str, Key], Member] = {}
    for member in members:
        if member.model == "student" and "control" in member.predictions.probs:
            run = dataclasses.replace(member.run, config={**member.run.config, "pipeline": "student_only"})
            labels = _control_labels(member.run.config)
            owner = member.owner.with_name(f"{member.owner.name} (control{', pseudo-labels' if labels == 'pseudo' else ''})")
            control = dataclasses.replace(member, run=run, owner=owner, model="control")
            found.setdefault((control_key(run.config), labels, member.key), control)
    return list(found.values())


def _control_labels(config: Mapping[str, Any]) -> str:
    return str(config["control_labels"])


def best_control(rows: Sequence[Row]) -> Row | None:
    """Return the student_only row that is the control of the most other rows; None when it is of none."""
    keys = [control_key(member.run.config) for row in rows if not _is_control(row) for member in row.members]
    scored = []
    for row in filter(_is_control, rows):
        own = {control_key(member.run.config) for member in row.members}
        scored.append((sum(key in own for key in keys), row))
    matches, control = max(scored, key=lambda entry: entry[0], default=(0, None))
    return control if matches else None


def _is_control(row: Row) -> bool:
    return row.config.get("pipeline") == "student_only"


def gather_rows(
    paths: Sequence[Path], baseline: str | None, part: str, model: str | None, group_by: str | None
) -> tuple[list[Row], str]:
    """Return the rows, the baseline first, and a sentence that says which it is and why.

    Raises:
        InputError: the runs cannot be read or grouped, or `baseline` is not one finished row.
    """
    load = partial(load_members, part=part, model=model, group_by=group_by)
    if baseline is not None:
        finished, unfinished = find_runs([baseline])
        if unfinished:
            raise InputError(f"--baseline {baseline}: {unfinished[0]} is unfinished. Finish it or name another.")
        rows = build_rows(load([*finished, *paths]), group_by)
        wanted = {path.resolve() for path in finished}
        chosen = [row for row in rows if any(_belongs(member, wanted) for member in row.members)]
        if len(chosen) != 1:
            names = ", ".join(row.name for row in chosen[:MAX_NAMED_RUNS])
            raise InputError(f"--baseline {baseline}: holds {len(chosen)} rows ({names}); name one run, or group by seed.")
        return _first(rows, chosen[0]), f"baseline: {chosen[0].name} (--baseline)"
    members = load(paths)
    rows = build_rows(members, group_by)
    control = best_control(rows)
    if control is not None:
        return _first(rows, control), f"baseline: {control.name} (the student_only run with the same data, seed and student)"
    candidates = [member for member in members if member.run.config.get("pipeline") == "kd_only"]
    own = own_controls(candidates)
    if own:
        rows = build_rows([*own, *members], group_by)
        control = best_control(rows) or rows[0]
        return _first(rows, control), f"baseline: {control.name} (trained by --with_control beside its student)"
    beside = find_sibling_controls(candidates) if model in (None, "student") else []
    if beside:
        rows = build_rows([*load(beside), *members], group_by)
        control = best_control(rows) or rows[0]
        where = ", ".join(map(str, beside[:MAX_NAMED_RUNS]))
        return _first(rows, control), f"baseline: {control.name} (student_only found beside the runs: {where})"
    return rows, f"baseline: {rows[0].name} (the first row; no student_only run has the same data, seed and student)"


def _belongs(member: Member, paths: set[Path]) -> bool:
    return member.owner.resolve() in paths or member.run.path.resolve() in paths


def _first(rows: Sequence[Row], chosen: Row) -> list[Row]:
    return [chosen, *(row for row in rows if row is not chosen)]
