"""One run from table to results directory, stage by stage: tokens, teacher, student, control, files; and its folds."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.evaluation.calibration import sigmoid
from research.evaluation.gain import AnsweredPart, measure_gain, measure_keeping, resample_models
from research.evaluation.metrics import build_metrics, score_teachers
from research.experiment.context import RunContext
from research.experiment.dataset import load_dataset
from research.experiment.inputs import Inputs, load_inputs
from research.experiment.ngram_stage import fit_ngrams
from research.experiment.runtime import Runtime
from research.experiment.saving import first_of_texts, save_run
from research.experiment.sources import check_models
from research.experiment.student_stage import train_control, train_student
from research.experiment.teacher_stage import TeacherAnswers, get_teachers, judge_teachers, prepare_targets
from research.experiment.tfidf_stage import train_tfidf
from research.experiment.tokenised import tokenise_comments
from research.experiment.view_stage import add_views, training_rows
from research.names import PARTS, TEACHER_TABLE
from research.report.run_page import write_report
from research.report.trackers import following
from research.runs.directory import RunDirectory, Status
from research.runs.folds import combine_folds
from research.storage.arrays import return_free_memory
from research_config import PIPELINES, ExperimentConfig, table_paths
from research_data import PARTS as ALL_PARTS
from research_data import compute_class_weights

log = logging.getLogger(__name__)

Logits = dict[str, dict[str, NDArray[np.float32]]]


def run_experiment(inputs: Inputs, runtime: Runtime, run_dir: RunDirectory) -> dict[str, Any]:
    """Do everything and return the content of metrics.json, which is written last.

    Raises:
        WeakTeacher: the teacher is under --min_teacher_f1 and --allow_weak_teacher was not given.
        TrainingFault, Interrupted: as `train`.
    """
    inputs = add_views(inputs, runtime)
    with runtime.timed("tokenize"):
        tokens = tokenise_comments(inputs, runtime.cache)
    # Processes that do a run together see the same epochs.
    tracker = "none" if runtime.world.rank else inputs.config.track
    with following(tracker, run_dir.path) as tracking:
        return do_stages(RunContext(inputs, tokens, runtime, run_dir, tracking))


def do_stages(context: RunContext) -> dict[str, Any]:
    """Train, score and save what the pipeline has; return the content of metrics.json."""
    inputs, runtime, run_dir = context.inputs, context.runtime, context.run_dir
    pipeline, lead = PIPELINES[inputs.config.pipeline], runtime.world.lead
    logits: Logits = {}
    training: dict[str, Any] = {}
    teachers = answers = student = None
    if pipeline.teacher:
        with runtime.timed("teacher"):
            teachers = get_teachers(context)
        answers = judge_teachers(teachers, context)
        if answers.complete:
            logits["teacher"] = dict(answers.together)
        training |= teachers.training
    ngrams = None
    if pipeline.student and inputs.config.student_ngrams is not None:
        with runtime.timed("ngrams"):
            ngrams = fit_ngrams(context)
    if pipeline.student:
        with runtime.timed("student"):
            student = train_student(teachers, ngrams, context)
        lead(partial(run_dir.write_history, student.history))
        logits["student"], training["student"] = student.logits, student.training
    tfidf = None
    if pipeline.tfidf:
        with runtime.timed("tfidf"):
            tfidf = train_tfidf(context)
        # As in student_only, what is trained on the labels alone is called the student.
        logits["student"], training["student"] = tfidf.logits, tfidf.training
    if inputs.config.with_control:
        with runtime.timed("control"):
            control = train_control(teachers, ngrams, context)
        lead(partial(run_dir.write_history, control.history, "history_control.csv"))
        logits["control"], training["control"] = control.logits, control.training

    def finish() -> dict[str, Any]:
        labels = {part: inputs.comments.labels[getattr(inputs.split, part)] for part in ("train", *PARTS)}
        metrics = score(labels, logits, training, inputs, answers)
        return_free_memory()  # of training, before the report reads every prediction
        with runtime.timed("save"):
            save_run(metrics, labels, logits, teachers, tfidf if student is None else student.model, context)
        return metrics

    return lead(finish)


def prepare_experiment(inputs: Inputs, runtime: Runtime, run_dir: RunDirectory) -> None:
    """Put everything into the cache that the run, or each of its folds, will look for there; write nothing else.

    Raises:
        WeakTeacher, TrainingFault, Interrupted: as `run_experiment`.
    """
    config, pipeline = inputs.config, PIPELINES[inputs.config.pipeline]
    for fold in range(config.num_folds):
        if fold > 0:
            inputs = runtime.world.together(partial(load_fold, config, fold))
        inputs = add_views(inputs, runtime)
        context = RunContext(inputs, tokenise_comments(inputs, runtime.cache), runtime, run_dir)
        if not pipeline.teacher:
            continue
        teachers = get_teachers(context)
        judge_teachers(teachers, context)
        if pipeline.student:
            prepare_targets(teachers, training_rows(inputs)[0], context)


def score(
    labels: Mapping[str, NDArray[np.float32]],
    logits: Logits,
    training: Mapping[str, Any],
    inputs: Inputs,
    answers: TeacherAnswers | None,
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
        softened=None if answers is None else {part: sigmoid(values) for part, values in answers.softened.items()},
    )
    if answers is not None and answers.single.keys() != {"teacher"}:
        metrics["teachers"] = score_single_teachers(labels, answers, inputs)
    others = {"teacher", "control"} & probs.keys()
    if "student" in probs and others:
        thresholds = {model: [cuts[label] for label in names] for model, cuts in metrics["thresholds"].items()}
        of_test = {model: parts["test"] for model, parts in probs.items()}
        clusters = first_of_texts(inputs.comments, inputs.split.test)
        resampled = resample_models([AnsweredPart(labels["test"], of_test, thresholds, clusters)])
        num_texts = len(np.unique(clusters))
        if "teacher" in others:
            metrics["kept"] = measure_keeping(resampled, num_texts, len(clusters))
        if "control" in others:
            metrics["kd_gain"] = measure_gain(resampled, num_texts)
    return metrics


def score_single_teachers(labels: Mapping[str, NDArray[np.float32]], answers: TeacherAnswers, inputs: Inputs) -> dict[str, Any]:
    """Return the scores of each teacher by itself and, of a table, the share of each part's rows that it speaks of."""
    probs = {name: {part: sigmoid(values) for part, values in parts.items()} for name, parts in answers.single.items()}
    scores = score_teachers(inputs.comments.label_names, labels, probs, inputs.config.threshold_rule)
    if (table := inputs.teacher_table) is not None:
        rows = {part: getattr(inputs.split, part) for part in ALL_PARTS}
        scores[TEACHER_TABLE]["coverage"] = {
            part: table.count_covered(of_part) / len(of_part) for part, of_part in rows.items() if len(of_part)
        }
    return scores


