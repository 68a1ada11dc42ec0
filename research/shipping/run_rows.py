"""The rows of a finished run that an export of its models needs: training texts, and the test part."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from research.errors import FlagErrors, InputError
from research.experiment.dataset import load_dataset
from research.flags import read_config_file
from research.names import MODELS
from research.runs.directory import RunDirectory
from research.runs.formats import PREDICTION_FILES, read_json
from research.runs.run import Run, load_run
from research.text.tables import cleaned_rows, describe_delimiter, find_text_column, read_columns
from research_config import ExperimentConfig, table_paths

log = logging.getLogger(__name__)
CALIBRATION_TEXTS = 512


@dataclass(frozen=True)
class Rows:
    """Texts, normalised as the model's were.

    Attributes:
        calibration: Those that int8 scales are fixed by.
        checked: Those that the forms of a model are compared on.
        origin: What the calibration texts are, in words.
        scored: Whether the checked ones are the run's test part, in the order of predictions.csv.
    """

    calibration: list[str]
    checked: list[str]
    origin: str
    scored: bool


def find_model(run_path: str, model: str) -> tuple[Run, Path]:
    """Return a finished run of one split, and the folder of a model of it.

    Raises:
        InputError: there is no such run, it has folds, or no such model.
    """
    run = load_run(run_path)
    if "folds" in run.metrics:
        raise InputError(f"{run_path}: is cross-validated and has no model of its own. Give a fold, as {run.path / 'fold_1'}.")
    folder = run.path / model
    if not folder.is_dir():
        there = [name for name in MODELS if (run.path / name).is_dir()]
        raise InputError(f"--model: {run_path} has no {model}; there is {' and '.join(there) or 'none'}.")
    return run, folder


def read_rows_of_run(run: Run) -> Rows:
    """Read the run's own table, split as it was: a sample of its training texts, and its test part.

    Raises:
        InputError: a table is not where the run found it, or has changed.
    """
    stored = read_json(run.path / "config.json")
    settings, problems = read_config_file(ExperimentConfig, run.path / "config.json", ("fold",))
    if problems:
        raise FlagErrors(problems)
    config = ExperimentConfig(**settings)
    for path in table_paths(config).values():
        if not path.is_file():
            raise InputError(
                f"{path}: the table of {run.path} is not there. Run the command where the run was run, or give "
                "--calibration_path, another table of texts; the test part is not scored then."
            )
    dataset = load_dataset(config, fold=stored["fold"] - 1 if "fold" in stored else None)
    comments, split = dataset.comments, dataset.split
    RunDirectory(run.path).check_tables(comments.file_sha256, table_paths(config))
    place = dict(zip(comments.find_source_rows(split.test).tolist(), split.test.tolist(), strict=True))
    index = run.predictions.index.tolist()
    if missing := [number for number in index if number not in place]:
        raise InputError(f"{run.path / PREDICTION_FILES['test']}: row {missing[0]} is not in the test part. Repeat the run.")
    test = [place[number] for number in index]
    size = min(CALIBRATION_TEXTS, len(split.train))
    sample = np.random.default_rng(0).choice(split.train, size=size, replace=False).tolist()
    texts = comments.read_texts(np.array([*test, *sample]))
    return Rows([texts[row] for row in sorted(sample)], [texts[row] for row in test], "of the run's training part", True)


def read_other_rows(path: str, text_column: str | None, normalization: str) -> Rows:
    """Read a sample of another table, for calibrating and checking alike.

    Raises:
        InputError: it cannot be read, or holds no text.
    """
    table = Path(path)
    column = find_text_column(table, read_columns(table), text_column)
    texts = [text for _, _, text in cleaned_rows(table, column, normalization) if text]
    if (delimiter := describe_delimiter(table)) is not None:
        log.info("%s: %s", path, delimiter)
    if not texts:
        raise InputError(f"{path}: every text in {column!r} is empty.")
    chosen = np.random.default_rng(0).permutation(len(texts))[: 2 * CALIBRATION_TEXTS]
    sample = [texts[row] for row in sorted(chosen.tolist())]
    return Rows(sample[::2], sample[1::2] or sample, f"of {path}", False)
