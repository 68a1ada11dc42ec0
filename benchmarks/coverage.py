"""Measure whether intervals over seeds and rows, and claims after Holm's correction, keep what they promise.

    python benchmarks/coverage.py                                # predictions made here, in a minute, of real texts
    python benchmarks/coverage.py results/methods results/control   # those of your own runs, grouped by seed

A recipe is a pool of trained models that differ only by seed. Its true score is the mean over the pool of the score
on all test rows. A simulation draws S models and as many texts as a small test part has, both with replacement, and
hands them to the code that research_compare.py uses; so the truth is known, while labels, texts, their repetitions
and the models' mistakes are real. Counted is

- how often the 95 % interval of a difference holds the true one, for two recipes and for one recipe against itself;
  beside it what the project did before: the interval over rows alone, and Student's t over the seeds alone;
- how often, of three rows of the baseline's own recipe in three metrics, any is claimed after Holm's correction;
- how often the sentence of --with_control calls two students of one seed each better or worse that are alike on all
  rows (each is a half of a pair that is swapped text by text).

Without run directories a model is logistic regression on character n-grams, each seed on its own resample of the
training rows, of the second recipe with half as many of them. `--rare` keeps a share of the rows that carry a rarer label, so
that every label but the most frequent one has few positives. The last line is JSON; of n simulations, 95 % has a
standard error of sqrt(0.95 * 0.05 / n): 1.0 % for 500.
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
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from research.compare.rows import Row, gather_rows
from research.compare.scores import find_runs
from research.evaluation.bootstrap import bootstrap, build_metric, score_texts
from research.evaluation.calibration import sigmoid
from research.evaluation.gain import describe_gain, measure_gain
from research.evaluation.inference import Scored, difference, holm
from research.evaluation.thresholds import choose_thresholds
from research.names import METRIC_OF

METRICS = ("f1_macro", "f1_macro_tuned", "average_precision_macro")
SEEDS = (3, 5, 10)
EQUAL_ROWS = 3  # rows of the baseline's own recipe whose differences are tested together
LEVEL = 0.05
DATASET = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "bn_cyberbully5.csv"
POOL = 24
ENOUGH_SEEDS = 8


@dataclass(frozen=True)
class Population:
    """All test rows with the predictions of two recipes: labels (N, C), and per recipe and seed probabilities and cuts.

    `texts` lists the rows of each text, `chances` how likely each text is drawn.
    """

    labels: np.ndarray
    texts: list[np.ndarray]
    chances: np.ndarray
    probs: tuple[list[np.ndarray], list[np.ndarray]]
    cuts: tuple[list[np.ndarray], list[np.ndarray]]

    def true_scores(self, recipe: int) -> dict[str, float]:
        """Return a recipe's mean score over its pool on all rows, weighted as they are drawn."""
        text_of_row = np.empty(len(self.labels), np.int64)
        for place, rows in enumerate(self.texts):
            text_of_row[rows] = place
        weights = self.chances[:, None] / self.chances.max()
        scores: dict[str, list[float]] = {metric: [] for metric in METRICS}
        for probs, cuts in zip(self.probs[recipe], self.cuts[recipe], strict=True):
            for metric in METRICS:
                built = build_metric(metric, self.labels, probs, cuts_of(metric, cuts), text_of_row)
                scores[metric].append(float(built(weights)[0]))
        return {metric: float(np.mean(values)) for metric, values in scores.items()}


def cuts_of(metric: str, tuned: np.ndarray) -> np.ndarray | None:
    return tuned if METRIC_OF[metric].tuned else None


def group_rows(clusters: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(clusters, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(clusters[order])) + 1)


def rarity_chances(labels: np.ndarray, texts: list[np.ndarray], share: float) -> np.ndarray:
    """Return each text's chance to be drawn: `share` of the usual one if it carries any but the most frequent label."""
    frequent = int(np.nanargmax(np.nanmean(labels, axis=0)))
    others = np.delete(labels, frequent, axis=1)
    carries = np.array([bool((others[rows] == 1).any()) for rows in texts])
    chances = np.where(carries, share, 1.0)
    return chances / chances.sum()


