"""What a run needs of the user's models beside the tables, opened and checked before anything is written."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from research.errors import InputError, naming_flag
from research.experiment.common_ngrams import check_ngrams
from research.experiment.dataset import Dataset
from research.experiment.pieces import Pieces, fit_tokenizer
from research.experiment.seen_texts import Known, SeenTexts, part_from_seen, seen_by_checkpoint, seen_by_start
from research.experiment.sources import list_checkpoints
from research.experiment.teacher_table import TeacherTable
from research.kd.layers import LayerComparison, compare_layers
from research.models.classifiers import ModelShape
from research.models.encoders import load_model_config, load_tokenizer
from research.models.filling import load_filler
from research.models.fingerprint import ModelFiles, load_settled, read_model_files
from research.models.ngram_table import check_countable
from research.models.saved import SavedClassifier, load_classifier
from research.models.trial import Demands, try_classifier, try_encoder, try_pretrained
from research.runs.directory import teacher_name
from research.settings.student import USUAL_STATIC_DIM
from research_config import PIPELINES, ExperimentConfig, settings_that_decide
from research_data import Comments, Split

log = logging.getLogger(__name__)
# Tokens of one piece and the special tokens around it.
MOST_AROUND_A_PIECE = 8


@dataclass(frozen=True)
class TeacherSource:
    """What a teacher is made from: a checkpoint, opened, or a pretrained encoder to fine-tune.

    Attributes:
        name: What the run calls it: teacher, teacher_2, ...
        flag: Which flag gave its model.
        seed: Of its fine-tuning; None for a checkpoint.
        seen: Whether the texts that a checkpoint was trained on are known.
    """

    name: str
    flag: str
    tokenizer: Any
    shape: ModelShape
    files: ModelFiles
    checkpoint: SavedClassifier | None = None
    seed: int | None = None
    seen: Known = "known"


@dataclass(frozen=True, eq=False)
class Views:
    """The views among the rows of the comments, (R, N) int64 each for R training rows with N views.

    Attributes:
        rows: Where they are.
        sources: The training rows that they are views of.
    """

    rows: NDArray[np.int64]
    sources: NDArray[np.int64]


@dataclass(frozen=True)
class Inputs:
    """Everything that can be wrong with what the user supplied, loaded and checked before anything is written.

    Attributes:
        fill: The encoder whose masked-language head fills words in, None without one.
        views: Those of --augment, once they are made; the comments hold them after the tables' rows.
    """

    config: ExperimentConfig
    comments: Comments
    split: Split
    teachers: tuple[TeacherSource, ...]
    teacher_table: TeacherTable | None
    student_tokenizer: Any
    shapes: Mapping[str, ModelShape]
    model_files: Mapping[str, ModelFiles]
    start_seen: Mapping[str, SeenTexts]
    student_pieces: Pieces | None = None
    fill: ModelFiles | None = None
    views: Views | None = None

    @property
    def view_kinds(self) -> tuple[str, ...]:
        """Those of --augment_kinds that there can be."""
        return tuple(kind for kind in self.config.augment_kinds if kind != "fill" or self.fill is not None)

    @property
    def teacher_tokenizer(self) -> Any:
        """The tokenizer of the first teacher, whose layers are compared; None when no model teaches."""
        return self.teachers[0].tokenizer if self.teachers else None

    @property
    def checkpoint(self) -> SavedClassifier | None:
        """The first --teacher_checkpoint."""
        return self.teachers[0].checkpoint if self.teachers else None

    @property
    def file_sha256(self) -> dict[str, str]:
        """The digests of the tables that were read, by what their rows are called."""
        table = self.teacher_table
        return self.comments.file_sha256 | ({} if table is None else {"teacher_probs": table.sha256})

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
    teachers: tuple[TeacherSource, ...] = ()
    student_tokenizer, start_seen, shapes = None, {}, {}
    if parts.teacher and config.checkpoints:
        teachers, split = open_checkpoints(config, comments, split)
    elif parts.teacher and config.num_fine_tuned:
        teachers = open_fine_tuned(config)
        start_seen["teacher"] = seen_by_start("teacher_path", config)
    files = {source.name: source.files for source in teachers if source.seed in (None, config.split_seed)}
    if teachers:
        shapes["teacher"] = teachers[0].shape
    if parts.student and config.student_init == "teacher":
        student_tokenizer, shapes["student"] = teachers[0].tokenizer, teachers[0].shape
    elif parts.student:
        student_tokenizer, shapes["student"] = open_pretrained(config, "student_path")
        files["student"] = read_model_files(config.student_path, weights=config.student_init == "pretrained")
        if config.student_init == "pretrained":
            start_seen["student"] = seen_by_start("student_path", config)
    pieces: Pieces | None = None
    if parts.student:
        student_tokenizer, pieces = fit_tokenizer(config, student_tokenizer, comments, split)
        shapes["student"] = student_shape(config, shapes["student"], pieces)
        if config.student_ngrams is not None:
            with naming_flag("student_ngrams"):
                check_countable(shapes["student"].vocabulary, config.student_ngrams)
    if parts.student and config.student_head == "native" and config.pooling != "cls":
        log.warning("warning: --pooling %s is for the teacher alone; the student's native head pools by itself", config.pooling)
    starts = {side: seen for side, seen in start_seen.items() if seen is not None}
    for seen in starts.values():
        split, _ = part_from_seen(seen, config, comments, split)
    try_models(config, teachers, check_mapping(config, shapes), pieces)
    check_ngrams(config, comments, split)
    table = dataset.teacher_table
    fill = find_fill(config, teachers, files.get("student")) if parts.student and config.augment else None
    return Inputs(config, comments, split, teachers, table, student_tokenizer, shapes, files, starts, pieces, fill)


def find_fill(config: ExperimentConfig, teachers: Sequence[TeacherSource], student: ModelFiles | None) -> ModelFiles | None:
    """Return the first pretrained encoder of the run that has its masked-language head, the teacher's before the student's.

    Raises:
        InputError: --augment_kinds asks for words that are filled in alone, and none has.
    """
    if "fill" not in config.augment_kinds:
        return None
    encoders = {source.files.name: source.files for source in teachers[:1] if source.checkpoint is None}
    if student is not None and config.student_init == "pretrained":
        encoders.setdefault(student.name, student)
    for name, files in encoders.items():
        if load_filler(name, config.max_length) is not None:
            return files
    reason = f"there is no masked-language head, or no mask token, in {' and '.join(encoders) or 'any model of this run'}"
    others = [kind for kind in config.augment_kinds if kind != "fill"]
    if not others:
        raise InputError(f"--augment_kinds: fill needs an encoder that can fill words in; {reason}. Add another kind.")
    log.info("no words are filled in, since %s; views are made by %s", reason, ", ".join(others))
    return None


def open_checkpoints(config: ExperimentConfig, comments: Comments, split: Split) -> tuple[tuple[TeacherSource, ...], Split]:
    """Load every --teacher_checkpoint; return them, and the split without texts that any of them was trained on.

    Raises:
        InputError: one cannot be used, or was trained on validation or test rows.
    """
    sources = []
    for number, path in enumerate(list_checkpoints(config), 1):
        load = functools.partial(load_classifier, path, comments.label_names, pooling=config.pooling)
        with naming_flag("teacher_checkpoint"):
            checkpoint, files = load_settled(path, load)
        split, seen = part_from_seen(seen_by_checkpoint(path, checkpoint.settings, config), config, comments, split)
        shape = ModelShape.of(checkpoint.model.backbone_config)
        name = teacher_name(number)
        sources.append(TeacherSource(name, "teacher_checkpoint", checkpoint.tokenizer, shape, files, checkpoint, seen=seen))
    return tuple(sources), split


def open_fine_tuned(config: ExperimentConfig) -> tuple[TeacherSource, ...]:
    """Open the encoder of --teacher_path; return a source for every seed that it is to be fine-tuned with."""
    tokenizer, shape = open_pretrained(config, "teacher_path")
    files = read_model_files(config.teacher_path)
    return tuple(
        TeacherSource(teacher_name(number + 1), "teacher_path", tokenizer, shape, files, seed=config.split_seed + number)
        for number in range(config.num_fine_tuned)
    )


def open_pretrained(config: ExperimentConfig, flag: str) -> tuple[Any, ModelShape]:
    """Open the tokenizer and the configuration of a pretrained encoder that a flag names."""
    name = getattr(config, flag)
    with naming_flag(flag):
        shape = ModelShape.of(load_model_config(name))
        tokenizer = load_tokenizer(name)
    if tokenizer.model_max_length < config.max_length:
        raise InputError(f"--max_length: {name} takes at most {tokenizer.model_max_length} tokens, got {config.max_length}")
    return tokenizer, shape


def student_shape(config: ExperimentConfig, encoder: ModelShape, pieces: Pieces | None) -> ModelShape:
    """Return the student's shape: that of its encoder with the layers and pieces it keeps, or of a static student."""
    layers = encoder.num_layers if config.student_layers is None else config.student_layers
    if layers > encoder.num_layers:
        raise InputError(f"--student_layers: the student has {encoder.num_layers} layers, got {layers}")
    vocabulary = encoder.vocabulary if pieces is None or pieces.kept is None else len(pieces.kept)
    if config.student_kind == "static":
        most = min(encoder.hidden_size, vocabulary)
        width = min(USUAL_STATIC_DIM, most) if config.static_dim is None else config.static_dim
        if width > most:
            raise InputError(f"--static_dim: the student's encoder gives vectors of at most {most}, got {width}")
        return ModelShape(0, width, 1, vocabulary)
    return dataclasses.replace(encoder, num_layers=layers, vocabulary=vocabulary)


