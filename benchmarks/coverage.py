"""Measure whether the intervals and tests of research.evaluation.bootstrap keep what they promise.

    python benchmarks/coverage.py                    # 1,000 simulations a setting
    python benchmarks/coverage.py --simulations 100  # short form

Two models score the same simulated rows. A label is there with its prevalence; a score is normal noise, in
part shared by both models as the difficulty of a row is, plus a shift where the label is there. The scores
of all rows in the world follow in closed form (macro-F1) or by integration (average precision), so the true
difference is known. Counted is how often the 95 % interval of the difference holds it, the 95 % interval of
the score holds the score, and how often, with four equal models against a baseline, Holm's correction lets
at least one difference pass at 5 %. The last line is JSON; 95 % of 1,000 has a standard error of 0.7 %.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from research.evaluation import bootstrap as statistics

PREVALENCE = np.array([0.3, 0.2, 0.1, 0.05, 0.03])
DECISION = 1.5  # the score from which a label is called, probability 0.5
SHIFT = 2.0
NUM_EQUAL_MODELS = 4
LEVEL = 0.05


@dataclass(frozen=True)
class Setting:
    """One simulated comparison; `shared` is the share of the noise's variance that both models have in common."""

    metric: str
    num_rows: int
    shift_gain: float
    shared: float


SETTINGS = (
    Setting("f1_macro", 1000, 0.3, 0.3),
    Setting("f1_macro", 1000, 0.3, 0.9),
    Setting("f1_macro", 1000, 0.0, 0.9),
    Setting("f1_macro", 1000, 0.0, 0.99),  # models that hardly differ: few rows carry the difference
    Setting("f1_macro", 250, 0.3, 0.9),
    Setting("average_precision_macro", 1000, 0.3, 0.9),
)


def true_score(metric: str, shift: float) -> float:
    """Return the score over infinitely many rows."""
    normal = NormalDist()
    if metric == "f1_macro":
        hit_rate, alarm_rate = 1 - normal.cdf(DECISION - shift), 1 - normal.cdf(DECISION)
        called = PREVALENCE * hit_rate + (1 - PREVALENCE) * alarm_rate
        return float(np.mean(2 * PREVALENCE * hit_rate / (PREVALENCE + called)))
    cuts = np.linspace(12, -12, 20_001)
    recall = 1 - np.array([normal.cdf(cut - shift) for cut in cuts])
    false_rate = 1 - np.array([normal.cdf(cut) for cut in cuts])
    hits = PREVALENCE[:, None] * recall  # (C, cuts)
    precision = hits / np.maximum(hits + (1 - PREVALENCE[:, None]) * false_rate, 1e-300)
    middle = (precision[:, 1:] + precision[:, :-1]) / 2
    return float(np.mean((np.diff(recall) * middle).sum(axis=1)))


def simulate_rows(rng: np.random.Generator, setting: Setting, shifts: Sequence[float]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Draw labels (N, C) and one probability array (N, C) per shift."""
    shape = (setting.num_rows, len(PREVALENCE))
    labels = (rng.random(shape) < PREVALENCE).astype(np.float64)
    common = math.sqrt(setting.shared) * rng.standard_normal(shape)
    own = math.sqrt(1 - setting.shared)
    scores = [common + own * rng.standard_normal(shape) + shift * labels for shift in shifts]
    return labels, [1 / (1 + np.exp(DECISION - score)) for score in scores]


def measure_coverage(setting: Setting, simulations: int, resamples: int, seed: int) -> dict[str, float]:
    """Return the shares of simulations whose intervals hold the true difference and the true score."""
    baseline_score = true_score(setting.metric, SHIFT)
    score = true_score(setting.metric, SHIFT + setting.shift_gain)
    covered_difference = covered_score = 0
    for number in range(simulations):
        rng = np.random.default_rng([seed, number])
        labels, (baseline, probs) = simulate_rows(rng, setting, [SHIFT, SHIFT + setting.shift_gain])
        estimate, _, difference = statistics.compare_predictions(
            labels, probs, baseline, setting.metric, resamples=resamples, seed=number
        )
        covered_difference += difference.low <= score - baseline_score <= difference.high
        covered_score += estimate.low <= score <= estimate.high
    return {
        "true_difference": round(score - baseline_score, 4),
        "difference_coverage": covered_difference / simulations,
        "score_coverage": covered_score / simulations,
    }


def measure_false_claims(setting: Setting, simulations: int, resamples: int, seed: int) -> float:
    """Return the share of simulations in which a corrected p value calls one of several equal models better."""
    claims = 0
    for number in range(simulations):
        rng = np.random.default_rng([seed, number])
        labels, probs = simulate_rows(rng, setting, [SHIFT] * (1 + NUM_EQUAL_MODELS))
        metrics = [statistics.build_metric(setting.metric, labels, of_model) for of_model in probs]
        plain = statistics.score_rows(metrics, len(labels)).tolist()
        replicates = statistics.bootstrap(metrics, len(labels), resamples, seed=number)
        p_values = [
            statistics.paired_difference(value, resampled, plain[0], replicates[0]).p_value
            for value, resampled in zip(plain[1:], replicates[1:], strict=True)
        ]
        claims += min(statistics.holm(p_values)) < LEVEL
    return claims / simulations


def run(simulations: int, resamples: int, seed: int, settings: Sequence[Setting] = SETTINGS) -> dict[str, Any]:
    """Simulate every setting; returns what the JSON line holds."""
    start = time.perf_counter()
    coverage = [{**vars(setting), **measure_coverage(setting, simulations, resamples, seed)} for setting in settings]
    claims = {
        f"shared_{shared}": measure_false_claims(Setting("f1_macro", 1000, 0.0, shared), simulations, resamples, seed)
        for shared in (0.3, 0.9, 0.99)
    }
    return {
        "benchmark": "coverage",
        "simulations": simulations,
        "resamples": resamples,
        "coverage": coverage,
        "false_claims_after_holm": claims,
        "wall_s": round(time.perf_counter() - start, 1),
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=1000, help="simulations of each setting (default: 1000)")
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap resamples (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the simulations (default: 0)")
    arguments = parser.parse_args(argv)
    print(json.dumps(run(arguments.simulations, arguments.resamples, arguments.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
