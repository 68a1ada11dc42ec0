"""Logistic regression on character n-grams, a label at a time: what a table gives without a pretrained model (no torch).

N-grams of 2 to 5 characters within words that stand in two training texts or more, weighted by (1 + log tf) idf and
scaled to unit length. Character n-grams need no word splitter and survive the spellings of comments. Saved as a list of
n-grams and three arrays, so that loading runs no code of the file's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from research.errors import InputError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import TfidfVectorizer

FloatArray = npt.NDArray[np.floating[Any]]
NGRAM_OPTIONS: dict[str, Any] = {"analyzer": "char_wb", "ngram_range": (2, 5), "sublinear_tf": True, "dtype": np.float32}
MIN_TEXTS = 2
INVERSE_PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0)  # what validation chooses from: scikit-learn's C
WEIGHTS_FILE, SETTINGS_FILE = "tfidf.safetensors", "tfidf.json"


@dataclass(frozen=True, eq=False)
class TfidfClassifier:
    """A fitted model: F n-grams, C labels; `weights` (C, F) and `bias` (C,) float32."""

    vectorizer: TfidfVectorizer
    weights: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]

    def predict_logits(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return the logits (N, C) of normalised texts."""
        return np.asarray(self.vectorizer.transform(texts) @ self.weights.T + self.bias, dtype=np.float32)

    def count_parameters(self) -> dict[str, int]:
        """Return the numbers that efficiency.json has of every model; there are neither embeddings nor an encoder."""
        head = self.weights.size + self.bias.size
        return {"parameters_total": head, "parameters_embeddings": 0, "parameters_encoder": 0, "parameters_head": head}

    @property
    def size_mb(self) -> float:
        """MB (10**6 bytes) of the arrays and the n-grams."""
        arrays = self.weights.nbytes + self.bias.nbytes + self.vectorizer.idf_.astype(np.float32).nbytes
        return (arrays + sum(len(ngram.encode()) for ngram in self.vectorizer.vocabulary_)) / 1e6


class TfidfTrainer:
    """Fits a model for any penalty on texts whose n-grams are counted once.

    Args:
        labels: (N, C) float32 with nan for unknown, which is left out of its label's fit.
        positive_weights: (C,) weight of a positive against a negative.
        flag: What asked for it.

    Raises:
        InputError: no n-gram stands in two texts.
    """

    def __init__(
        self, texts: Sequence[str], labels: FloatArray, positive_weights: FloatArray, flag: str = "--pipeline tfidf"
    ) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.vectorizer = TfidfVectorizer(min_df=MIN_TEXTS, **NGRAM_OPTIONS)
        try:
            self._features = self.vectorizer.fit_transform(texts)
        except ValueError as error:
            raise InputError(f"{flag}: the {len(texts)} training texts have no n-grams in common ({error})") from None
        self._labels, self._positive_weights = labels, positive_weights

    def fit(self, inverse_penalty: float) -> TfidfClassifier:
        """Return the model of one penalty, the same whenever it is fitted."""
        return TfidfClassifier(
            self.vectorizer, *fit_labels(self._features, self._labels, self._positive_weights, inverse_penalty)
        )


def fit_labels(
    features: csr_matrix, labels: FloatArray, positive_weights: FloatArray, inverse_penalty: float
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the weights (C, F) and bias (C,) of a logistic regression for each label, by itself.

    Args:
        features: (N, F).
        labels, positive_weights: As for `TfidfTrainer`.
    """
    weights = np.empty((labels.shape[1], features.shape[1]), dtype=np.float32)
    bias = np.empty(labels.shape[1], dtype=np.float32)
    for label, (truth, weight) in enumerate(zip(labels.T, positive_weights, strict=True)):
        weights[label], bias[label] = _fit_label(features, truth, weight, inverse_penalty)
    return weights, bias


def _fit_label(features: csr_matrix, truth: FloatArray, weight: float, inverse_penalty: float) -> tuple[FloatArray, float]:
    from sklearn.linear_model import LogisticRegression

    known = np.flatnonzero(~np.isnan(truth))
    positives = int((truth[known] == 1).sum())
    if not 0 < positives < len(known):  # nothing to tell apart: the log-odds, half a row added to either side
        odds = weight * (positives + 0.5) / (len(known) - positives + 0.5)
        return np.zeros(features.shape[1]), float(np.log(odds))
    # liblinear runs on one thread, so the digits are the same on any number of cores.
    model = LogisticRegression(
        C=inverse_penalty,
        solver="liblinear",
        class_weight={0: 1.0, 1: float(weight)},
        random_state=0,
    )
    model.fit(features[known], truth[known].astype(np.int8))
    return model.coef_[0], float(model.intercept_[0])


def share_ngrams(texts: Iterable[str]) -> bool:
    """Return whether an n-gram stands in two texts, without which a fit has no features; no more are read than that takes."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    # The shortest alone: of a longer one in two texts, its beginning stands in both.
    shortest = NGRAM_OPTIONS["ngram_range"][0]
    list_ngrams = TfidfVectorizer(**NGRAM_OPTIONS | {"ngram_range": (shortest, shortest)}).build_analyzer()
    seen: set[str] = set()
    for text in texts:
        ngrams = set(list_ngrams(text))
        if not seen.isdisjoint(ngrams):
            return True
        seen |= ngrams
    return False


def save_tfidf(model: TfidfClassifier, folder: Path, settings: dict[str, Any]) -> None:
    """Write the model with what a user has to know of it: labels, thresholds, normalisation of the texts."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    idf = model.vectorizer.idf_.astype(np.float32)
    save_file({"weights": model.weights, "bias": model.bias, "idf": idf}, folder / WEIGHTS_FILE)
    ngrams = sorted(model.vectorizer.vocabulary_, key=model.vectorizer.vocabulary_.__getitem__)
    text = json.dumps(settings | {"ngrams": ngrams}, ensure_ascii=False, sort_keys=True)
    (folder / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8", errors="surrogatepass")


def load_tfidf(folder: str | Path) -> tuple[TfidfClassifier, dict[str, Any]]:
    """Read a saved model and its settings; nothing of the files is executed.

    Raises:
        InputError: a file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file
    from sklearn.feature_extraction.text import TfidfVectorizer

    path = Path(folder)
    try:
        arrays = load_file(path / WEIGHTS_FILE)
        settings = json.loads((path / SETTINGS_FILE).read_text(encoding="utf-8", errors="surrogatepass"))
        ngrams = settings.pop("ngrams")
        vectorizer = TfidfVectorizer(vocabulary=ngrams, **NGRAM_OPTIONS)
        vectorizer.idf_ = arrays["idf"]
        model = TfidfClassifier(vectorizer, arrays["weights"], arrays["bias"])
        if model.weights.shape != (len(settings["labels"]), len(ngrams)) or model.bias.shape != (len(settings["labels"]),):
            raise ValueError(f"{model.weights.shape} weights for {len(ngrams)} n-grams and {len(settings['labels'])} labels")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} holds no model of --pipeline tfidf, or a damaged one: {error}. Copy the folder again."
        ) from error
    return model, settings
