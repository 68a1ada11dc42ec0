"""A run's tables, read and split and told of before torch is imported, which takes longer than all of that."""

from __future__ import annotations

import dataclasses
import functools
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from research.errors import InputError
from research.experiment.announce import describe_comments, describe_parts, warn_of_columns
from research.experiment.near_texts import leave_out_near_texts
from research.experiment.teacher_table import TeacherTable, read_teacher_table
from research.flags import fields_of_kind
from research.names import PARTS
from research.storage.arrays import return_free_memory
from research.text.tables import list_files
from research_config import PIPELINES, ExperimentConfig, has_layers, settings_that_decide, table_paths
from research_data import Comments, Split, load_comments, split_comments

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Dataset:
    """The rows of a run and the parts they are in; the config names the columns that were found."""

    config: ExperimentConfig
    comments: Comments
    split: Split
    teacher_table: TeacherTable | None = None


def load_dataset(config: ExperimentConfig, fold: int | None = None) -> Dataset:
    """Read and split the tables and say what they hold.

    A worker of a sweep keeps the last ones while their files stay as they are.

    Raises:
        InputError: any problem in them, or in a flag that names labels.
    """
    settings, stamps = keep_data_settings(config), stamp_tables(config)
    comments = _read_tables(settings, stamps)
    config = dataclasses.replace(config, text_column=comments.text_column, label_columns=comments.label_names)
    unknown = sorted(set(config.label_alpha_map) - set(comments.label_names))
    if unknown:
        raise InputError(f"--label_alphas: no label '{unknown[0]}'; the labels are {', '.join(comments.label_names)}")
    if not fold:  # every fold has the same rows
        for line in describe_comments(comments):
            log.info("%s", line)
        if warning := warn_of_columns(comments):
            log.warning("warning: %s", warning)
    split = _split_tables(settings, fold, stamps)
    for line in describe_parts(comments, split):
        log.info("%s", line)
    if config.teacher_probs_path is None or not PIPELINES[config.pipeline].teacher:
        return Dataset(config, comments, split)
    table = _match_table(settings, stamps)
    for line in table.describe(split):
        log.info("%s", line)
    if not fold and (warning := table.warn()):
        log.warning("warning: %s", warning)
    check_table_speaks(table, config, split)
    return Dataset(config, comments, split, table)


def check_table_speaks(table: TeacherTable, config: ExperimentConfig, split: Split) -> None:
    """Refuse a table that is the only teacher and says nothing of the rows that it would be needed for.

    Raises:
        InputError: it speaks of no row to learn from, or of too few to be scored by itself.
    """
    if has_layers(config) or config.teacher_tfidf:
        return
    beside = "Give a table of more texts, or a teacher beside it (--teacher_checkpoint or --teacher_seeds)."
    if PIPELINES[config.pipeline].student:
        learned = np.concatenate([split.train, split.unlabelled])
        if not table.count_covered(learned):
            raise InputError(
                f"--teacher_probs_path: {table.path} has no probabilities of any of the {len(learned):,} rows to learn from. "
                f"{beside}"
            )
        return
    for part in PARTS:
        if not table.is_complete(rows := getattr(split, part)):
            raise InputError(
                f"--teacher_probs_path: --pipeline {config.pipeline} scores the teacher, and {table.path} lacks probabilities of "
                f"some of the {len(rows):,} {part} rows. {beside}"
            )


def keep_data_settings(config: ExperimentConfig) -> ExperimentConfig:
    """Return a config that names the same tables and splits them alike, and is the default in all else."""
    tables = {name: getattr(config, name) for name in fields_of_kind(config, "table")}
    return type(config)(**tables, **settings_that_decide(config, "data"))


def stamp_tables(config: ExperimentConfig) -> tuple[Any, ...]:
    """Return what changes with any table's files: their times and sizes, None for a table that is not there."""
    stats = [file.stat() if file.is_file() else None for path in table_paths(config).values() for file in list_files(path)]
    return tuple(None if stat is None else (stat.st_mtime_ns, stat.st_size) for stat in stats)


@functools.lru_cache(maxsize=1)
def _read_tables(config: ExperimentConfig, _stamps: tuple[Any, ...]) -> Comments:
    return load_comments(
        config.dataset_path,
        text_column=config.text_column,
        label_columns=config.label_columns,
        label_list_column=config.label_list_column,
        label_separator=config.label_separator,
        val_path=config.val_path,
        test_path=config.test_path,
        unlabelled_path=config.unlabelled_path,
        text_normalization=config.text_normalization,
    )


@functools.lru_cache(maxsize=1)
def _match_table(config: ExperimentConfig, stamps: tuple[Any, ...]) -> TeacherTable:
    assert config.teacher_probs_path is not None
    return read_teacher_table(config.teacher_probs_path, _read_tables(config, stamps))


@functools.lru_cache(maxsize=1)
def _split_tables(config: ExperimentConfig, fold: int | None, stamps: tuple[Any, ...]) -> Split:
    split = split_comments(
        _read_tables(config, stamps),
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        seed=config.split_seed,
        data_fraction=config.data_fraction,
        fold=fold,
        num_folds=config.num_folds,
    )
    split = leave_out_near_texts(_read_tables(config, stamps), split)
    return_free_memory()  # of splitting, which takes twice what stays
    return split
