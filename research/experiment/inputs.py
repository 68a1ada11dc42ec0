"""What a run needs of the user's models beside the tables, opened and checked before anything is written."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from research.errors import InputError, naming_flag
from research.experiment.dataset import Dataset
from research.experiment.seen_texts import Known, part_from_seen
from research.kd.layers import LayerComparison, compare_layers
from research.models.classifiers import ModelShape
from research.models.encoders import load_model_config, load_tokenizer
from research.models.fingerprint import ModelFiles, load_settled, read_model_files
from research.models.saved import SavedClassifier, load_classifier
from research.models.trial import Demands, try_classifier, try_encoder, try_pretrained
from research_config import PIPELINES, ExperimentConfig, settings_that_decide
from research_data import Comments, Split

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Everything that can be wrong with what the user supplied, loaded and checked before anything is written."""

    config: ExperimentConfig
    comments: Comments
    split: Split
    teacher_tokenizer: Any
    student_tokenizer: Any
    checkpoint: SavedClassifier | None
    shapes: Mapping[str, ModelShape]
    model_files: Mapping[str, ModelFiles]
    teacher_texts: Known = "known"

    @property
    def model_settings(self) -> dict[str, Any]:
        """What a saved model of this run has to know of the texts and labels it was trained on."""
        return {"labels": list(self.comments.label_names)} | settings_that_decide(self.config, "tokens")


def load_inputs(dataset: Dataset) -> Inputs:
    """Open tokenizers and model configurations.

    Raises:
        InputError: any problem in them; nothing has been written.
    """
    config, comments, split = dataset.config, dataset.comments, dataset.split
    parts = PIPELINES[config.pipeline]
    checkpoint, teacher_tokenizer, student_tokenizer, shapes = None, None, None, {}
    files: dict[str, ModelFiles] = {}
    teacher_texts: Known = "known"
    if parts.teacher and config.teacher_checkpoint:
        path = config.teacher_checkpoint
        with naming_flag("teacher_checkpoint"):
            checkpoint, files["teacher"] = load_settled(
                path, lambda: load_classifier(path, comments.label_names, pooling=config.pooling)
            )
        teacher_tokenizer, shapes["teacher"] = checkpoint.tokenizer, ModelShape.of(checkpoint.model.backbone_config)
        split, teacher_texts = part_from_seen(config, checkpoint.settings, comments, split)
    elif parts.teacher:
        teacher_tokenizer, shapes["teacher"] = open_pretrained(config, "teacher_path")
        files["teacher"] = read_model_files(config.teacher_path)
    if parts.student and config.student_init == "teacher":
        student_tokenizer, shapes["student"] = teacher_tokenizer, shapes["teacher"]
    elif parts.student:
        student_tokenizer, shapes["student"] = open_pretrained(config, "student_path")
        files["student"] = read_model_files(config.student_path, weights=config.student_init == "pretrained")
    if parts.student:
        shapes["student"] = cut_shape(config, shapes["student"])
    if parts.student and config.student_head == "native" and config.pooling != "cls":
        log.warning("warning: --pooling %s is for the teacher alone; the student's native head pools by itself", config.pooling)
    try_models(config, checkpoint, check_mapping(config, shapes))
    return Inputs(config, comments, split, teacher_tokenizer, student_tokenizer, checkpoint, shapes, files, teacher_texts)


def open_pretrained(config: ExperimentConfig, flag: str) -> tuple[Any, ModelShape]:
    """Open the tokenizer and the configuration of a pretrained encoder that a flag names."""
    name = getattr(config, flag)
    with naming_flag(flag):
        shape = ModelShape.of(load_model_config(name))
        tokenizer = load_tokenizer(name)
    if tokenizer.model_max_length < config.max_length:
        raise InputError(f"--max_length: {name} takes at most {tokenizer.model_max_length} tokens, got {config.max_length}")
    return tokenizer, shape


def cut_shape(config: ExperimentConfig, student: ModelShape) -> ModelShape:
    """Return the student's shape with as many layers as --student_layers keeps."""
    if config.student_layers is None:
        return student
    if config.student_layers > student.num_layers:
        raise InputError(f"--student_layers: the student has {student.num_layers} layers, got {config.student_layers}")
    return dataclasses.replace(student, num_layers=config.student_layers)


def check_mapping(config: ExperimentConfig, shapes: Mapping[str, ModelShape]) -> LayerComparison | None:
    """Check --layer_mapping against the models' depths; return what is compared of the layers."""
    if "teacher" not in shapes or "student" not in shapes:
        return None
    try:
        return compare_layers(config, shapes["teacher"], shapes["student"])
    except ValueError as error:
        raise InputError(f"--layer_mapping: {error}") from error


def try_models(config: ExperimentConfig, checkpoint: SavedClassifier | None, comparison: LayerComparison | None) -> None:
    """Try each model on a few tokens as the run will use it.

    Raises:
        InputError: one cannot do what is asked of it.
    """
    parts = PIPELINES[config.pipeline]
    teacher = student = Demands(config.max_length, config.pooling)
    if comparison is not None:
        teacher, student = (
            dataclasses.replace(teacher, **dataclasses.asdict(compared)) for compared in (comparison.teacher, comparison.student)
        )
    student = dataclasses.replace(student, layers=config.student_layers, native=config.student_head == "native")
    copied = parts.student and config.student_init == "teacher"
    if checkpoint is not None:
        name = str(config.teacher_checkpoint)
        with naming_flag("teacher_checkpoint"):
            try_classifier(name, checkpoint.model, teacher)
            if copied:
                try_encoder(name, copy.deepcopy(cast(nn.Module, checkpoint.model.encoder)), student)
    elif parts.teacher:
        with naming_flag("teacher_path"):
            try_pretrained(config.teacher_path, teacher)
            if copied:
                try_pretrained(config.teacher_path, student)
    if parts.student and not copied:
        with naming_flag("student_path"):
            try_pretrained(config.student_path, student, random_init=config.student_init == "random")


def hash_rows(comments: Comments, rows: NDArray[np.int64]) -> str:
    """Return a hash of some rows' texts and labels, in order."""
    digest = hashlib.sha256(np.ascontiguousarray(comments.text_hash[rows]).tobytes())
    digest.update(np.ascontiguousarray(comments.labels[rows]).tobytes())
    return digest.hexdigest()
