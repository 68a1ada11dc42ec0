"""The texts of a run as each model reads them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from research.errors import InputError
from research.experiment.inputs import Inputs
from research.models.classifiers import ModelShape
from research.storage.arrays import release_pages
from research.storage.cache import Cache
from research.text.diagnostics import report_alignment, report_tokenizer
from research.text.tokens import Tokens, fingerprint_tokenizer, tokenize, tokens_key
from research.text.words import WordPairs, pair_words


@dataclass(frozen=True)
class Tokenised:
    """Every text's tokens by the teacher's and by the student's tokenizer, None for a model that the run has not.

    `words` pairs the two where their ids differ and layers are compared.
    """

    teacher: Tokens | None
    student: Tokens | None
    words: WordPairs | None = None


def tokenise_comments(inputs: Inputs, cache: Cache) -> Tokenised:
    """Tokenise every text with each model's own tokenizer, and pair the words when the ids differ.

    Raises:
        InputError: a tokenizer gives ids that its model has no embedding for, or lacks what the method needs.
    """
    two_tokenizers = has_two_tokenizers(inputs)
    with_words = needs_words(inputs)
    teacher = _tokenise_side("teacher", inputs.teacher_tokenizer, inputs, cache, with_words)
    student = _tokenise_side("student", inputs.student_tokenizer, inputs, cache, with_words)
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
    return {
        side: tokens_key(inputs.comments, tokenizer, max_length, with_words=with_words)
        for side, tokenizer in sides.items()
        if tokenizer is not None
    }


def _tokenise_side(side: str, tokenizer: object, inputs: Inputs, cache: Cache, with_words: bool) -> Tokens | None:
    if tokenizer is None:
        return None
    tokens = tokenize(inputs.comments, tokenizer, inputs.config.max_length, cache, with_words=with_words)
    check_vocabulary(side, tokens, inputs.shapes[side])
    return tokens


def check_vocabulary(side: str, tokens: Tokens, shape: ModelShape) -> None:
    """Refuse token ids that the model has no embedding for."""
    largest = int(tokens.ids.max(initial=0))
    release_pages(tokens.ids)
    if largest >= shape.vocabulary:
        raise InputError(
            f"--{side}_path: its tokenizer gives ids up to {largest}, its model has {shape.vocabulary} embeddings; "
            "they do not belong together"
        )
