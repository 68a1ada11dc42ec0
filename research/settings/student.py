"""Flags of the student: what it starts as, and what it keeps of that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from research.flags import between, setting
from research.models.mapping import LAYER_CHOICES
from research.models.pooling import POOLING_HELP, POOLINGS
from research.names import BOTH_MODELS

STUDENT_KINDS = {
    "transformer": "the encoder itself",
    "static": "a vector for each piece of the tokenizer, taken from the encoder, and their mean as text vector",
}
USUAL_STATIC_DIM = 256
MOST_PIECES = 3  # of an n-gram: more cannot be numbered for vocabularies as they are


@dataclass(frozen=True)
class StudentSettings:
    """What a student is made from, and how small it is."""

    student_path: str = setting(
        "distilbert-base-multilingual-cased",
        "student",
        "pretrained encoder of the student: folder or hub name",
        decides="student",
        kind="model",
    )
    student_hidden_size: int = setting(
        256, "student", "hidden width of the student's classifier", check=between(1), decides="student"
    )
    student_head: str = setting(
        "mlp",
        "student",
        "the student's classifier: mlp: a hidden layer of --student_hidden_size on the text vector of --pooling; native: the "
        "head of the architecture, which pools by itself, so that transformers alone loads student/",
        choices=("mlp", "native"),
        decides="student",
    )
    student_init: str = setting(
        "pretrained",
        "student",
        "start of the student's encoder: its pretrained weights, the fine-tuned teacher's own layers, or random",
        choices=("pretrained", "teacher", "random"),
        decides="student",
    )
    student_layers: int | None = setting(
        None,
        "student",
        "keep this many of the encoder's layers, by --student_layer_choice (default: all)",
        check=between(1),
        decides="student",
    )
    student_layer_choice: str = setting(
        "uniform",
        "student",
        "which layers --student_layers keeps: uniform, those the uniform mapping would pair; lowest, without the top; ends, "
        "without the middle. --layer_mapping counts the layers that are kept from 1, whichever they were",
        choices=tuple(LAYER_CHOICES),
        decides="student",
    )
    pooling: str = setting("cls", "student", POOLING_HELP, choices=tuple(POOLINGS), decides=BOTH_MODELS)
    freeze_student_encoder: bool = setting(False, "student", "train the student's classifier only", decides="student")
    trim_student_vocab: int | None = setting(
        None,
        "student",
        "keep only the pieces of the student's tokenizer that the training and unlabelled texts hold at least this many times, "
        "and single characters of their scripts (default: all)",
        check=between(1),
        decides="student",
    )
    embedding_rank: int | None = setting(
        None,
        "student",
        "make the student's token embeddings the product of two matrices of this rank, at first the closest one (default: one "
        "matrix)",
        check=between(1),
        decides="student",
    )
    student_ngrams: int | None = setting(
        None,
        "student",
        "add to the student's logits those of a logistic regression on the n-grams of up to this many of its pieces, in the "
        "share that is best on validation; they are part of the model and of its export (default: none)",
        check=between(1, MOST_PIECES),
        decides="student",
    )
    student_kind: str = setting(
        "transformer",
        "student",
        "; ".join(f"{name}: {meaning}" for name, meaning in STUDENT_KINDS.items()),
        choices=tuple(STUDENT_KINDS),
        decides="student",
    )
    static_dim: int | None = setting(
        None,
        "student",
        f"width of the vectors of a static student (default: {USUAL_STATIC_DIM}, or the width of its encoder where that is less)",
        check=between(1),
        decides="student",
    )
    static_lr: float = setting(
        3e-3,
        "student",
        "peak learning rate of a static student, whose --lr is the teacher's alone; greater than 0",
        check=between(0, open_low=True),
        decides="student",
    )
    static_weighting: str = setting(
        "sif",
        "student",
        "start of a static student: sif shortens the vectors of frequent pieces, none leaves all as they are",
        choices=("sif", "none"),
        decides="student",
    )


def check_student_flags(config: Any) -> list[str]:
    """Return the problems of the student's flags with each other: what has no use in a student of that kind or head."""
    problems = []
    static, native = config.student_kind == "static", config.student_head == "native"
    if static and config.embedding_rank is not None:
        problems.append("--embedding_rank: is for transformers; the vectors of a static student get their width by --static_dim")
    if not native:
        return problems
    if static:
        problems.append("--student_head: a static student has no native head; take --student_head mlp")
    if config.student_ngrams is not None:
        problems.append("--student_ngrams: no stock model has a place for n-grams; take --student_head mlp, or drop it")
    if config.embedding_rank is not None:
        problems.append("--embedding_rank: no stock model has factors for embeddings; take --student_head mlp, or drop it")
    if config.student_hidden_size != StudentSettings.student_hidden_size:
        problems.append("--student_hidden_size: a native head has its architecture's width; drop it, or take --student_head mlp")
    if config.pooling != StudentSettings.pooling and config.pipeline == "student_only":
        problems.append(f"--pooling: a native head pools by itself, got {config.pooling}; drop it, or take --student_head mlp")
    return problems
