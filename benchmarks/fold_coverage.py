"""Measure whether intervals of cross-validated scores, over seeds, rows and trainings, keep what they promise.

    python benchmarks/fold_coverage.py        # 300 simulations each of one and of three seeds, on real texts

A simulation draws texts of a real table, cross-validates three recipes on them with several seeds, and hands the
predictions to the code that research_compare.py uses. The recipes are small enough to be trained thousands of times:
logistic regression on the leading components of character n-grams,

- control: half the components, from the labels;
- distilled: the same model from the labels and a teacher (all components), which is one for all seeds of a fold;
- twin: the same again from another teacher, so that its true difference to `distilled` is zero, while each fold's
  teacher has its own luck, which more seeds of the student do not average out.

Seeds and teachers differ by the resample of the training rows that each learns from. The truth is a recipe's mean score
over all simulations, each on other texts of the table than those drawn, so it speaks for other training rows too.
Counted is how often the nominal 95 % interval holds it:

- here: that of research/evaluation/inference.py, over seeds, rows and the folds' trainings;
- seeds and rows: the same without the term of the folds;
- every fold a seed: each fold's score of each seed taken as one of K times S seeds, with the correction of Nadeau & Bengio,
  as before version 0.2.

The last line is JSON; of n simulations 95 % has a standard error of sqrt(0.95 * 0.05 / n): 1.3 % for 300.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from research.evaluation.bootstrap import Metric, bootstrap, build_metric, score_texts, take_answers
from research.evaluation.folds import build_fold_metrics, gather_folds, stack_seeds
from research.evaluation.inference import Scored, difference, estimate
from research.evaluation.thresholds import choose_thresholds
from research.names import METRIC_OF

METRICS = ("f1_macro", "f1_macro_tuned", "average_precision_macro")
RECIPES = ("control", "distilled", "twin")
CASES = {"score": ("distilled",), "difference": ("distilled", "control"), "no difference": ("twin", "distilled")}
WAYS = ("here", "seeds and rows", "every fold a seed")
SEEDS = (1, 3)
DATASET = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "bn_cyberbully5.csv"
COMPONENTS, ALPHA, PENALTY, STEPS = 192, 0.7, 20.0, 40


@dataclass(frozen=True)
class Table:
    """The distinct texts of a table as features (N, COMPONENTS + 1) and labels (N, C)."""

    features: np.ndarray
    labels: np.ndarray


def read_table(path: Path) -> Table:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(rows[0])
    texts, first = np.unique([row[names[-6]] for row in rows], return_index=True)
    labels = np.array([[float(rows[place][name]) for name in names[-5:]] for place in first])
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), min_df=3, max_features=20_000, sublinear_tf=True)
    features = TruncatedSVD(COMPONENTS, random_state=0).fit_transform(vectorizer.fit_transform(texts))
    features = np.hstack([features / features.std(axis=0), np.ones((len(features), 1))])
    return Table(features.astype(np.float32), labels)


def fit_logistic(features: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return (D, C) weights of ridge logistic regression on targets from 0 to 1 (Nesterov steps, Hessian bound of Böhning)."""
    ridge = PENALTY * np.eye(features.shape[1], dtype=np.float32)
    inverse = np.linalg.inv(0.25 * (features * weights[:, None]).T @ features + ridge).astype(np.float32)
    found = ahead = np.zeros((features.shape[1], targets.shape[1]), np.float32)
    for step in range(STEPS):
        gradient = features.T @ (weights[:, None] * (expit(features @ ahead) - targets)) + PENALTY * ahead
        moved = ahead - inverse @ gradient
        ahead, found = moved + step / (step + 3) * (moved - found), moved
    return found