def run_folds(
    config: ExperimentConfig, settings: Mapping[str, Any], runtime: Runtime, run_dir: RunDirectory, first: Inputs
) -> dict[str, Any]:
    """Run every fold in a directory of its own and write beside them their mean and deviation, and the scores of all rows.

    Args:
        settings: What config.json holds of the whole cross-validation.
        first: The inputs of the first fold, which are loaded already.
    """
    world = runtime.world
    for fold in range(config.num_folds):
        inputs = first if fold == 0 else world.together(partial(load_fold, config, fold))
        with RunDirectory(run_dir.path / f"fold_{fold + 1}") as fold_dir:
            if world.lead(partial(claim_fold, fold_dir, {**settings, "fold": fold + 1}, inputs)) != "finished":
                log.info("fold %d of %d", fold + 1, config.num_folds)
                runtime.timing_s.clear()
                run_experiment(inputs, runtime, fold_dir)
    return_free_memory()  # of training, before every fold's predictions are scored together

    def finish() -> dict[str, Any]:
        total = combine_folds(run_dir.path, config.num_folds)
        write_report(run_dir.path, total, plots=runtime.extras.plots)
        run_dir.write_metrics(total)
        return total

    return world.lead(finish)


def load_fold(config: ExperimentConfig, fold: int) -> Inputs:
    """Load the inputs of a fold."""
    return load_inputs(load_dataset(config, fold))


def claim_fold(fold_dir: RunDirectory, settings: Mapping[str, Any], inputs: Inputs) -> Status:
    """Claim a fold's directory; what is finished there must be of the tables and models as they are now."""
    status = fold_dir.claim(settings)
    if status == "finished":
        fold_dir.check_tables(inputs.file_sha256, table_paths(inputs.config))
        check_models(fold_dir, inputs.config)
    return status
