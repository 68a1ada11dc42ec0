"""The student of a run and its control: built, trained, and scored."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from research.errors import naming_flag
from research.experiment.context import RunContext
from research.experiment.inputs import Inputs, hash_rows
from research.experiment.teacher_stage import prepare_targets
from research.experiment.training import predict_parts, train
from research.kd.loop import TrainingResult
from research.kd.targets import TeacherTargets
from research.kd.teacher import Teacher
from research.models.classifiers import StudentModel
from research.models.cutting import cut_layers
from research.models.encoders import load_encoder
from research.models.fingerprint import check_unchanged
from research.storage.cache import digest_key
from research.storage.checkpoints import CheckpointFolder
from research.text.diagnostics import report_sizes
from research_distillation import DistillationTrainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedStudent:
    """A student with its best epoch's weights, how it got them, and its logits {part: (N, C)}."""

    model: StudentModel
    training: TrainingResult
    logits: dict[str, NDArray[np.float32]]


def train_student(teacher: Teacher | None, context: RunContext) -> TrainedStudent:
    """Build the student and train it, from the teacher or from the labels alone."""
    split, folder = context.inputs.split, context.run_dir.path / "checkpoint"
    if teacher is None:
        return _train("student", None, teacher, split.train, folder, context)
    rows = np.concatenate([split.train, split.unlabelled])
    with context.runtime.timed("teacher_outputs"):
        targets, carried = prepare_targets(teacher, rows, context)
    return _train("student", targets, teacher, rows, folder, context, **carried)


def train_control(teacher: Teacher | None, context: RunContext) -> TrainedStudent:
    """Train the same student without the teacher.

    It starts from the same weights with the same seed and sees the same batches, as a student_only run
    of the same flags does; unlabelled rows, which have nothing to teach it, are left out.
    """
    log.info("training the control: the same student on the labels alone")
    return _train("control", None, teacher, context.inputs.split.train, context.run_dir.path / "checkpoint_control", context)


def _train(
    name: str,
    targets: TeacherTargets | None,
    teacher: Teacher | None,
    rows: NDArray[np.int64],
    checkpoints: Path,
    context: RunContext,
    **carried: Any,
) -> TrainedStudent:
    config, tokens = context.inputs.config, context.tokens.student
    assert tokens is not None
    student = build_student(teacher, context.inputs)
    if targets is not None and teacher is not None:
        report_sizes(teacher.num_parameters, student)
    label_names = context.inputs.comments.label_names
    device, world = context.runtime.device, context.runtime.world
    trainer = DistillationTrainer(targets, student, config, device, label_names=label_names, world=world)
    loader = context.training_batches(rows, tokens, config.seed, **carried)
    identity = digest_key(training_identity(teacher, rows, context))
    training = train(name, trainer, loader, CheckpointFolder(checkpoints, identity, world), context)
    return TrainedStudent(student, training, predict_parts(name, student, tokens, context))


def build_student(teacher: Teacher | None, inputs: Inputs) -> StudentModel:
    """Build the student as --student_init and --student_layers say; one seed gives the same weights."""
    config = inputs.config
    torch.manual_seed(config.seed)
    if config.student_init == "teacher":
        assert teacher is not None
        encoder = copy.deepcopy(cast(nn.Module, teacher.model.encoder)).requires_grad_(True)
    else:
        encoder = load_encoder(config.student_path, random_init=config.student_init == "random")
        check_unchanged(inputs.model_files["student"])
    if config.student_layers is not None:
        with naming_flag("student_layers"):
            encoder = cut_layers(encoder, config.student_layers)
    # Seeded again here, so the head does not depend on how many numbers loading the encoder drew.
    torch.manual_seed(config.seed)
    return StudentModel(
        num_labels=len(inputs.comments.label_names),
        dropout=config.dropout,
        classifier_hidden_size=config.student_hidden_size,
        pooling=config.pooling,
        encoder=encoder,
    )


def training_identity(teacher: Teacher | None, rows: NDArray[np.int64], context: RunContext) -> dict[str, Any]:
    """Return what a checkpoint must share, beside the config, with the run that goes on from it."""
    comments, student = context.inputs.comments, context.inputs.model_files.get("student")
    return {
        "teacher": None if teacher is None else teacher.identity,
        "student": None if student is None else student.sha256,  # none of its own when it starts as the teacher
        "tokens": [tokens.key for tokens in (context.tokens.student, context.tokens.teacher) if tokens is not None],
        "rows": [hash_rows(comments, part) for part in (rows, context.inputs.split.validation)],
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