def simulate(table: Table, seeds: int, texts: int, folds: int, resamples: int, rng: np.random.Generator) -> dict[str, Any]:
    """Return {metric: {recipe: (its Scored, its true score)}} of one drawn table."""
    order = rng.permutation(len(table.labels))
    drawn, others = order[:texts], order[texts : texts + 1500]
    parts: dict[str, list[list[tuple[Any, ...]]]] = {recipe: [[] for _ in range(seeds)] for recipe in RECIPES}
    truth: dict[str, list[dict[str, float]]] = {recipe: [] for recipe in RECIPES}
    half = np.r_[0 : COMPONENTS // 2, COMPONENTS]
    for fold in range(folds):
        rest = drawn[np.arange(texts) % folds != fold]
        validation, train = rest[: len(rest) // 9], rest[len(rest) // 9 :]
        hard = table.labels[train].astype(np.float32)
        targets = {"control": hard}
        for recipe in ("distilled", "twin"):
            teacher = fit_logistic(table.features[train], hard, rng.poisson(1, len(train)).astype(np.float32))
            targets[recipe] = ALPHA * expit(table.features[train] @ teacher) + (1 - ALPHA) * hard
        test = np.flatnonzero(np.arange(texts) % folds == fold)
        for recipe in RECIPES:
            for seed in range(seeds):
                weights = rng.poisson(1, len(train)).astype(np.float32)
                model = fit_logistic(table.features[np.ix_(train, half)], targets[recipe], weights)
                probs = [expit(table.features[np.ix_(rows, half)] @ model) for rows in (validation, drawn[test], others)]
                cuts = choose_thresholds(table.labels[validation], probs[0])
                parts[recipe][seed].append((table.labels[drawn[test]], probs[1], cuts, test))
                truth[recipe].append(true_scores(table.labels[others], probs[2], cuts))
    return score_recipes(parts, truth, texts, resamples, int(rng.integers(2**31)))


def true_scores(labels: np.ndarray, probs: np.ndarray, cuts: np.ndarray) -> dict[str, float]:
    built = [build_metric(metric, labels, probs, cuts if METRIC_OF[metric].tuned else None) for metric in METRICS]
    return dict(zip(METRICS, score_texts(built, len(labels)).tolist(), strict=True))


def score_recipes(
    parts: dict[str, list[list[tuple[Any, ...]]]], truth: dict[str, list[dict[str, float]]], texts: int, resamples: int, seed: int
) -> dict[str, Any]:
    built: list[Metric] = []
    places = {}
    for metric in METRICS:
        for recipe, of_seeds in parts.items():
            for number, folds in enumerate(of_seeds):
                answers = [
                    take_answers(labels, probs, cuts if METRIC_OF[metric].tuned else None, rows, texts)
                    for labels, probs, cuts, rows in folds
                ]
                metrics = build_fold_metrics(metric, answers)
                places[metric, recipe, number] = slice(len(built), len(built) + len(metrics))
                built += metrics
    plain, resampled = score_texts(built, texts), bootstrap(built, texts, resamples, seed)
    return {
        metric: {
            recipe: (
                stack_seeds(
                    [
                        gather_folds(plain[place], resampled[place], len(parts[recipe][0]))
                        for number in range(len(parts[recipe]))
                        for place in [places[metric, recipe, number]]
                    ]
                ),
                float(np.mean([scores[metric] for scores in truth[recipe]])),
            )
            for recipe in RECIPES
        }
        for metric in METRICS
    }


def intervals(scored: Scored, texts: int, *, is_score: bool) -> dict[str, tuple[float, float]]:
    """Return the interval of each of WAYS."""
    overlap = 1 / (len(scored.folds) - 1)
    every = Scored(
        np.concatenate([fold.plain for fold in scored.folds]), np.concatenate([fold.resampled for fold in scored.folds])
    )
    measure = estimate if is_score else lambda found, *rest: difference([found], *rest)
    found = (measure(scored, texts, overlap), measure(replace(scored, folds=()), texts), measure(every, texts, overlap))
    return {way: (interval.low, interval.high) for way, interval in zip(WAYS, found, strict=True)}


def measure(table: Table, seeds: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the coverage of each metric and case."""
    sizes, numbers = (seeds, arguments.texts, arguments.folds, arguments.resamples), range(arguments.simulations)
    runs = [simulate(table, *sizes, np.random.default_rng([arguments.seed, seeds, number])) for number in numbers]
    results = []
    for metric in METRICS:
        truths = {recipe: float(np.mean([run[metric][recipe][1] for run in runs])) for recipe in RECIPES}
        for case, recipes in CASES.items():
            truth = truths[recipes[0]] - (truths[recipes[1]] if len(recipes) > 1 else 0.0)
            truth = 0.0 if case == "no difference" else truth
            sides = [[run[metric][recipe][0] for recipe in recipes] for run in runs]
            scored = [pair[0] - pair[1] if len(pair) > 1 else pair[0] for pair in sides]
            found = [intervals(entry, arguments.texts, is_score=case == "score") for entry in scored]
            held = {way: np.mean([low <= truth <= high for low, high in (entry[way] for entry in found)]) for way in WAYS}
            width = {way: np.median([high - low for low, high in (entry[way] for entry in found)]) for way in WAYS}
            results.append(
                {
                    "seeds": seeds,
                    "metric": metric,
                    "case": case,
                    "truth": round(truth, 4),
                    "bias": round(float(np.mean([entry.mean for entry in scored])) - truth, 4),
                    "coverage": {way: round(100 * float(held[way]), 1) for way in WAYS},
                    "width": {way: round(float(width[way]), 4) for way in WAYS},
                }
            )
    return results


def format_table(results: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table: coverage in % and median width of each way."""
    lines = [f"| S | metric | of | truth | {' | '.join(WAYS)} |", "| ---: | --- | --- | ---: |" + " ---: |" * len(WAYS)]
    for result in results:
        cells = [f"{result['coverage'][way]:.1f} ({result['width'][way]:.3f})" for way in WAYS]
        lines.append(
            f"| {result['seeds']} | {result['metric']} | {result['case']} | {result['truth']:+.4f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=300, help="simulations of each number of seeds (default: 300)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="numbers of seeds (default: 1 3)")
    parser.add_argument("--texts", type=int, default=1000, help="texts of the table that is cross-validated (default: 1000)")
    parser.add_argument("--folds", type=int, default=5, help="folds (default: 5)")
    parser.add_argument("--resamples", type=int, default=300, help="bootstrap resamples (default: 300)")
    parser.add_argument("--dataset", type=Path, default=DATASET, help="table that texts are drawn from")
    parser.add_argument("--seed", type=int, default=0, help="seed of the simulations (default: 0)")
    arguments = parser.parse_args(argv)
    start, processor = time.perf_counter(), time.process_time()
    table, results = read_table(arguments.dataset), []
    for seeds in arguments.seeds:
        results += measure(table, seeds, arguments)
        print(f"{seeds} seeds: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print(format_table(results))
    print(
        json.dumps(
            {
                "benchmark": "fold_coverage",
                **{name: value for name, value in vars(arguments).items() if name != "dataset"},
                "results": results,
                "wall_s": round(time.perf_counter() - start, 1),
                "processor_s": round(time.process_time() - processor, 1),
                "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
