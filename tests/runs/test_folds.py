"""Runs over folds: mean and spread of their scores."""

from __future__ import annotations

import numpy as np
import pytest
from support.small_runs import make_metrics

from research.runs.folds import aggregate_folds
from research.runs.run import result_line


def test_folds_give_mean_and_sample_deviation() -> None:
    total = aggregate_folds([make_metrics(student_f1=0.6), make_metrics(student_f1=0.8)])
    assert total["mean"]["student"]["test"]["at_0.5"]["f1_macro"] == pytest.approx(0.7)
    assert total["std"]["student"]["test"]["at_0.5"]["f1_macro"] == pytest.approx(np.std([0.6, 0.8], ddof=1))
    assert total["mean"]["student"]["test"]["tuned"]["per_label"]["bully"]["average_precision"] is None
    assert result_line("x", total) == "x  student test f1_macro=0.7000 ± 0.1414 (teacher 0.7345)"