def make_population(dataset: Path, pool: int, seed: int) -> Population:
    """Train `pool` models of each recipe on resampled training rows and let them answer for the other half."""
    import csv

    from sklearn.feature_extraction.text import TfidfVectorizer

    with dataset.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(rows[0])[-5:]
    text = np.array([row[list(rows[0])[-6]] for row in rows])
    labels = np.array([[float(row[name]) for name in names] for row in rows])
    rng = np.random.default_rng(seed)
    _, cluster = np.unique(text, return_inverse=True)
    part = rng.choice(3, size=cluster.max() + 1, p=[0.5, 0.1, 0.4])[cluster]  # train, validation, test: by text
    train, validation, test = (np.flatnonzero(part == place) for place in range(3))
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), min_df=3, max_features=20_000, sublinear_tf=True)
    features = vectorizer.fit(text[train]).transform(text)
    probs: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    cuts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for recipe, size in enumerate((len(train), len(train) // 2)):
        for number in range(pool):
            logits = train_model(features, labels, train, size, np.random.default_rng([seed, recipe, number]))
            probs[recipe].append(sigmoid(logits[test]))
            cuts[recipe].append(choose_thresholds(labels[validation], sigmoid(logits[validation])))
    texts = group_rows(cluster[test])
    return Population(labels[test], texts, np.full(len(texts), 1 / len(texts)), probs, cuts)


def train_model(features: Any, labels: np.ndarray, train: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return the float32 logits (N, C) of one seed: logistic regression on `size` drawn training rows."""
    from sklearn.linear_model import SGDClassifier

    drawn = rng.choice(train, size=size)
    columns = []
    for column in range(labels.shape[1]):
        model = SGDClassifier(
            loss="log_loss", alpha=2e-5, max_iter=8, tol=None, average=True, random_state=int(rng.integers(2**31))
        )
        columns.append(model.fit(features[drawn], labels[drawn, column]).decision_function(features))
    return np.stack(columns, axis=1).astype(np.float32)


def read_population(paths: Sequence[str]) -> Population:
    """Take the first two rows that comparing these runs by seed would show as the two recipes."""
    finished, _ = find_runs(paths)
    rows, _ = gather_rows(finished, None, "test", None, "seed")
    if len(rows) < 2:
        raise SystemExit(f"{' '.join(paths)}: one recipe only; give runs of two, several seeds each")
    for row in rows[:2]:
        if len(row.members) < ENOUGH_SEEDS:
            print(
                f"{row.name}: {len(row.members)} seeds; drawn with replacement, under {ENOUGH_SEEDS} are a caricature "
                "of a recipe, and coverage suffers from that too",
                file=sys.stderr,
            )
    first = rows[0].members[0].predictions
    texts = group_rows(first.text_cluster)
    pairs = [pool_of(row) for row in rows[:2]]
    probs, cuts = (pairs[0][0], pairs[1][0]), (pairs[0][1], pairs[1][1])
    return Population(first.labels, texts, np.full(len(texts), 1 / len(texts)), probs, cuts)


def pool_of(row: Row) -> tuple[list[np.ndarray], list[np.ndarray]]:
    cuts = [
        np.array([member.run.metrics["thresholds"][member.model][name] for name in member.predictions.label_names])
        for member in row.members
    ]
    return [member.probs for member in row.members], cuts


def draw_scores(
    population: Population, recipes: Sequence[int], seeds: int, num_texts: int, resamples: int, rng: np.random.Generator
) -> tuple[dict[str, list[Scored]], int]:
    """Draw texts and, for each group, `seeds` models of a recipe; returns each group's scores by metric."""
    drawn = rng.choice(len(population.texts), size=num_texts, p=population.chances)
    rows = np.concatenate([population.texts[text] for text in drawn])
    text_of_row = np.repeat(np.arange(num_texts), [len(population.texts[text]) for text in drawn])
    models = [(recipe, number) for recipe in recipes for number in rng.integers(len(population.probs[recipe]), size=seeds)]
    built = [
        build_metric(
            metric,
            population.labels[rows],
            population.probs[recipe][number][rows],
            cuts_of(metric, population.cuts[recipe][number]),
            text_of_row,
            num_texts,
        )
        for metric in METRICS
        for recipe, number in models
    ]
    plain = score_texts(built, num_texts).reshape(len(METRICS), len(recipes), seeds)
    resampled = bootstrap(built, num_texts, resamples, int(rng.integers(2**31)))
    resampled = resampled.reshape(len(METRICS), len(recipes), seeds, resamples)
    scores = {
        metric: [Scored(plain[place, group], resampled[place, group]) for group in range(len(recipes))]
        for place, metric in enumerate(METRICS)
    }
    return scores, num_texts


def judge(gap: Scored, truth: float, num_texts: int) -> dict[str, bool]:
    """Say which of the three intervals hold the true difference."""
    from scipy.special import stdtrit

    both = difference([gap], num_texts)
    rows = difference([gap.pooled], num_texts)
    seeds = len(gap.plain)
    reach = float(stdtrit(seeds - 1, 0.975)) * gap.plain.std(ddof=1) / math.sqrt(seeds)
    return {
        "seeds and rows": both.low <= truth <= both.high,
        "rows alone": rows.low <= truth <= rows.high,
        "seeds alone": abs(gap.mean - truth) <= reach,
    }


def measure(population: Population, seeds: int, simulations: int, num_texts: int, resamples: int, seed: int) -> dict[str, Any]:
    """Return the shares of simulations: intervals that hold the truth by metric, and those with any false claim."""
    truths = [population.true_scores(recipe) for recipe in (0, 1)]
    recipes = [0] * (1 + EQUAL_ROWS) + [1]
    held: dict[str, dict[str, list[dict[str, bool]]]] = {metric: {"zero": [], "not zero": []} for metric in METRICS}
    claims = {name: 0 for name in ("seeds and rows", "rows alone")}
    for number in range(simulations):
        scores, _ = draw_scores(population, recipes, seeds, num_texts, resamples, np.random.default_rng([seed, seeds, number]))
        for metric, groups in scores.items():
            gap = truths[1][metric] - truths[0][metric]
            held[metric]["zero"].append(judge(groups[1] - groups[0], 0.0, num_texts))
            held[metric]["not zero"].append(judge(groups[-1] - groups[0], gap, num_texts))
        gaps = [groups[place] - groups[0] for groups in scores.values() for place in range(1, 1 + EQUAL_ROWS)]
        claims["seeds and rows"] += min(holm([difference([gap], num_texts).p_value for gap in gaps])) < LEVEL
        claims["rows alone"] += min(holm([difference([gap.pooled], num_texts).p_value for gap in gaps])) < LEVEL
    coverage = {
        metric: {
            case: {way: round(float(np.mean([found[way] for found in outcomes])), 3) for way in outcomes[0]}
            for case, outcomes in cases.items()
        }
        for metric, cases in held.items()
    }
    return {
        "seeds": seeds,
        "coverage": coverage,
        "false_claims": {way: round(count / simulations, 3) for way, count in claims.items()},
        "true_difference": {metric: round(truths[1][metric] - truths[0][metric], 4) for metric in METRICS},
    }


def measure_one_seed(population: Population, simulations: int, num_texts: int, resamples: int, seed: int) -> float:
    """Return how often the sentence on a control claims a difference between two models that are alike.

    Two models of one recipe whose answers are swapped text by text, by a coin, have equal scores over all rows.
    """
    claims = 0
    for number in range(simulations):
        rng = np.random.default_rng([seed, 1, number])
        first, second = rng.choice(len(population.probs[0]), size=2, replace=False)
        drawn = rng.choice(len(population.texts), size=num_texts, p=population.chances)
        rows = np.concatenate([population.texts[text] for text in drawn])
        text_of_row = np.repeat(np.arange(num_texts), [len(population.texts[text]) for text in drawn])
        heads = (rng.random(num_texts) < 0.5)[text_of_row][:, None]
        answers = [population.probs[0][model][rows] for model in (first, second)]
        swapped = {"student": np.where(heads, *answers), "control": np.where(heads, *reversed(answers)), "teacher": answers[0]}
        cuts = population.cuts[0][first]
        built = [
            build_metric(metric, population.labels[rows], probs, cuts_of(metric, cuts), text_of_row, num_texts)
            for metric in METRICS
            for probs in swapped.values()
        ]
        plain, resampled = score_texts(built, num_texts), bootstrap(built, num_texts, resamples, number)
        scored = [Scored(plain[place : place + 1], resampled[place : place + 1]) for place in range(len(built))]
        scores = {metric: dict(zip(swapped, scored[3 * place :], strict=False)) for place, metric in enumerate(METRICS)}
        claims += "no measurable difference" not in describe_gain(measure_gain(scores, num_texts))
    return round(claims / simulations, 3)


def format_table(results: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table: a line per population, number of seeds and metric."""
    ways = ("seeds and rows", "rows alone", "seeds alone")
    columns = [f"{way}, {case}" for case in ("true 0", "true not 0") for way in ways]
    lines = [
        f"| labels | S | metric | true difference | {' | '.join(columns)} |",
        "| --- | ---: | --- | ---: |" + " ---: |" * 6,
    ]
    for result in results:
        for metric in METRICS:
            cells = [f"{100 * result['coverage'][metric][case][way]:.1f}" for case in ("zero", "not zero") for way in ways]
            gap = f"{result['true_difference'][metric]:+.4f}"
            lines.append(f"| {result['labels']} | {result['seeds']} | {metric} | {gap} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="DIR", help="run directories of two recipes, several seeds each")
    parser.add_argument("--simulations", type=int, default=500, help="simulations of each setting (default: 500)")
    parser.add_argument("--resamples", type=int, default=300, help="bootstrap resamples (default: 300)")
    parser.add_argument("--texts", type=int, default=1000, help="texts drawn for a test part (default: 1000)")
    parser.add_argument("--rare", type=float, default=0.25, help="share kept of rows with a rarer label (default: 0.25)")
    parser.add_argument("--pool", type=int, default=POOL, help=f"models of each recipe trained here (default: {POOL})")
    parser.add_argument("--dataset", type=Path, default=DATASET, help="table that they are trained on")
    parser.add_argument("--seed", type=int, default=0, help="seed of the simulations (default: 0)")
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    usual = (
        read_population(arguments.runs) if arguments.runs else make_population(arguments.dataset, arguments.pool, arguments.seed)
    )
    rare = Population(
        usual.labels, usual.texts, rarity_chances(usual.labels, usual.texts, arguments.rare), usual.probs, usual.cuts
    )
    print(f"predictions after {time.perf_counter() - start:.0f} s", file=sys.stderr)
    results, one_seed = [], {}
    for name, population in (("as they are", usual), ("rare", rare)):
        for seeds in SEEDS:
            sizes = (arguments.simulations, arguments.texts, arguments.resamples, arguments.seed)
            results.append({"labels": name, **measure(population, seeds, *sizes)})
            print(f"labels {name}, {seeds} seeds: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        one_seed[name] = measure_one_seed(population, *sizes)
    print(format_table(results))
    print(
        json.dumps(
            {
                "benchmark": "coverage",
                **{name: value for name, value in vars(arguments).items() if name != "dataset"},
                "results": results,
                "false_claims_of_one_seed": one_seed,
                "wall_s": round(time.perf_counter() - start, 1),
                "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
