"""The wide part of a classifier: its n-grams are those of a dictionary, its features those of tf-idf, its file the same model."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from support.checkpoints import LABELS, VOCABULARY, build_student, edit_json, logits_of, token_batch

from research.errors import InputError
from research.models import ngram_table
from research.models.encoders import load_tokenizer
from research.models.folders import read_own_config
from research.models.ngram_table import NgramTable, check_countable, list_ngrams, number_ngrams
from research.models.ngrams import NgramBranch, build_branch
from research.models.saved import load_classifier, save_classifier

TEXTS = [[5, 6, 7, 6, 7], [6, 7], [5, 6, 7], [9], [8, 8, 8], [8, 8], []]
LONGEST = 3


def ragged(texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(sum(texts, []), dtype=np.int32), np.cumsum([0, *map(len, texts)])


def ngrams_of(text: list[int], longest: int = LONGEST) -> list[tuple[int, ...]]:
    return [tuple(text[at : at + k]) for k in range(1, longest + 1) for at in range(len(text) - k + 1)]


def code_of(ngram: tuple[int, ...]) -> int:
    return sum((piece + 1) * (VOCABULARY + 1) ** place for place, piece in enumerate(reversed(ngram)))


def fit_random(table: NgramTable, num_labels: int = 3, share: float = 0.6) -> tuple[NgramBranch, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    weights = random.normal(size=(num_labels, len(table.codes))).astype(np.float32)
    bias = random.normal(size=num_labels).astype(np.float32)
    return build_branch(table, weights, bias, share), weights, bias


@pytest.fixture
def table() -> NgramTable:
    return list_ngrams(*ragged(TEXTS), VOCABULARY, LONGEST)


def test_table_holds_what_two_texts_have_in_common(table: NgramTable) -> None:
    held = Counter(ngram for text in TEXTS for ngram in set(ngrams_of(text)))
    expected = {code_of(ngram): count for ngram, count in held.items() if count >= 2}
    assert dict.fromkeys(table.codes.tolist()) == dict.fromkeys(sorted(expected))
    idf = [math.log((1 + len(TEXTS)) / (1 + expected[code])) + 1 for code in table.codes.tolist()]
    np.testing.assert_allclose(table.idf, idf, rtol=1e-12)


def test_codes_of_unlike_ngrams_are_unlike() -> None:
    texts = [[first, second, third] for first in range(4) for second in range(4) for third in range(4)]
    codes, rows = number_ngrams(*ragged(texts), 4, LONGEST)
    ngrams = {ngram for text in texts for ngram in ngrams_of(text)}
    assert (
        len(np.unique(codes)) == len(ngrams) and len(codes) == 6 * len(texts) and np.bincount(rows).tolist() == [6] * len(texts)
    )


def test_of_too_many_ngrams_those_in_most_texts_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram_table, "MOST_NGRAMS", 3)
    kept = list_ngrams(*ragged(TEXTS), VOCABULARY, LONGEST)
    assert kept.codes.tolist() == sorted(code_of(ngram) for ngram in [(6,), (7,), (6, 7)])


def test_features_are_tfidf_of_unit_length_where_nothing_repeats() -> None:
    texts = [[5, 6, 7, 9], [6, 7, 8], [5, 6, 8, 7], [9, 5, 6]]
    table = list_ngrams(*ragged(texts), VOCABULARY, LONGEST)
    vectorizer = TfidfVectorizer(analyzer=lambda text: [str(code_of(ngram)) for ngram in ngrams_of(text)], min_df=2)
    expected = vectorizer.fit_transform(texts).toarray()
    order = [vectorizer.vocabulary_[str(code)] for code in table.codes.tolist()]
    np.testing.assert_allclose(table.weigh(*ragged(texts)).toarray(), expected[:, order], atol=1e-12)


def test_features_of_texts_without_a_known_ngram_are_zero(table: NgramTable) -> None:
    features = table.weigh(*ragged([[40, 41], [], [5]])).toarray()
    assert not features[:2].any() and features[2].sum() == pytest.approx(1.0)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_branch_is_the_regression_on_the_features(table: NgramTable, share: float) -> None:
    branch, weights, bias = fit_random(table, share=share)
    texts = [*TEXTS[:-1], [5, 6, 7, 8, 8, 40, 6, 7], [40]]
    width = max(map(len, texts))
    # Padding is filled with a known piece, on the right of some texts and on the left of others.
    ids = torch.tensor(
        [[6] * (width - len(text)) + text if row % 2 else text + [6] * (width - len(text)) for row, text in enumerate(texts)]
    )
    mask = torch.tensor(
        [
            [0] * (width - len(text)) + [1] * len(text) if row % 2 else [1] * len(text) + [0] * (width - len(text))
            for row, text in enumerate(texts)
        ]
    )
    layers = torch.from_numpy(np.random.default_rng(1).normal(size=(len(texts), 3)))
    expected = (1 - share) * layers.numpy() + share * (table.weigh(*ragged(texts)) @ weights.T + bias)
    np.testing.assert_allclose(branch(layers, ids, mask).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 9])
def test_every_code_is_found_at_its_place_and_no_other_is(size: int) -> None:
    branch = NgramBranch(size, 1, VOCABULARY, 1)
    branch.codes.copy_(torch.arange(size) * 10 + 5)
    assert branch.search(branch.codes).tolist() == list(range(size))
    others = torch.arange(0, 10 * size + 10)
    places = branch.search(others)
    assert [int(code) for code in others if branch.codes[places[code]] == code] == branch.codes.tolist()


def test_more_pieces_than_can_be_numbered_are_refused() -> None:
    check_countable(2_097_150, 3)
    with pytest.raises(InputError, match="of a vocabulary of 2097151 pieces can be at most 2 pieces long, got 3"):
        check_countable(2_097_151, 3)


@pytest.fixture
def saved(encoders: dict[str, Path], bert: Path, tmp_path: Path) -> Path:
    """A student whose n-grams are those of `token_batch`."""
    student = build_student(encoders["bert"])
    ids, mask = token_batch()
    texts = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
    student.ngrams, _, _ = fit_random(list_ngrams(*ragged(texts * 2), VOCABULARY, LONGEST))
    before = logits_of(student, token_batch())
    save_classifier(student, load_tokenizer(str(bert)), tmp_path / "student", {"labels": list(LABELS)})
    assert torch.equal(logits_of(load_classifier(str(tmp_path / "student"), LABELS).model, token_batch()), before)
    student.ngrams = None
    assert not torch.allclose(logits_of(student, token_batch()), before, atol=0.1)
    return tmp_path / "student"


def test_saved_ngrams_follow_the_labels(saved: Path) -> None:
    straight = logits_of(load_classifier(str(saved), LABELS).model, token_batch())
    turned = logits_of(load_classifier(str(saved), LABELS[::-1]).model, token_batch())
    torch.testing.assert_close(turned, straight.flip(1))
    single = logits_of(load_classifier(str(saved), LABELS[1:2]).model, token_batch())
    torch.testing.assert_close(single, straight[:, 1:2])


def test_padding_changes_no_logit(saved: Path) -> None:
    model = load_classifier(str(saved), LABELS).model
    torch.testing.assert_close(logits_of(model, token_batch(padding=4)), logits_of(model, token_batch()), rtol=1e-5, atol=1e-5)


def test_versions_that_know_no_ngrams_do_not_take_the_folder_for_theirs(saved: Path) -> None:
    own = read_own_config(saved)
    assert own is not None and own["model_type"] == "research_kd_classifier_with_ngrams"


def test_ngrams_that_are_missing_or_of_another_size_are_refused(saved: Path, encoders: dict[str, Path], bert: Path) -> None:
    own = read_own_config(saved)
    assert own is not None
    settings = own["classifier_settings"]
    for wrong in ({"longest": 3, "vocabulary": 1 << 40}, {"longest": 3}, [3], {"longest": True, "vocabulary": 60}):
        edit_json(saved / "config.json", classifier_settings=settings | {"ngrams": wrong})
        with pytest.raises(InputError, match="does not describe a classifier"):
            load_classifier(str(saved), LABELS)
    edit_json(saved / "config.json", classifier_settings=settings)
    plain = saved.with_name("plain")
    save_classifier(build_student(encoders["bert"]), load_tokenizer(str(bert)), plain, {"labels": list(LABELS)})
    (plain / "model.safetensors").replace(saved / "model.safetensors")
    with pytest.raises(InputError, match=r"model.safetensors does not hold the n-grams that its config.json tells of"):
        load_classifier(str(saved), LABELS)
