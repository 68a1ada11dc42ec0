"""Flags that make the student smaller: what kind of model it is, and which pieces of texts it knows."""

from __future__ import annotations

from dataclasses import dataclass

from research.flags import between, setting

STUDENT_KINDS = {
    "transformer": "the encoder itself",
    "static": "a vector for each piece of the tokenizer, taken from the encoder, and their mean as text vector",
}
USUAL_STATIC_DIM = 256


@dataclass(frozen=True)
class SizeSettings:
    """What a student keeps of its encoder beside its number of layers."""

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
