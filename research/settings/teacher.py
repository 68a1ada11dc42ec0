"""Flags of the teachers: which they are, and when one is too weak to learn from."""

from __future__ import annotations

from dataclasses import dataclass

from research.flags import between, setting


@dataclass(frozen=True)
class TeacherSettings:
    """Whom a student learns from."""

    teacher_path: str = setting(
        "csebuetnlp/banglabert", "teacher", "pretrained encoder to fine-tune: folder or hub name", decides="teacher", kind="model"
    )
    teacher_checkpoint: str | tuple[str, ...] | None = setting(
        None,
        "teacher",
        "a fine-tuned teacher: a run's teacher/ folder, an AutoModelForSequenceClassification folder or hub name, "
        "or a folder with encoder/ and a head file; several speak together, as do all those of a run's own folder",
        decides="teacher",
        kind="model",
    )
    teacher_seeds: int | None = setting(
        None,
        "teacher",
        "fine-tune this many teachers from --teacher_path, by --split_seed and the seeds after it, and learn from the mean of "
        "their probabilities (default: 1, none beside --teacher_probs_path)",
        check=between(1),
        decides="ensemble",
    )
    teacher_probs_path: str | None = setting(
        None,
        "teacher",
        "table of another teacher's probabilities: a text column and one column a label, for any of the texts; alone, or beside "
        "--teacher_checkpoint or --teacher_seeds as one more voice in the mean. Texts without any learn from the labels alone",
        decides="ensemble",
        kind="table",
        rows="teacher_probs",
    )
    teacher_tfidf: bool = setting(
        False,
        "teacher",
        "one more voice in the mean: logistic regression on character n-grams, which answers for each training text by a fit "
        "that has not seen it",
        decides="ensemble",
        keyed_at_default=False,
    )
    drop_seen_rows: bool = setting(
        False,
        "teacher",
        "leave rows whose text a model given was trained on (--teacher_checkpoint, or a run's student/ as start) out of "
        "validation and test, instead of refusing it",
        decides="data",
    )
    teacher_epochs: int = setting(10, "teacher", "most epochs of the teacher's fine-tuning", check=between(1), decides="teacher")
    min_teacher_f1: float = setting(
        0.4, "teacher", "validation macro-F1 under which the teacher is too weak, 0 to 1", check=between(0, 1), decides="place"
    )
    allow_weak_teacher: bool = setting(False, "teacher", "distil even from a teacher under --min_teacher_f1", decides="place")
