"""One run from table to results directory, stage by stage: tokens, teacher, student, control, files; and its folds."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.evaluation.calibration import sigmoid
from research.evaluation.gain import measure_gain, measure_keeping, resample_models
from research.evaluation.metrics import build_metrics
from research.experiment.context import RunContext
from research.experiment.dataset import load_dataset
from research.experiment.inputs import Inputs, load_inputs
from research.experiment.runtime import Runtime
from research.experiment.saving import first_of_texts, save_run
from research.experiment.sources import check_models
from research.experiment.student_stage import train_control, train_student
from research.experiment.teacher_stage import get_teacher, judge_teacher
from research.experiment.tokenised import tokenise_comments
from research.experiment.training import summarize
from research.names import PARTS
from research.report.run_page import write_report
from research.runs.directory import RunDirectory
from research.runs.folds import aggregate_folds
from research.runs.formats import read_json
from research.storage.arrays import return_free_memory
from research_config import PIPELINES, ExperimentConfig, table_paths
from research_data import compute_class_weights

log = logging.getLogger(__name__)

Logits = dict[str, dict[str, NDArray[np.float32]]]


def run_experiment(inputs: Inputs, runtime: Runtime, run_dir: RunDirectory) -> dict[str, Any]:
    """Do everything and return the content of metrics.json, which is written last.

    Raises:
        WeakTeacher: the teacher is under --min_teacher_f1 and --allow_weak_teacher was not given.
        TrainingFault, Interrupted: as `train`.
    """
    with runtime.timed("tokenize"):
        context = RunContext(inputs, tokenise_comments(inputs, runtime.cache), runtime, run_dir)
    pipeline = PIPELINES[inputs.config.pipeline]
    logits: Logits = {}
    training: dict[str, Any] = {}
    teacher = student = None
    if pipeline.teacher:
        with runtime.timed("teacher"):
            teacher = get_teacher(context)
        logits["teacher"] = judge_teacher(teacher, context)
        training["teacher"] = teacher.training
    if pipeline.student:
        with runtime.timed("student"):
            student = train_student(teacher, context)
        run_dir.write_history(student.training.history)
        logits["student"], training["student"] = student.logits, summarize(student.training)
    if inputs.config.with_control:
        with runtime.timed("control"):
            control = train_control(teacher, context)
        run_dir.write_history(control.training.history, "history_control.csv")
        logits["control"], training["control"] = control.logits, summarize(control.training)
    labels = {part: inputs.comments.labels[getattr(inputs.split, part)] for part in ("train", *PARTS)}
    metrics = score(labels, logits, training, inputs)
    return_free_memory()  # of training, before the report reads every prediction
    with runtime.timed("save"):
        save_run(metrics, labels, logits, teacher, None if student is None else student.model, context)
    return metrics


def score(
    labels: Mapping[str, NDArray[np.float32]], logits: Logits, training: Mapping[str, Any], inputs: Inputs
) -> dict[str, Any]:
    """Return the content of metrics.json, with what the student kept of its teacher and gained over its control."""
    config = inputs.config
    probs = {model: {part: sigmoid(values) for part, values in parts.items()} for model, parts in logits.items()}
    names = inputs.comments.label_names
    metrics = build_metrics(
        names,
        labels,
        probs,
        training,
        kd_temperature=config.kd_temperature,
        t_squared=config.t_squared,
        teacher_shift=np.log(compute_class_weights(labels["train"], names)[0]) if config.undo_class_weights else 0.0,
        threshold_rule=config.threshold_rule,
    )
    if {"teacher", "student"} <= probs.keys():
        thresholds = {model: list(cuts.values()) for model, cuts in metrics["thresholds"].items()}
        of_test = {model: parts["test"] for model, parts in probs.items()}
        clusters = first_of_texts(inputs.comments, inputs.split.test)
        resampled = resample_models(labels["test"], of_test, thresholds, clusters)
        num_texts = len(np.unique(clusters))
        metrics["kept"] = measure_keeping(resampled, num_texts, len(clusters))
        if "control" in probs:
            metrics["kd_gain"] = measure_gain(resampled, num_texts)
    return metrics


def run_folds(
    config: ExperimentConfig, settings: Mapping[str, Any], runtime: Runtime, run_dir: RunDirectory, first: Inputs
) -> dict[str, Any]:
    """Run every fold in a directory of its own and write their mean and standard deviation beside them.

    Args:
        settings: What config.json holds of the whole cross-validation.
        first: The inputs of the first fold, which are loaded already.
    """
    metrics = []
    for fold in range(config.num_folds):
        inputs = first if fold == 0 else load_inputs(load_dataset(config, fold))
        with RunDirectory(run_dir.path / f"fold_{fold + 1}") as fold_dir:
            status = fold_dir.claim({**settings, "fold": fold + 1})
            if status == "finished":
                fold_dir.check_tables(inputs.comments.file_sha256, table_paths(inputs.config))
                check_models(fold_dir, inputs.config)
            else:
                log.info("fold %d of %d", fold + 1, config.num_folds)
                runtime.timing_s.clear()
                run_experiment(inputs, runtime, fold_dir)
        metrics.append(read_json(fold_dir.path / "metrics.json"))
    total = aggregate_folds(metrics)
    write_report(run_dir.path, total, plots=runtime.extras.plots)
    run_dir.write_metrics(total)
    return total
