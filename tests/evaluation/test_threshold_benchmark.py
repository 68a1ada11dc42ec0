"""benchmarks/thresholds.py on run directories: every rule for every model of every split, and one JSON line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from support.comparison_runs import write_scored_run
from support.scripts import load_benchmark

from research.evaluation.thresholds import THRESHOLD_RULES
from research.runs.run import load_run


@pytest.fixture(scope="module")
def thresholds() -> ModuleType:
    return load_benchmark("thresholds")


def test_the_rule_of_a_run_gives_the_score_in_its_metrics(
    thresholds: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_scored_run(tmp_path / name) for name in ("one", "two")]
    for run in runs:  # whose validation part is its test part
        shutil.copy(run / "predictions.csv", run / "validation_predictions.csv")
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "config.json").write_text('{"pipeline": "kd_only"}', encoding="utf-8")  # unfinished
    assert thresholds.main([str(tmp_path)]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert sorted(result["splits"]) == sorted(map(str, runs))
    models = load_run(runs[0]).models
    assert set(result["results"]) == {*models, "all models"}
    assert len(table) == 2 + (len(models) + 1) * (1 + len(THRESHOLD_RULES))
    for model in models:
        stored = load_run(runs[0]).metrics[model]["test"]["tuned"]["f1_macro"]
        assert result["results"][model]["best_f1"]["splits"] == pytest.approx([stored] * 2, abs=1e-4)
    means = [result["results"][model]["half_f1"]["mean"] for model in models]
    assert result["results"]["all models"]["half_f1"]["mean"] == pytest.approx(np.mean(means), abs=1e-4)


def test_an_interval_is_student_s_t_over_the_splits(thresholds: ModuleType) -> None:
    found = thresholds.summarize({"best_f1": [0.5, 0.6, 0.7], "half_f1": [0.51, 0.63, 0.72]})["half_f1"]
    differences = np.array([0.01, 0.03, 0.02])
    reach = 4.302653 * differences.std(ddof=1) / np.sqrt(3)
    assert found["difference"] == pytest.approx(0.02)
    assert found["interval"] == pytest.approx([0.02 - reach, 0.02 + reach], abs=1e-4)
