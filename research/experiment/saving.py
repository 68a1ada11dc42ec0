"""What a run leaves in its directory: predictions, costs, models, the environment, the report; metrics.json last."""

from __future__ import annotations

import functools
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from research.errors import InputError
from research.evaluation.efficiency import LATENCY_BATCH, measure_efficiency
from research.experiment.context import RunContext
from research.experiment.inputs import Inputs, hash_rows
from research.experiment.runtime import machine_name
from research.experiment.seen_texts import read_seen, storing_seen
from research.experiment.tfidf_stage import TrainedTfidf
from research.experiment.view_stage import training_rows
from research.kd.ensemble import Ensemble
from research.kd.teacher import Teacher
from research.models.classifiers import TextClassifier
from research.models.folders import add_settings
from research.models.saved import save_classifier
from research.names import PARTS
from research.report.run_page import write_report
from research.storage.files import publish_folder, remove
from research.text.batches import Batch, BatchLoader
from research.text.tokens import Tokens
from research_config import unused_fields
from research_data import Comments, summarize_data

log = logging.getLogger(__name__)
TIMED_BATCHES = 8
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "scikit-learn", "iterative-stratification")


def save_run(
    metrics: Mapping[str, Any],
    labels: Mapping[str, NDArray[np.float32]],
    logits: Mapping[str, Mapping[str, NDArray[np.float32]]],
    teachers: Ensemble | None,
    student: TextClassifier | TrainedTfidf | None,
    context: RunContext,
) -> None:
    """Write the run directory; metrics.json comes last and means finished.

    Args:
        labels: (N, C) by part.
        logits: {model: {part: (N, C)}}.
    """
    inputs, run_dir = context.inputs, context.run_dir
    write_predictions(labels, logits, context)
    members = {} if teachers is None else teachers.members
    run_dir.write_efficiency(measure_costs(members, student, context))
    # Those of one teacher; several have thresholds together only.
    cuts = metrics["thresholds"].get("teacher") if len(members) == 1 else None
    for name, teacher in members.items():
        publish_model(functools.partial(store_teacher, teacher, thresholds=cuts), run_dir.path / name)
    if student is not None:
        settings = inputs.model_settings | {"thresholds": metrics["thresholds"]["student"]}
        store = storing_seen(
            store_student(student, settings, inputs),
            inputs.comments.text_hash[training_rows(inputs)[0]],
            *(read_seen(run_dir.path / name) for name in members),
            *([] if (start := inputs.start_seen.get("student")) is None else [start.hashes]),
            *([] if inputs.teacher_table is None else [None]),  # of which nobody knows what its maker has seen
        )
        publish_model(store, run_dir.path / "student")
    run_dir.write_environment(describe_environment(context))
    write_report(run_dir.path, metrics, lambda index: fetch_texts(index, inputs), plots=context.runtime.extras.plots)
    run_dir.write_metrics(metrics)
    context.tracking.finish()
    # Only now: a run killed before metrics.json resumes from its last checkpoint.
    run_dir.drop_leavings()


def write_predictions(
    labels: Mapping[str, NDArray[np.float32]], logits: Mapping[str, Mapping[str, NDArray[np.float32]]], context: RunContext
) -> None:
    """Write the predictions of validation and test; the arguments are those of `save_run`."""
    comments = context.inputs.comments
    for part in PARTS:
        rows = getattr(context.inputs.split, part)
        index, clusters = comments.find_source_rows(rows), first_of_texts(comments, rows)
        of_part = {model: parts[part] for model, parts in logits.items()}
        context.run_dir.write_predictions(part, index, clusters, comments.label_names, labels[part], of_part)


def store_student(student: TextClassifier | TrainedTfidf, settings: dict[str, Any], inputs: Inputs) -> Callable[[Path], None]:
    """Return what writes the student into a folder, with the settings that its texts were read with."""
    if isinstance(student, TrainedTfidf):
        unread = unused_fields(inputs.config.pipeline)
        known = {name: value for name, value in settings.items() if name not in unread}
        return lambda folder: student.save(folder, known)
    return lambda folder: save_classifier(student.cpu(), inputs.student_tokenizer, folder, settings)


