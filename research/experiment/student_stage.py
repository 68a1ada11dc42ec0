"""The student of a run and its control: built, trained, and scored."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from research.errors import naming_flag
from research.evaluation.calibration import sigmoid
from research.evaluation.metrics import keep_spoken
from research.evaluation.thresholds import choose_thresholds
from research.experiment.context import RunContext
from research.experiment.inputs import Inputs, hash_rows
from research.experiment.ngram_stage import FittedNgrams, add_ngrams
from research.experiment.search import Trial, search
from research.experiment.teacher_stage import ask_teachers, prepare_targets
from research.experiment.training import Regression, predict_parts, summarize, train
from research.experiment.view_stage import label_views, rows_in_turn, training_rows
from research.kd.ensemble import Ensemble, average_logits
from research.kd.loop import TrainingResult
from research.kd.targets import TeacherTargets
from research.models.classifiers import StudentModel, TextClassifier
from research.models.cutting import cut_layers, factorise_embeddings, keep_pieces
from research.models.encoders import load_encoder
from research.models.fingerprint import check_unchanged
from research.models.native import build_native
from research.models.static import build_static
from research.storage.cache import digest_key
from research.storage.checkpoints import CheckpointFolder
from research.text.diagnostics import report_sizes
from research_distillation import DistillationTrainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedStudent:
    """A student with its best epoch's weights, how it got them, and its logits {part: (N, C)}.

    Attributes:
        history: A row per epoch.
        training: Deterministic facts of the training.
    """

    model: TextClassifier
    history: list[dict[str, Any]]
    training: dict[str, Any]
    logits: dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Lesson:
    """What a student learns from.

    Attributes:
        rows: Those it reads in some epoch; `turns` says which in which, as `rows_in_turn`.
        teachers: Those of the run, which may also be what the student starts as.
        targets: What answers for them; None where it learns from the labels alone.
        labels: (N, C) of all rows, where they are not those of the tables.
        carried: What its batches hold beside its own tokens.
    """

    rows: NDArray[np.int64]
    turns: NDArray[np.int64] | None
    teachers: Ensemble | None
    targets: TeacherTargets | None = None
    labels: NDArray[np.float32] | None = None
    carried: Mapping[str, Any] = field(default_factory=dict)


def train_student(teachers: Ensemble | None, ngrams: Regression[FittedNgrams] | None, context: RunContext) -> TrainedStudent:
    """Build the student and train it, from its teachers or from the labels alone, and put n-grams beside its layers."""
    inputs, folder = context.inputs, context.run_dir.path / "checkpoint"
    if teachers is None:
        return _train("student", learn_labels(teachers, inputs), ngrams, folder, context)
    rows, turns = training_rows(inputs)
    with context.runtime.timed("teacher_outputs"):
        targets, carried = prepare_targets(teachers, rows, context)
    return _train("student", Lesson(rows, turns, teachers, targets, carried=carried), ngrams, folder, context)


def learn_labels(teachers: Ensemble | None, inputs: Inputs) -> Lesson:
    """Return the lesson of the labelled rows and their views without a teacher."""
    rows, turns = rows_in_turn(inputs, inputs.split.train)
    return Lesson(rows, turns, teachers, labels=label_views(inputs, inputs.comments.labels))


def train_control(teachers: Ensemble | None, ngrams: Regression[FittedNgrams] | None, context: RunContext) -> TrainedStudent:
    """Train the same student without the teacher.

    It starts from the same weights with the same seed and sees the same batches, as a student_only run
    of the same flags does; unlabelled rows, which have nothing to teach it, are left out. With --control_labels pseudo
    they come with the teacher's decisions, so that the batches are those of the student in every case. It reads the
    views that the student reads, with the labels of their texts.
    """
    folder, inputs = context.run_dir.path / "checkpoint_control", context.inputs
    if inputs.config.control_labels == "gold":
        log.info("training the control: the same student on the labels alone")
        return _train("control", learn_labels(teachers, inputs), ngrams, folder, context)
    assert teachers is not None
    log.info("training the control: the same student on the labels and, of unlabelled rows, the teacher's decisions")
    rows, turns = training_rows(inputs)
    labels = label_views(inputs, pseudo_label(teachers, rows, context))
    return _train("control", Lesson(rows, turns, teachers, labels=labels), ngrams, folder, context)


def pseudo_label(teachers: Ensemble, rows: NDArray[np.int64], context: RunContext) -> NDArray[np.float32]:
    """Return the labels of all rows (N, C), those of `split.unlabelled` as the teacher decides, nan where it says nothing.

    It decides at the thresholds that are best for its F1 on validation; --threshold_rule scores models and makes none.

    Args:
        rows: Of the student's training, for which the teachers' logits are in the cache.
    """
    comments, split = context.inputs.comments, context.inputs.split

    def answer(asked: NDArray[np.int64]) -> NDArray[np.float64]:
        return sigmoid(average_logits(list(ask_teachers(teachers, asked, context).values()), 1.0))

    known, spoken = keep_spoken(comments.labels[split.validation], answer(split.validation))
    probs = answer(rows)[len(split.train) : len(split.train) + len(split.unlabelled)]
    labels = comments.labels.copy()
    labels[split.unlabelled] = np.where(np.isnan(probs), np.nan, probs >= choose_thresholds(known, spoken))
    return labels


def _train(
    name: str, lesson: Lesson, ngrams: Regression[FittedNgrams] | None, checkpoints: Path, context: RunContext
) -> TrainedStudent:
    """Train it, once or in every trial of --search, and ask the one that validation chose about both parts."""

    def try_out(trial: RunContext) -> Trial[tuple[TextClassifier, TrainingResult]]:
        student, training = _fit(name, lesson, checkpoints / trial.trial, trial)
        return Trial((student, training), training.best_score, summarize(training))

    found = search(name, context, try_out)
    (student, training), tokens = found.model, context.tokens.student
    assert tokens is not None
    context.tracking.send_epochs(name, training.history)  # those of the trial that was chosen; without trials they are sent
    facts = found.facts
    if ngrams is not None:
        facts = facts | {"ngrams": add_ngrams(name, student, ngrams, context)}
    return TrainedStudent(student, training.history, facts, predict_parts(name, student, tokens, context))


def _fit(name: str, lesson: Lesson, checkpoints: Path, context: RunContext) -> tuple[TextClassifier, TrainingResult]:
    config, tokens = context.inputs.config, context.tokens.student
    assert tokens is not None
    if config.student_kind == "static":
        config = dataclasses.replace(config, lr=config.static_lr)
    teachers, rows, turns = lesson.teachers, lesson.rows, lesson.turns
    student = build_student(teachers, context.inputs, context.runtime.device)
    if lesson.targets is not None and teachers is not None and teachers.members:
        report_sizes(teachers.num_parameters, student)
    label_names = context.inputs.comments.label_names
    device, world = context.runtime.device, context.runtime.world
    trainer = DistillationTrainer(lesson.targets, student, config, device, label_names=label_names, world=world)
    loader = context.training_batches(rows, tokens, config.seed, lesson.labels, turns=turns, **lesson.carried)
    identity = digest_key(training_identity(teachers, rows, turns, context))
    return student, train(name, trainer, loader, CheckpointFolder(checkpoints, identity, world), context)


def build_student(teachers: Ensemble | None, inputs: Inputs, device: torch.device | str = "cpu") -> TextClassifier:
    """Build the student as the flags of its size, start and head say; one seed gives the same weights.

    Args:
        device: Where the encoder of a static student reads its pieces.
    """
    config, pieces = inputs.config, inputs.student_pieces
    native = config.student_head == "native"
    torch.manual_seed(config.seed)
    if config.student_init == "teacher":
        assert teachers is not None and teachers.first is not None
        encoder = copy.deepcopy(teachers.first.load_encoder()).requires_grad_(True)
    else:
        encoder = load_encoder(config.student_path, random_init=config.student_init == "random", pooler=native)
        check_unchanged(inputs.model_files["student"])
    if config.student_layers is not None:
        with naming_flag("student_layers"):
            encoder = cut_layers(encoder, config.student_layers, config.student_layer_choice)
    if pieces is not None and pieces.kept is not None:
        with naming_flag("trim_student_vocab"):
            encoder = keep_pieces(encoder, pieces.kept)
    if config.embedding_rank is not None:
        encoder = factorise_embeddings(encoder, config.embedding_rank)
    if config.student_kind == "static":
        counts = None if pieces is None else pieces.counts
        encoder = build_static(encoder, inputs.student_tokenizer, inputs.shapes["student"].hidden_size, counts, device)
    # Seeded again here, so the head does not depend on how many numbers loading the encoder drew.
    torch.manual_seed(config.seed)
    if native:
        with naming_flag("student_head"):
            return build_native(encoder, inputs.comments.label_names, config.dropout)
    return StudentModel(
        num_labels=len(inputs.comments.label_names),
        dropout=config.dropout,
        classifier_hidden_size=config.student_hidden_size,
        pooling="mean" if config.student_kind == "static" else config.pooling,
        encoder=encoder,
    )


def training_identity(
    teachers: Ensemble | None, rows: NDArray[np.int64], turns: NDArray[np.int64] | None, context: RunContext
) -> dict[str, Any]:
    """Return what a checkpoint must share, beside the config, with the run that goes on from it."""
    comments, student = context.inputs.comments, context.inputs.model_files.get("student")
    read = (context.tokens.student, context.tokens.teacher, *context.tokens.others.values())
    in_turn = {} if turns is None else {"turns": hashlib.sha256(turns.tobytes()).hexdigest()}
    return in_turn | {
        "teacher": None if teachers is None else teachers.identity,
        "student": None if student is None else student.sha256,  # none of its own when it starts as the teacher
        "tokens": [tokens.key for tokens in read if tokens is not None],
        "rows": [hash_rows(comments, part) for part in (rows, context.inputs.split.validation)],
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
