"""A model of a run in the forms that it can be shipped in, checked and scored against the one that was trained.

Everything goes to one folder of the run, `student_onnx/` or `teacher_onnx/`, which is whole or absent: the model in each
form and, in export.json, export.md and export.html, what each form costs and keeps.

N texts, C labels.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.errors import InputError
from research.evaluation.calibration import sigmoid
from research.evaluation.gain import GAIN_METRICS, AnsweredPart, resample_models
from research.evaluation.inference import difference, estimate
from research.runs.formats import write_json_atomic
from research.runs.run import Run
from research.shipping.costs import Form, list_weights, measure_forms
from research.shipping.export_page import write_pages
from research.shipping.onnx_files import write_exported
from research.shipping.quantize import Feed, write_int8
from research.shipping.run_rows import Rows, find_model, read_other_rows, read_rows_of_run
from research.shipping.scorers import ONNX_FILES, Scorer, Usage, compute_logits, open_onnx, open_torch
from research.storage.files import publish_folder, remove

log = logging.getLogger(__name__)
LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime", "tokenizers", "transformers")
# Rounding moves a float32 logit by about 1e-6; an exporter that builds another model moves it by far more.
LARGEST_DIFFERENCE = 1e-4


def export_model(
    run_path: str,
    model: str = "student",
    *,
    int8: bool = False,
    calibration_path: str | None = None,
    text_column: str | None = None,
    overwrite: bool = False,
    measure_s: float = 1.5,
) -> tuple[Path, dict[str, Any]]:
    """Export a model of a finished run; return the folder and what export.json holds.

    Args:
        model: student or teacher.
        int8: Also write the quantised model.
        calibration_path, text_column: A table of texts to calibrate and check on in the place of the run's own, which
            is then not read, and nothing is scored.
        measure_s: Seconds that a form is timed for, about.

    Raises:
        InputError: anything wrong with the run, its model or its table; nothing has been written.
    """
    run, source = find_model(run_path, model)
    folder = run.path / f"{model}_onnx"
    if folder.exists() and not overwrite:
        raise InputError(f"{folder} is there already. Give --overwrite to export again.")
    check_libraries()
    # With torch, which a mistake above does without.
    from research.models.saved import load_classifier

    saved = load_classifier(str(source))
    usage = Usage.of(saved, str(source))
    if calibration_path is None:
        rows = read_rows_of_run(run)
    else:
        rows = read_other_rows(calibration_path, text_column, usage.text_normalization)
    temporary = folder.with_name(f".{folder.name}.tmp")
    remove(temporary)
    log.info("exporting %s", source)
    try:
        write_exported(saved, usage, temporary)
        if int8:
            quantize_exported(temporary, rows)
        facts = {"model": model, **describe_export(source, temporary, rows, run, measure_s)}
        write_json_atomic(temporary / "export.json", facts, decimals=9)
        write_pages(facts, temporary, run.path)
        publish_folder(temporary, folder)
    finally:
        remove(temporary)
    return folder, facts


def check_libraries() -> None:
    """Make sure that what exports, quantises and runs ONNX is installed.

    Raises:
        InputError: a package is missing.
    """
    missing = []
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        raise InputError(f"--format onnx: needs {', '.join(missing)}. Run pip install {' '.join(missing)}.")


def quantize_exported(folder: Path, rows: Rows) -> None:
    """Write the int8 form beside the float32 one."""
    log.info("quantising with the value ranges of %d texts %s", len(rows.calibration), rows.origin)
    write_int8(folder / ONNX_FILES[False], folder / ONNX_FILES[True], feed_texts(folder, rows.calibration))


def feed_texts(folder: Path, texts: list[str]) -> Iterator[Feed]:
    """Yield each text as the inputs of an exported model, by itself and so without padding."""
    scorer = open_onnx(folder, num_threads=1)
    for text in texts:
        ids, _ = scorer.encode([text])
        if len(ids):
            yield {"input_ids": ids[None].astype(np.int64), "attention_mask": np.ones((1, len(ids)), dtype=np.int64)}


def describe_export(source: Path, exported: Path, rows: Rows, run: Run, measure_s: float) -> dict[str, Any]:
    """Compare, score and time what was exported.

    Raises:
        InputError: the float32 model gives other probabilities than torch.
    """
    forms = {"torch": Form(open_torch(str(source), "cpu", 1), list_weights(source))}
    for int8, path in ONNX_FILES.items():
        if (exported / path).is_file():
            forms["int8" if int8 else "onnx"] = Form(open_onnx(exported, int8=int8, num_threads=1), (exported / path,))
    logits = {name: compute_logits(form.scorer, rows.checked) for name, form in forms.items()}
    facts: dict[str, Any] = {
        "labels": list(forms["torch"].scorer.labels),
        "compared_with_torch": {
            name: compare_answers(forms["torch"].scorer, logits["torch"], answers)
            for name, answers in logits.items()
            if name != "torch"
        },
    }
    largest = facts["compared_with_torch"]["onnx"]["largest_difference"]
    if not largest <= LARGEST_DIFFERENCE:
        raise InputError(
            f"--format onnx: the exported model's probabilities differ from torch's by up to {largest:.2g}, so it is not "
            "written. ONNX cannot express this architecture, or torch's exporter has a fault; try another version of torch."
        )
    if "int8" in forms:
        facts["calibration"] = {"texts": len(rows.calibration), "origin": rows.origin}
    if rows.scored:
        facts["scores"] = score_forms(run, logits, forms["torch"].scorer)
    log.info("timing %s in turn, on one thread", ", ".join(forms))
    facts["forms"] = measure_forms(forms, rows.checked, measure_s)
    facts["environment"] = {
        "versions": {name: version(name) for name in LIBRARIES},
        "device": f"{platform.machine()} CPU",
        "threads": 1,
    }
    return facts


def compare_answers(scorer: Scorer, expected: NDArray[np.float32], found: NDArray[np.float32]) -> dict[str, Any]:
    """Return how far probabilities (N, C) are from each other, and the share of decisions that differ."""
    before, after = sigmoid(expected), sigmoid(found)
    distance = np.abs(before - after)
    changed = (before >= scorer.thresholds) != (after >= scorer.thresholds)
    return {
        "texts": len(expected),
        "largest_difference": float(distance.max()),
        "mean_difference": float(distance.mean()),
        "decisions_changed": float(changed.mean()),
    }


def score_forms(run: Run, logits: Mapping[str, NDArray[np.float32]], scorer: Scorer) -> dict[str, Any]:
    """Score every form on the run's test part, with what each other one gains on torch.

    Labels are the run's. A difference's interval is the paired one: both forms are scored on the same resampled texts.
    """
    predictions = run.predictions
    names = list(predictions.label_names)
    order = [scorer.labels.index(label) for label in names]
    probs = {name: sigmoid(values[:, order]) for name, values in logits.items()}
    thresholds = dict.fromkeys(probs, scorer.thresholds[order].tolist())
    resampled = resample_models([AnsweredPart(predictions.labels, probs, thresholds, predictions.text_cluster)])
    num_texts = len(np.unique(predictions.text_cluster))
    scores: dict[str, Any] = {"rows": len(predictions.index), "texts": num_texts}
    for metric in GAIN_METRICS:
        scores[metric] = {}
        for name, scored in resampled[metric].items():
            found = estimate(scored, num_texts)
            scores[metric][name] = {"value": found.value, "low": found.low, "high": found.high}
            if name != "torch":
                gap = difference([scored, -1 * resampled[metric]["torch"]], num_texts)
                scores[metric][name]["difference"] = {"value": gap.value, "low": gap.low, "high": gap.high}
    return scores
