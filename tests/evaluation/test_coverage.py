"""benchmarks/coverage.py on run directories: what it draws, and that it prints its table and one JSON line."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from support.builders import ROOT
from support.comparison_runs import make_truth, write_run


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    """The script, which is part of no package."""
    spec = importlib.util.spec_from_file_location("benchmark_coverage", ROOT / "benchmarks" / "coverage.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Two recipes of four seeds each; every second row repeats the text of the one before."""
    truth = make_truth(200)
    clusters = np.arange(200) // 2 * 2
    for pipeline, skill in (("student_only", 2.0), ("kd_only", 3.0)):
        for seed in range(4):
            run = tmp_path / f"{pipeline}_{seed}"
            write_run(run, skill, truth, clusters=clusters, seed=seed, noise_seed=seed, pipeline=pipeline)
    return [str(tmp_path)]


def test_a_drawn_text_brings_all_its_rows_and_the_truth_is_the_pool_s(coverage: ModuleType, runs: list[str]) -> None:
    population = coverage.read_population(runs)
    assert len(population.texts) == 100 and all(len(rows) == 2 for rows in population.texts)
    assert [len(pool) for pool in population.probs] == [4, 4]
    better, worse = (population.true_scores(recipe)["f1_macro"] for recipe in (1, 0))
    assert better > worse
    scores, _ = coverage.draw_scores(population, [0, 1], 3, 60, 20, np.random.default_rng(0))
    assert scores["f1_macro"][0].plain.shape == (3,) and scores["f1_macro"][1].resampled.shape == (3, 20)


def test_rows_with_a_rarer_label_are_drawn_less_often(coverage: ModuleType) -> None:
    labels = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    chances = coverage.rarity_chances(labels, [np.array([0]), np.array([1]), np.array([2])], 0.25)
    assert chances.tolist() == pytest.approx([4 / 9, 1 / 9, 4 / 9])


def test_it_prints_a_table_and_one_json_line(coverage: ModuleType, runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert coverage.main([*runs, "--simulations", "4", "--resamples", "40", "--texts", "50"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert len(table) == 2 + len(result["results"]) * 3 == 2 + 2 * 3 * 3
    for entry in result["results"]:
        assert all(0 <= share <= 1 for share in entry["false_claims"].values())
