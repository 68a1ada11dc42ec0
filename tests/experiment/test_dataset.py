"""A sweep's worker keeps the tables of its last run while nothing that decides them changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from support.builders import make_table

from research.experiment.dataset import keep_data_settings, load_dataset
from research.flags import setting
from research.text.near_duplicates import reduce_to_letters
from research_config import ExperimentConfig


@pytest.fixture
def config(tmp_path: Path) -> ExperimentConfig:
    return ExperimentConfig(dataset_path=str(make_table(tmp_path / "comments.csv", rows=60)))


def test_tables_are_kept_until_what_decides_them_changes(config: ExperimentConfig, tmp_path: Path) -> None:
    first = load_dataset(config)
    again = load_dataset(dataclasses.replace(config, kd_alpha=0.1, max_length=16, teacher_path="other"))
    assert again.comments is first.comments and again.split is first.split
    other = load_dataset(dataclasses.replace(config, split_seed=1))
    assert other.split.test.tolist() != first.split.test.tolist()
    further = make_table(tmp_path / "further.csv", rows=20)
    assert len(load_dataset(dataclasses.replace(config, unlabelled_path=str(further))).comments) > len(first.comments)


def test_folds_read_the_tables_once_and_tell_of_them_once(config: ExperimentConfig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    folds = [load_dataset(dataclasses.replace(config, num_folds=3), fold) for fold in range(3)]
    assert folds[0].comments is folds[2].comments
    assert len({tuple(fold.split.test) for fold in folds}) == 3
    assert sum("comments.csv" in line for line in caplog.messages) == 1
    assert sum(line.startswith("rows (distinct texts)") for line in caplog.messages) == 3


def test_field_that_decides_the_data_is_part_of_what_tables_are_kept_by() -> None:
    def extend(decides: str) -> Any:
        field = ("added", int, setting(0, "data", "a flag that a test adds", decides=decides))
        return dataclasses.make_dataclass("Extended", [field], bases=(ExperimentConfig,), frozen=True)

    for decides, kept_apart in (("data", True), ("student", False)):
        kind = extend(decides)
        assert (keep_data_settings(kind()) != keep_data_settings(kind(added=1))) is kept_apart


def test_unlabelled_texts_that_nearly_equal_a_held_out_one_are_left_out_and_those_of_training_are_counted(
    config: ExperimentConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    table = Path(config.dataset_path)
    header, *lines = table.read_text(encoding="utf-8").splitlines()
    again = [line.replace(",", " !!,", 1) for line in lines]  # other texts, of the same letters
    table.write_text("\n".join([header, *lines, *again]) + "\n", encoding="utf-8")
    plain = load_dataset(config)
    texts = list(plain.comments.iter_texts())
    held = [texts[row].rsplit(" ", 1)[0] for row in (plain.split.test[0], plain.split.validation[0])]
    further = [
        write_rows(tmp_path / "a.csv", [f"{held[0]}!! 😂", "একদম অন্য কথা"]),
        write_rows(tmp_path / "b.csv", [held[1], "আর কিছু"]),
    ]
    split = load_dataset(dataclasses.replace(config, unlabelled_path=tuple(map(str, further)))).split
    assert split.unlabelled.tolist() == [121, 123]
    assert split.near_duplicates["unlabelled"] == 2
    assert split.train.tolist() == plain.split.train.tolist()
    letters = {row: reduce_to_letters(text) for row, text in enumerate(texts)}
    same = sum(letters[row] in {letters[other] for other in plain.split.test.tolist()} for row in plain.split.train.tolist())
    assert plain.split.near_duplicates["train"] >= same > 0
    assert "left out, since their texts nearly equal one that is held out: 2 of unlabelled" in caplog.messages
    assert f"kept, though their texts nearly equal one of test: {split.near_duplicates['train']} of train" in caplog.messages
    assert f"unlabelled rows used of each table: {further[0]} 1 of 2, {further[1]} 1 of 2" in caplog.messages


def write_rows(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(["text", *texts]), encoding="utf-8")
    return path
