"""A sweep's worker keeps the tables of its last run while nothing that decides them changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from support.builders import make_table

from research.experiment.inputs import keep_data_settings, load_data
from research.flags import setting
from research_config import ExperimentConfig


@pytest.fixture
def config(tmp_path: Path) -> ExperimentConfig:
    return ExperimentConfig(dataset_path=str(make_table(tmp_path / "comments.csv", rows=60)))


def test_tables_are_kept_until_what_decides_them_changes(config: ExperimentConfig, tmp_path: Path) -> None:
    comments, split = load_data(config, None)
    again, _ = load_data(dataclasses.replace(config, kd_alpha=0.1, max_length=16, teacher_path="other"), None)
    assert again is comments
    _, other = load_data(dataclasses.replace(config, split_seed=1), None)
    assert other.test.tolist() != split.test.tolist()
    further = make_table(tmp_path / "further.csv", rows=20)
    with_further, _ = load_data(dataclasses.replace(config, unlabelled_path=str(further)), None)
    assert len(with_further) > len(comments)


def test_field_that_decides_the_data_is_part_of_what_tables_are_kept_by() -> None:
    def extend(decides: str) -> Any:
        field = ("added", int, setting(0, "data", "a flag that a test adds", decides=decides))
        return dataclasses.make_dataclass("Extended", [field], bases=(ExperimentConfig,), frozen=True)

    for decides, kept_apart in (("data", True), ("student", False)):
        kind = extend(decides)
        assert (keep_data_settings(kind()) != keep_data_settings(kind(added=1))) is kept_apart