def check_mapping(config: ExperimentConfig, shapes: Mapping[str, ModelShape]) -> LayerComparison | None:
    """Check --layer_mapping against the models' depths; return what is compared of the layers."""
    if "teacher" not in shapes or "student" not in shapes:
        return None
    try:
        return compare_layers(config, shapes["teacher"], shapes["student"])
    except ValueError as error:
        raise InputError(f"--layer_mapping: {error}") from error


def try_models(
    config: ExperimentConfig,
    teachers: Sequence[TeacherSource],
    comparison: LayerComparison | None,
    pieces: Pieces | None = None,
) -> None:
    """Try each model on a few tokens as the run will use it; layers are those of the first teacher.

    Raises:
        InputError: one cannot do what is asked of it.
    """
    parts = PIPELINES[config.pipeline]
    plain = teacher = student = Demands(config.max_length, config.pooling)
    if comparison is not None:
        teacher, student = (
            dataclasses.replace(teacher, **dataclasses.asdict(compared)) for compared in (comparison.teacher, comparison.student)
        )
    student = dataclasses.replace(
        student,
        layers=config.student_layers,
        layer_choice=config.student_layer_choice,
        pieces=None if pieces is None else pieces.kept,
        rank=config.embedding_rank,
        native=config.student_head == "native",
    )
    if config.student_kind == "static":
        # Its encoder reads each piece alone, and any number of those gives a static student's text vector.
        student = dataclasses.replace(student, max_length=MOST_AROUND_A_PIECE, pooling="mean")
    copied = parts.student and config.student_init == "teacher"
    for number, source in enumerate(teachers):
        if source.checkpoint is None:
            continue
        name, model = source.files.name, source.checkpoint.model
        with naming_flag("teacher_checkpoint"):
            try_classifier(name, model, teacher if number == 0 else plain)
            if copied and number == 0:
                try_encoder(name, copy.deepcopy(cast(nn.Module, model.encoder)), student)
    if teachers and teachers[0].checkpoint is None:
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
