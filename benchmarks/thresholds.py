"""Compare the rules of --threshold_rule on the predictions of finished runs: tuned macro-F1 on the test part.

    python benchmarks/thresholds.py results/folds        # a run, its folds, or a folder of them; nothing is trained

For each part that was split off as a test (a fold, or a run of its own) and each model, every rule chooses its
thresholds on that run's validation predictions and is scored on its test predictions. The interval of a rule is
Student's t over the mean differences from best_f1, one a split: a split's models are scored on the same rows, so
"all models" averages them first. Folds share most of their training rows, so the interval is a little too narrow.
Unfinished folds are left out. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from research.compare.rows import find_runs
from research.evaluation.metrics import compute_metrics
from research.evaluation.thresholds import THRESHOLD_RULES, choose_thresholds
from research.runs.directory import RunDirectory, is_fold
from research.runs.run import load_run

BASELINE = "best_f1"
FIXED = "0.5"
ALL_MODELS = "all models"
Scores = dict[str, dict[str, list[float]]]  # {model: {rule: a score for each split}}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run directories, or folders of them")
    splits = find_splits(parser.parse_args(argv).runs)
    if not splits:
        parser.error("no finished run or fold there")
    scores = score_splits(splits)
    result = {model: summarize(of_model) for model, of_model in scores.items()}
    print_table(result, len(splits))
    print(json.dumps({"benchmark": "thresholds", "splits": [str(path) for path in splits], "results": result}))
    return 0


def find_splits(paths: Sequence[str]) -> list[Path]:
    """Return the finished runs of one split and the finished folds, also of a cross-validation that goes on still."""
    finished, unfinished = find_runs(paths)
    splits: list[Path] = []
    for run in (*finished, *unfinished):
        folds = sorted(path for path in run.iterdir() if path.is_dir() and is_fold(path))
        splits += [path for path in folds or [run] if RunDirectory(path).status() == "finished"]
    return splits


def score_splits(splits: Sequence[Path]) -> Scores:
    """Return the tuned macro-F1 on the test part of every split, and that at 0.5, and their means over models."""
    scores: Scores = {}
    for path in splits:
        run = load_run(path)
        test, validation = run.predictions, run.validation_predictions
        of_split: dict[str, dict[str, float]] = {}
        for model in test.probs:
            cuts: dict[str, Any] = {FIXED: 0.5} | {
                rule: choose_thresholds(validation.labels, validation.probs[model], rule) for rule in THRESHOLD_RULES
            }
            of_split[model] = {
                rule: compute_metrics(test.labels, test.probs[model], cut, test.label_names)["f1_macro"]
                for rule, cut in cuts.items()
            }
        of_split[ALL_MODELS] = {
            rule: float(np.mean([of_model[rule] for of_model in of_split.values()])) for rule in (FIXED, *THRESHOLD_RULES)
        }
        for model, of_model in of_split.items():
            for rule, score in of_model.items():
                scores.setdefault(model, {}).setdefault(rule, []).append(score)
    return scores


def summarize(scores: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return each rule's scores, their mean, and its mean difference from BASELINE with a 95 % interval over splits."""
    from scipy.stats import t

    summary = {}
    for rule, values in scores.items():
        differences = np.array(values) - np.array(scores[BASELINE])
        count = len(differences)
        reach = float(t.ppf(0.975, count - 1) * differences.std(ddof=1) / np.sqrt(count)) if count > 1 else None
        mean = float(differences.mean())
        interval = None if reach is None else [round(mean - reach, 4), round(mean + reach, 4)]
        rounded = [round(value, 4) for value in values]
        summary[rule] = {
            "splits": rounded,
            "mean": round(float(np.mean(values)), 4),
            "difference": round(mean, 4),
            "interval": interval,
        }
    return summary


def print_table(result: Mapping[str, Any], count: int) -> None:
    print(f"| model | rule | {' | '.join(f'split {number + 1}' for number in range(count))} | mean | over {BASELINE} |")
    print("|---|---|" + "---:|" * (count + 2))
    for model, rules in result.items():
        for rule, found in rules.items():
            low_high = "" if found["interval"] is None else " ({:+.4f} to {:+.4f})".format(*found["interval"])
            over = "" if rule == BASELINE else f"{found['difference']:+.4f}{low_high}"
            cells = " | ".join(f"{value:.4f}" for value in found["splits"])
            print(f"| {model} | {rule} | {cells} | {found['mean']:.4f} | {over} |")


if __name__ == "__main__":
    sys.exit(main())
