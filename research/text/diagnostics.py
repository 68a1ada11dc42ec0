"""Warnings before training that save a wasted night: what the tokenizers and the models' sizes promise."""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import nn

from research.evaluation.efficiency import count_parameters

log = logging.getLogger(__name__)
SAMPLE_TEXTS = 2000
HIGH_FERTILITY = 3.0
HIGH_UNKNOWN_SHARE = 0.01
HIGH_LOST_SHARE = 0.01
LOW_ALIGNED_SHARE = 0.9


@dataclass(frozen=True)
class TokenizerFit:
    """How well a tokenizer suits some texts.

    `fertility` is tokens per whitespace word without special tokens (Rust et al. 2021), `unknown_share`
    the share of tokens that are unknown, `lost_share` the share of letters and vowel signs that the
    tokenizer deletes before it looks anything up.
    """

    fertility: float
    unknown_share: float
    lost_share: float

    def faults(self) -> list[str]:
        """Return what is alarming, as clauses of a warning."""
        found = []
        if self.fertility > HIGH_FERTILITY:
            found.append(f"it cuts a word into {self.fertility:.1f} tokens on average, as if it had never seen this language")
        if self.unknown_share > HIGH_UNKNOWN_SHARE:
            found.append(f"{100 * self.unknown_share:.1f} % of its tokens are unknown")
        if self.lost_share > HIGH_LOST_SHARE:
            found.append(
                f"it deletes {100 * self.lost_share:.1f} % of the letters and vowel signs, so different words become the same"
            )
        return found


def inspect_tokenizer(tokenizer: Any, texts: Iterable[str]) -> TokenizerFit:
    """Measure a tokenizer on the first SAMPLE_TEXTS texts."""
    sample = list(islice(texts, SAMPLE_TEXTS))
    encoded = tokenizer(sample, add_special_tokens=False, truncation=False)["input_ids"]
    tokens = sum(map(len, encoded))
    words = sum(len(text.split()) for text in sample)
    unknown = sum(ids.count(tokenizer.unk_token_id) for ids in encoded) if tokenizer.unk_token_id is not None else 0
    return TokenizerFit(tokens / max(words, 1), unknown / max(tokens, 1), measure_lost_share(tokenizer, sample))


def measure_lost_share(tokenizer: Any, sample: list[str]) -> float:
    """Return the share of letters and marks that the tokenizer's normaliser removes.

    Both sides are decomposed and case-folded first, so composing, decomposing and lower-casing count
    as no loss; an uncased English tokenizer that strips "accents" loses the Bangla vowel signs.
    """
    normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
    if normalizer is None:
        return 0.0
    before: Counter[str] = Counter()
    after: Counter[str] = Counter()
    for text in sample:
        before.update(letters_and_marks(text))
        after.update(letters_and_marks(normalizer.normalize_str(text)))
    return (before - after).total() / max(before.total(), 1)


def letters_and_marks(text: str) -> Iterable[str]:
    """Return the letters and marks of a text, decomposed and without case."""
    folded = unicodedata.normalize("NFKD", text).casefold()
    return (character for character in folded if unicodedata.category(character)[0] in "LM")


def report_tokenizer(side: str, tokenizer: Any, texts: Iterable[str]) -> None:
    """Log how well a side's tokenizer suits the texts, as a warning when something is alarming."""
    fit = inspect_tokenizer(tokenizer, texts)
    log.info("%s tokenizer: %.2f tokens per word, %.2f %% unknown", side, fit.fertility, 100 * fit.unknown_share)
    if faults := fit.faults():
        log.warning("warning: the %s's tokenizer does not suit these texts: %s", side, "; ".join(faults))


def report_alignment(aligned_share: float) -> None:
    """Log the share of words that both tokenizers keep whole; only those are compared."""
    log.info("%.1f %% of the words are whole in both tokenizers and will be compared", 100 * aligned_share)
    if aligned_share < LOW_ALIGNED_SHARE:
        log.warning(
            "warning: only %.0f %% of the words can be compared; raise --max_length, or choose tokenizers that keep every word",
            100 * aligned_share,
        )


def report_sizes(teacher_parameters: int, student: nn.Module) -> None:
    """Warn when the student is not smaller than its teacher."""
    student_parameters = count_parameters(student)["parameters_total"]
    if student_parameters >= teacher_parameters:
        log.warning(
            "warning: the student has %.1f M parameters, the teacher %.1f M: nothing is compressed",
            student_parameters / 1e6,
            teacher_parameters / 1e6,
        )