def first_of_texts(comments: Comments, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return, for each row of one table, which data row the first of that table with the same text is."""
    table = np.flatnonzero(np.isin(comments.source, comments.source[rows]))
    hashes, first = np.unique(comments.text_hash[table], return_index=True)
    return comments.find_source_rows(table[first[np.searchsorted(hashes, comments.text_hash[rows])]])


def store_teacher(teacher: Teacher, folder: Path, *, thresholds: Mapping[str, float] | None) -> None:
    """Write a teacher, with the thresholds of this run's validation part where it has any of its own."""
    teacher.store(folder)
    if thresholds is not None:
        add_settings(folder, thresholds=thresholds)


def publish_model(store: Callable[[Path], None], folder: Path) -> None:
    """Let a model be written beside its folder, then put it into place whole."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    remove(temporary)
    store(temporary)
    publish_folder(temporary, folder)


def measure_costs(
    members: Mapping[str, Teacher], student: TextClassifier | TrainedTfidf | None, context: RunContext
) -> dict[str, Any]:
    """Measure each model's size and speed, on the same test rows in the same minutes; several teachers are one, their sum."""
    if isinstance(student, TrainedTfidf):
        return student.costs
    device, tokens = context.runtime.device, context.tokens
    # One process cannot run a sharded model, and what several need together is no cost of the model.
    timed = {name: teacher for name, teacher in members.items() if not teacher.is_sharded}
    sides: dict[str, tuple[TextClassifier, Tokens | None]] = {
        name: (teacher.model, tokens.of_teacher(name)) for name, teacher in timed.items()
    }
    if student is not None:
        sides["student"] = student, tokens.student
    return measure_efficiency(
        {name: model.to(device) for name, (model, _) in sides.items()},
        {name: pick_timed_batches(of_model, context) for name, (_, of_model) in sides.items()},
        device,
        time_budget_s=context.runtime.extras.measure_s,
        summed={"teacher": tuple(timed)} if len(timed) > 1 else {},
    )


def pick_timed_batches(tokens: Tokens | None, context: RunContext) -> list[Batch]:
    """Return some full batches of test rows in random order: the same rows whatever the tokens."""
    assert tokens is not None
    inputs = context.inputs
    loader = BatchLoader(inputs.split.test, tokens, inputs.comments.labels, LATENCY_BATCH)
    order = np.random.default_rng(0).permutation(loader.num_rows)
    starts = range(0, min(len(order), TIMED_BATCHES * LATENCY_BATCH), LATENCY_BATCH)
    return [loader.collate(order[start : start + LATENCY_BATCH]) for start in starts]


def fetch_texts(index: Sequence[int], inputs: Inputs) -> dict[int, str]:
    """Return the texts of some test rows by their `index` in predictions.csv; none if the table has changed."""
    wanted, comments = set(index), inputs.comments
    test = inputs.split.test
    rows = {
        row: place for row, place in zip(test.tolist(), comments.find_source_rows(test).tolist(), strict=True) if place in wanted
    }
    try:
        return {rows[row]: text for row, text in comments.read_texts(np.array(list(rows), dtype=np.int64)).items()}
    except InputError as error:
        log.warning("report.html goes without texts: %s", error)
        return {}


def describe_environment(context: RunContext) -> dict[str, Any]:
    """Return the content of environment.json."""
    inputs, runtime = context.inputs, context.runtime
    return {
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        "device": machine_name(runtime.device),
        "num_threads": torch.get_num_threads(),
        "num_processes": runtime.world.size,
        "command_line": runtime.command_line,
        "dataset": summarize_data(inputs.comments, inputs.split),
        "data": {
            "dataset_sha256": inputs.comments.file_sha256["main"],
            "file_sha256": inputs.file_sha256,
            "test_sha256": hash_rows(inputs.comments, inputs.split.test),
        },
        "models": {side: files.describe() for side, files in inputs.model_files.items()},
        "timing_s": {phase: round(seconds, 2) for phase, seconds in runtime.timing_s.items()},
    }
