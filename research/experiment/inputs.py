"""What a run needs of the user's tables and models, read and checked before anything is written."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from research.errors import InputError
from research.kd.layers import LayerComparison
from research.models.classifiers import ModelShape
from research.models.encoders import load_model_config, load_tokenizer
from research.models.saved import SavedClassifier, load_classifier
from research.models.trial import Demands, try_classifier, try_encoder, try_pretrained
from research.storage.arrays import return_free_memory
from research_config import PIPELINES, ExperimentConfig
from research_data import Comments, Split, load_comments, split_comments

DATA_FIELDS = (
    "dataset_path", "text_column", "label_columns", "val_path", "test_path", "unlabelled_path", "text_normalization",
    "val_fraction", "test_fraction", "split_seed", "data_fraction", "num_folds",
)  # fmt: skip


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


def load_inputs(config: ExperimentConfig, fold: int | None = None) -> Inputs:
    """Read the tables, split them and open tokenizers and model configurations.

    Raises:
        InputError: any fault in them; nothing has been written.
    """
    comments, split = load_data(config, fold)
    config = dataclasses.replace(config, text_column=comments.text_column, label_columns=comments.label_names)
    unknown = sorted(set(config.label_alpha_map) - set(comments.label_names))
    if unknown:
        raise InputError(f"--label_alphas: no label '{unknown[0]}'; the labels are {', '.join(comments.label_names)}")
    parts = PIPELINES[config.pipeline]
    checkpoint, teacher_tokenizer, student_tokenizer, shapes = None, None, None, {}
    if parts.teacher and config.teacher_checkpoint:
        checkpoint = load_classifier(config.teacher_checkpoint, comments.label_names, pooling=config.pooling)
        teacher_tokenizer, shapes["teacher"] = checkpoint.tokenizer, ModelShape.of(checkpoint.model.backbone_config)
    elif parts.teacher:
        teacher_config = load_model_config("teacher_path", config.teacher_path)
        teacher_tokenizer = load_tokenizer("teacher_path", config.teacher_path, config.max_length)
        shapes["teacher"] = ModelShape.of(teacher_config)
    if parts.student and config.student_init == "teacher":
        student_tokenizer, shapes["student"] = teacher_tokenizer, shapes["teacher"]
    elif parts.student:
        student_config = load_model_config("student_path", config.student_path)
        student_tokenizer = load_tokenizer("student_path", config.student_path, config.max_length)
        shapes["student"] = ModelShape.of(student_config)
    try_models(config, checkpoint, check_layers(config, shapes))
    return Inputs(config, comments, split, teacher_tokenizer, student_tokenizer, checkpoint, shapes)


def check_layers(config: ExperimentConfig, shapes: Mapping[str, ModelShape]) -> LayerComparison | None:
    """Check --student_layers and --layer_mapping against the models' depths; return what is compared of the layers."""
    if "student" not in shapes:
        return None
    student = shapes["student"]
    if config.student_layers is not None and config.student_layers > student.num_layers:
        raise InputError(f"--student_layers: the student has {student.num_layers} layers, got {config.student_layers}")
    if "teacher" in shapes and (config.method.hidden or config.method.attention):
        student = dataclasses.replace(student, num_layers=config.student_layers or student.num_layers)
        try:
            return LayerComparison(config, shapes["teacher"], student)
        except ValueError as error:
            raise InputError(str(error)) from error
    return None


def try_models(config: ExperimentConfig, checkpoint: SavedClassifier | None, comparison: LayerComparison | None) -> None:
    """Try each model on a few tokens as the run will use it.

    Raises:
        InputError: one cannot do what is asked of it.
    """
    parts = PIPELINES[config.pipeline]
    teacher = student = Demands(config.max_length, config.pooling)
    if comparison is not None:
        teacher = Demands(config.max_length, config.pooling, None, *comparison.layers(0), comparison.relations)
        student = Demands(config.max_length, config.pooling, None, *comparison.layers(1), comparison.relations)
    student = dataclasses.replace(student, layers=config.student_layers)
    of_teacher = config.student_init == "teacher"
    if checkpoint is not None:
        where = f"--teacher_checkpoint: {config.teacher_checkpoint}"
        try_classifier(where, checkpoint.model, teacher)
        if parts.student and of_teacher:
            try_encoder(where, copy.deepcopy(cast(nn.Module, checkpoint.model.encoder)), student)
    elif parts.teacher:
        try_pretrained("teacher_path", config.teacher_path, teacher)
        if parts.student and of_teacher:
            try_pretrained("teacher_path", config.teacher_path, student)
    if parts.student and not of_teacher:
        try_pretrained("student_path", config.student_path, student, random_init=config.student_init == "random")


def load_data(config: ExperimentConfig, fold: int | None) -> tuple[Comments, Split]:
    """Read and split the tables; a worker of a sweep keeps the last ones while their files stay as they are."""
    paths = (config.dataset_path, config.val_path, config.test_path, config.unlabelled_path)
    stats = [None if path is None or not Path(path).is_file() else Path(path).stat() for path in paths]
    stamps = tuple(None if stat is None else (stat.st_mtime_ns, stat.st_size) for stat in stats)
    return _load_data(tuple(getattr(config, name) for name in DATA_FIELDS), fold, stamps)


@functools.lru_cache(maxsize=1)
def _load_data(values: tuple[Any, ...], fold: int | None, _stamps: tuple[Any, ...]) -> tuple[Comments, Split]:
    config = ExperimentConfig(**dict(zip(DATA_FIELDS, values, strict=True)))
    comments = load_comments(
        config.dataset_path,
        text_column=config.text_column,
        label_columns=config.label_columns,
        val_path=config.val_path,
        test_path=config.test_path,
        unlabelled_path=config.unlabelled_path,
        text_normalization=config.text_normalization,
    )
    split = split_comments(
        comments,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        seed=config.split_seed,
        data_fraction=config.data_fraction,
        fold=fold,
        num_folds=config.num_folds,
    )
    return_free_memory()  # of splitting, which takes twice what stays
    return comments, split


def hash_rows(comments: Comments, rows: NDArray[np.int64]) -> str:
    """Return a hash of some rows' texts and labels, in order."""
    digest = hashlib.sha256(np.ascontiguousarray(comments.text_hash[rows]).tobytes())
    digest.update(np.ascontiguousarray(comments.labels[rows]).tobytes())
    return digest.hexdigest()
