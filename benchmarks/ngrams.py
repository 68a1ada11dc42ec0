"""Put n-grams beside the layers of finished cross-validated runs afterwards, as --student_ngrams would have done in them.

    python benchmarks/ngrams.py results/folds/seed_1 results/folds/seed_2 --output_dir results/beside
    python research_compare.py results/folds results/beside --group_by seed --baseline results/folds --keeps 0.99 \
        --metric f1_macro,f1_macro_tuned,average_precision_macro

--student_ngrams changes nothing of how layers are trained, so what the same command with the flag would give can be had from
the logits that a run has written: for each fold the regression is fitted on its training texts, and its share in the
logits of student and control is chosen on its validation part, by the suite's own functions. Each run is written anew
below --output_dir, without models, for research_compare.py. Tables and models have to be where the run had them. Prints
the scores of all rows as a Markdown table and as one JSON line; a run that stands there already is not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from research.errors import StopRequest
from research.experiment.context import RunContext
from research.experiment.ngram_stage import choose_share, fit_ngrams
from research.experiment.run import Logits, load_fold, score
from research.experiment.runtime import Extras, start_runtime
from research.experiment.saving import write_predictions
from research.experiment.tokenised import tokenise_comments
from research.flags import read_config_file
from research.names import METRIC_OF, PARTS
from research.report.numbers import format_number
from research.runs.directory import RunDirectory
from research.runs.folds import combine_folds, pool_folds
from research.runs.formats import PREDICTION_FILES, dig, read_csv
from research.runs.run import Run, load_run
from research_config import ExperimentConfig, saved_settings

METRICS = ("f1_macro", "f1_macro_tuned", "average_precision_macro")
MIXED = ("student", "control")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs with --num_folds")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--ngrams", type=int, default=3, help="the most pieces in an n-gram")
    arguments = parser.parse_args(argv)
    results = {str(path): redo(load_run(path), arguments.output_dir / path.name, arguments.ngrams) for path in arguments.runs}
    print_table(results)
    print(json.dumps({"benchmark": "ngrams", "longest": arguments.ngrams, "results": results}))
    return 0


def redo(run: Run, folder: Path, longest: int) -> dict[str, Any]:
    """Write a run with n-grams beside its layers into a folder, fold by fold; return its scores over all rows."""
    settings, problems = read_config_file(ExperimentConfig, run.path / "config.json", ("fold",))
    if problems or "folds" not in run.metrics:
        raise SystemExit(f"{run.path}: {problems[0] if problems else 'is no run with --num_folds'}")
    config = dataclasses.replace(ExperimentConfig(**settings), student_ngrams=longest, output_dir=str(folder))
    with RunDirectory(folder) as run_dir:
        if run_dir.claim(saved_settings(config)) != "finished":
            for number, fold in enumerate(run.folds):
                redo_fold(fold, config, number, run_dir.path / f"fold_{number + 1}")
            run_dir.write_metrics(combine_folds(run_dir.path, run.num_folds))
    return describe(run, load_run(run_dir.path))


def redo_fold(fold: Run, config: ExperimentConfig, number: int, folder: Path) -> None:
    with RunDirectory(folder) as fold_dir:
        if fold_dir.claim({**saved_settings(config), "fold": number + 1}) == "finished":
            return
        inputs = load_fold(config, number)
        runtime = start_runtime(config, sys.argv, StopRequest(), Extras())
        context = RunContext(inputs, tokenise_comments(inputs, runtime.cache), runtime, fold_dir)
        fitted, tokens = fit_ngrams(context), context.tokens.student
        assert tokens is not None
        rows = {part: getattr(inputs.split, part) for part in PARTS}
        index = {part: inputs.comments.find_source_rows(of_part) for part, of_part in rows.items()}
        features = {part: fitted.model.table.weigh(*tokens.take(of_part)) for part, of_part in rows.items()}
        logits: Logits = {model: read_logits(fold, model, index) for model in fold.models}
        training = dict(fold.metrics["training"])
        for model in set(MIXED) & logits.keys():
            facts = choose_share(model, logits[model]["validation"], fitted, context)
            training[model] = training[model] | {"ngrams": facts}
            for part, layers in logits[model].items():
                ngrams = fitted.model.answer(features[part])
                logits[model][part] = (1 - facts["share"]) * layers + facts["share"] * ngrams
        labels = {part: inputs.comments.labels[getattr(inputs.split, part)] for part in ("train", *PARTS)}
        write_predictions(labels, logits, context)
        fold_dir.write_environment(fold.environment)
        fold_dir.write_metrics(score(labels, logits, training, inputs, None))


def read_logits(fold: Run, model: str, index: dict[str, NDArray[np.int64]]) -> dict[str, NDArray[np.float32]]:
    """Return a model's logits on both parts, which have to be of these rows of the table."""
    logits = {}
    for part in PARTS:
        header, values = read_csv(fold.path / PREDICTION_FILES[part])
        if not np.array_equal(values[:, header.index("index")], index[part]):
            raise SystemExit(f"{fold.path}: the {part} part is another now; its tables or models have changed")
        columns = [header.index(f"logit_{model}_{label}") for label in fold.label_names]
        logits[part] = values[:, columns].astype(np.float32)
    return logits


def describe(run: Run, redone: Run) -> dict[str, Any]:
    """Return every model's scores over all rows before and after, and the shares of its folds."""
    before, after = (pool_folds(each.folds)["scores"] for each in (run, redone))
    shares = {model: [dig(fold.metrics, "training", model, "ngrams", "share") for fold in redone.folds] for model in run.models}
    return {
        model: {
            "shares": shares[model] if model in MIXED else [],
            "scores": {name: [scores[name][model]["value"] for scores in (before, after)] for name in METRICS},
        }
        for model in run.models
    }


def print_table(results: dict[str, dict[str, Any]]) -> None:
    print("| run | model | share of the n-grams | " + " | ".join(METRIC_OF[name].short for name in METRICS) + " |")
    print("| --- | --- | --- |" + " ---: |" * len(METRICS))
    for run, of_run in results.items():
        for model, found in of_run.items():
            shares = ", ".join(f"{share:.1f}" for share in found["shares"])
            scores = [values if shares else values[:1] for values in found["scores"].values()]
            cells = [" → ".join(map(format_number, values)) for values in scores]
            print(f"| {run} | {model} | {shares} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(main())
