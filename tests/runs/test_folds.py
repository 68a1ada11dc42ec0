"""Runs over folds: mean and spread of their scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score
from support.comparison_runs import LABELS, make_truth, write_run
from support.small_runs import make_metrics

from research.runs.directory import RunDirectory
from research.runs.folds import aggregate_folds, pool_folds
from research.runs.run import load_run, result_line


def test_folds_give_mean_and_sample_deviation() -> None:
    total = aggregate_folds([make_metrics(student_f1=0.6), make_metrics(student_f1=0.8)])
    assert total["mean"]["student"]["test"]["at_0.5"]["f1_macro"] == pytest.approx(0.7)
    assert total["std"]["student"]["test"]["at_0.5"]["f1_macro"] == pytest.approx(np.std([0.6, 0.8], ddof=1))
    assert total["mean"]["student"]["test"]["tuned"]["per_label"]["bully"]["average_precision"] is None
    assert result_line("x", total) == "x  student test f1_macro=0.7000 ± 0.1414 (teacher 0.7345)"


def test_rows_of_all_folds_are_decided_at_the_thresholds_of_their_fold_and_label(tmp_path: Path) -> None:
    assert list(LABELS) != sorted(LABELS)  # as the keys of a file are
    decided, truths = [], []
    for number, cuts in enumerate(((0.2, 0.7, 0.4), (0.6, 0.3, 0.5))):
        truth = make_truth(seed=number)
        path = write_run(tmp_path / f"fold_{number + 1}", truth=truth, noise_seed=number)
        metrics = load_run(path).metrics | {"thresholds": {"student": dict(zip(LABELS, cuts, strict=True))}}
        RunDirectory(path).write_metrics(metrics)
        truths.append(truth)
        decided.append(load_run(path).predictions.probs["student"] >= np.array(cuts))
    pooled = pool_folds([load_run(tmp_path / f"fold_{number}") for number in (1, 2)])
    expected = f1_score(np.concatenate(truths), np.concatenate(decided), average="macro")
    assert pooled["scores"]["f1_macro_tuned"]["student"]["value"] == pytest.approx(expected, abs=1e-12)
