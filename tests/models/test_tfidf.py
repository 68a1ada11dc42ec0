"""Logistic regression on character n-grams: fitted, saved without code, loaded to the same answers."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from support.builders import KEYWORDS, make_texts

from research.errors import InputError
from research.models.tfidf import TfidfClassifier, TfidfTrainer, fit_labels, load_tfidf, save_tfidf, share_ngrams

TEXTS = make_texts(120)
TRUTH = np.array([[float(keyword in text) for keyword in KEYWORDS[:2]] for text in TEXTS], dtype=np.float32)
SETTINGS = {"labels": ["bully", "sexual"], "thresholds": {"bully": 0.5, "sexual": 0.25}}


def fit(truth: np.ndarray = TRUTH, weights: tuple[float, ...] = (1.0, 3.0)) -> TfidfClassifier:
    return TfidfTrainer(TEXTS, truth, np.array(weights)).fit(3.0)


def test_logits_are_those_of_scikit_learn_on_the_known_rows() -> None:
    truth = TRUTH.copy()
    truth[:20, 1] = np.nan
    features = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=2, sublinear_tf=True).fit(TEXTS).transform(TEXTS)
    known = ~np.isnan(truth[:, 1])
    model = LogisticRegression(C=3.0, class_weight={0: 1.0, 1: 3.0}, solver="liblinear", tol=1e-8).fit(
        features[known], truth[known, 1]
    )
    logits = fit(truth).predict_logits(TEXTS)
    assert logits.shape == (120, 2)
    assert logits[:, 1] == pytest.approx(model.decision_function(features), abs=2e-3)
    assert ((logits[:, 1] > 0) == (TRUTH[:, 1] == 1)).mean() > 0.95


def test_a_label_with_nothing_to_tell_apart_gets_its_log_odds() -> None:
    truth = np.stack([np.ones(120), np.zeros(120)], axis=1).astype(np.float32)
    logits = fit(truth, weights=(1.0, 1.0)).predict_logits(TEXTS)
    assert np.ptp(logits, axis=0) == pytest.approx([0, 0])
    assert logits[0] == pytest.approx([np.log(241), -np.log(241)])


def test_log_odds_weigh_positives_as_a_fit_does() -> None:
    # In a part of the training texts a label may have no positives, though it has a weight by those of all.
    labels = np.zeros((len(TEXTS), 2), np.float32)
    model = TfidfTrainer(TEXTS, labels, np.array([1.0, 8.0])).fit(1.0)
    assert model.bias[1] - model.bias[0] == pytest.approx(np.log(8.0), rel=1e-6)


def test_a_saved_model_answers_alike_and_names_its_settings(tmp_path: Path) -> None:
    model = fit()
    save_tfidf(model, tmp_path / "model", SETTINGS)
    loaded, settings = load_tfidf(tmp_path / "model")
    assert settings == SETTINGS
    assert np.array_equal(loaded.predict_logits(TEXTS), model.predict_logits(TEXTS))
    assert {path.suffix for path in (tmp_path / "model").iterdir()} == {".json", ".safetensors"}
    assert model.count_parameters()["parameters_total"] == 2 * (len(model.vectorizer.vocabulary_) + 1)


@pytest.mark.parametrize("damage", ["absent", "cut short", "other n-grams", "no list"])
def test_a_damaged_model_is_one_line(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    save_tfidf(fit(), folder, SETTINGS)
    settings = json.loads((folder / "tfidf.json").read_text(encoding="utf-8"))
    if damage == "absent":
        shutil.rmtree(folder)
    elif damage == "cut short":
        (folder / "tfidf.safetensors").write_bytes((folder / "tfidf.safetensors").read_bytes()[:40])
    else:
        ngrams = settings["ngrams"][1:] if damage == "other n-grams" else 3
        (folder / "tfidf.json").write_text(json.dumps(settings | {"ngrams": ngrams}), encoding="utf-8")
    with pytest.raises(InputError, match="holds no model of --pipeline tfidf"):
        load_tfidf(folder)


@pytest.mark.parametrize(
    ("texts", "shared"),
    [
        ([], False),
        (["ab ab"], False),
        (["ab", "cd", "ef"], False),
        (["ab", "cd", "xb"], True),
        (["a", "A b"], True),
        (["", " ", ""], False),
    ],
)
def test_n_grams_are_shared_where_a_fit_finds_features(texts: list[str], shared: bool) -> None:
    assert share_ngrams(iter(texts)) is shared
    truth = np.zeros((len(texts), 1), np.float32)
    if shared:
        TfidfTrainer(texts, truth, np.ones(1))
    else:
        with pytest.raises(InputError, match="no n-grams in common"):
            TfidfTrainer(texts, truth, np.ones(1))


def test_no_more_texts_are_read_than_show_it() -> None:
    texts = iter(["ab", "ab", "cd"])
    assert share_ngrams(texts) and next(texts) == "cd"


def test_texts_without_n_grams_in_common_are_one_line() -> None:
    with pytest.raises(InputError, match="the 2 training texts have no n-grams in common"):
        TfidfTrainer(["ab", "cd"], TRUTH[:2], np.ones(2))


def test_weights_of_many_labels_are_held_once_and_in_float32() -> None:
    features, labels = csr_matrix(np.ones((4, 1))), np.zeros((4, 50), dtype=np.float32)
    features.resize((4, 20_000))
    tracemalloc.start()
    try:
        weights, _ = fit_labels(features, labels, np.ones(50), 1.0)
        assert tracemalloc.get_traced_memory()[1] < 1.5 * weights.nbytes
    finally:
        tracemalloc.stop()
