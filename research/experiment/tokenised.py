"""The texts of a run as each model reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from research.errors import InputError
from research.experiment.inputs import Inputs, TeacherSource
from research.models.classifiers import ModelShape
from research.storage.arrays import read_blocks
from research.storage.cache import Cache
from research.text.diagnostics import report_alignment, report_tokenizer
from research.text.tokens import Tokens, fingerprint_tokenizer, tokenize, tokens_key
from research.text.words import WordPairs, pair_words


@dataclass(frozen=True)
class Tokenised:
    """Every text's tokens by the teacher's and by the student's tokenizer, None for a model that the run has not.

    `words` pairs the two where their ids differ and layers are compared. With several teachers, `teacher` is the
    first's, and `others` those of the teachers whose tokenizer is another, by the teacher's name.
    """

    teacher: Tokens | None
    student: Tokens | None
    words: WordPairs | None = None
    others: Mapping[str, Tokens] = field(default_factory=dict)

    def of_teacher(self, name: str) -> Tokens:
        """Return the tokens that a teacher reads."""
        tokens = self.others.get(name, self.teacher)
        assert tokens is not None
        return tokens


def tokenise_comments(inputs: Inputs, cache: Cache) -> Tokenised:
    """Tokenise every text with each model's own tokenizer, and pair the words when the ids differ.

    Raises:
        InputError: a tokenizer gives ids that its model has no embedding for, or lacks what the method needs.
    """
    with_words = needs_words(inputs)
    teacher = _tokenise_side("teacher", inputs.teacher_tokenizer, inputs, cache, with_words)
    student = _tokenise_side("student", inputs.student_tokenizer, inputs, cache, with_words)
    pair = _pair_sides(teacher, student, inputs, cache)
    return dataclasses.replace(pair, others=_tokenise_others(teacher, inputs, cache))


def _pair_sides(teacher: Tokens | None, student: Tokens | None, inputs: Inputs, cache: Cache) -> Tokenised:
    two_tokenizers, with_words = has_two_tokenizers(inputs), needs_words(inputs)
    if teacher is not None:
        report_tokenizer("teacher", inputs.teacher_tokenizer, inputs.comments.iter_texts())
    if student is not None and (teacher is None or two_tokenizers):
        report_tokenizer("student", inputs.student_tokenizer, inputs.comments.iter_texts())
    if teacher is None or student is None:
        return Tokenised(teacher, student)
    if not two_tokenizers:
        # One memory map for both, so that its pages count once.
        return Tokenised(teacher, dataclasses.replace(teacher, pad_id=student.pad_id))
    if not with_words or student.same_ids(teacher):
        return Tokenised(teacher, student)
    words = pair_words(student, teacher, cache)
    report_alignment(words.aligned_share)
    return Tokenised(teacher, student, words)


def _tokenise_others(first: Tokens | None, inputs: Inputs, cache: Cache) -> dict[str, Tokens]:
    """Return the tokens of the teachers after the first whose tokenizer is not the first's."""
    others = {}
    for source in inputs.teachers[1:]:
        assert first is not None
        if has_own_tokenizer(source, inputs):
            others[source.name] = tokenize(inputs.comments, source.tokenizer, inputs.config.max_length, cache, with_words=False)
            report_tokenizer(source.name, source.tokenizer, inputs.comments.iter_texts())
        check_vocabulary(source.flag, others.get(source.name, first), source.shape)
    return others


def has_own_tokenizer(source: TeacherSource, inputs: Inputs) -> bool:
    """Whether a teacher reads other tokens than the first."""
    return fingerprint_tokenizer(source.tokenizer) != fingerprint_tokenizer(inputs.teacher_tokenizer)


def has_two_tokenizers(inputs: Inputs) -> bool:
    """Whether teacher and student have tokenizers that differ."""
    present = [tokenizer for tokenizer in (inputs.teacher_tokenizer, inputs.student_tokenizer) if tokenizer is not None]
    return len(set(map(fingerprint_tokenizer, present))) == 2


def needs_words(inputs: Inputs) -> bool:
    """Whether tokens have to be known by their words: layers are compared across two tokenizers."""
    method = inputs.config.method
    return (method.hidden or method.attention) and has_two_tokenizers(inputs)


def token_keys(inputs: Inputs) -> dict[str, dict[str, Any]]:
    """Return what each present model's tokens depend on, by side."""
    sides = {"teacher": inputs.teacher_tokenizer, "student": inputs.student_tokenizer}
    with_words, max_length = needs_words(inputs), inputs.config.max_length
    keys = {
        side: tokens_key(inputs.comments, tokenizer, max_length, with_words=with_words)
        for side, tokenizer in sides.items()
        if tokenizer is not None
    }
    return keys | {
        source.name: tokens_key(inputs.comments, source.tokenizer, max_length, with_words=False)
        for source in inputs.teachers[1:]
        if has_own_tokenizer(source, inputs)
    }


def _tokenise_side(side: str, tokenizer: object, inputs: Inputs, cache: Cache, with_words: bool) -> Tokens | None:
    if tokenizer is None:
        return None
    tokens = tokenize(inputs.comments, tokenizer, inputs.config.max_length, cache, with_words=with_words)
    flag = inputs.teachers[0].flag if side == "teacher" else "student_path"
    check_vocabulary(flag, tokens, inputs.shapes[side])
    return tokens


def check_vocabulary(flag: str, tokens: Tokens, shape: ModelShape) -> None:
    """Refuse token ids that the model has no embedding for."""
    largest = max((int(block.max()) for block in read_blocks(tokens.ids)), default=0)
    if largest >= shape.vocabulary:
        raise InputError(
            f"--{flag}: its tokenizer gives ids up to {largest}, its model has {shape.vocabulary} embeddings; "
            "they do not belong together"
        )
