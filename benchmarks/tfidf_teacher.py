r"""Write the probabilities of a teacher that reads characters only, for --teacher_probs_path beside a transformer.

    python benchmarks/tfidf_teacher.py --train train.csv --others validation.csv test.csv --text_column comment \
        --label_columns bully sexual religious threat spam --output tfidf_probs.csv
    python research_main.py --dataset_path train.csv --val_path validation.csv --test_path test.csv --text_column comment \
        --teacher_checkpoint results/x/teacher --teacher_probs_path tfidf_probs.csv ...

Logistic regressions on character n-grams, as fitted by hand for docs/experiments.md. What they say of a training text is
cross-fitted, by a model that did not learn from that text or an equal one: on its own texts a model repeats the labels,
which the hard loss has already. Other tables' texts are answered by a model of all training texts.
"""

from __future__ import annotations

import argparse
import csv
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def normalise(rows: Sequence[dict[str, str]], text_column: str) -> list[str]:
    return [unicodedata.normalize("NFC", row[text_column]) for row in rows]


def fit_and_answer(texts: Sequence[str], labels: np.ndarray, others: Sequence[str]) -> np.ndarray:
    """Return the probabilities (M, C) of other texts by models of N texts with labels (N, C)."""
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), min_df=2, sublinear_tf=True)
    features, asked = vectorizer.fit_transform(texts), vectorizer.transform(others)
    answers = []
    for column in labels.T:
        model = LogisticRegression(C=4, class_weight="balanced", solver="liblinear").fit(features, column)
        answers.append(model.predict_proba(asked)[:, 1])
    return np.stack(answers, axis=1)


def cross_fit(texts: Sequence[str], labels: np.ndarray, folds: int) -> np.ndarray:
    """Return the probabilities (N, C) of the training texts, each by a model that has seen no text equal to it."""
    _, groups = np.unique(texts, return_inverse=True)
    probs = np.empty_like(labels)
    for train, held_out in GroupKFold(folds, shuffle=True, random_state=0).split(texts, groups=groups):
        probs[held_out] = fit_and_answer([texts[row] for row in train], labels[train], [texts[row] for row in held_out])
    return probs


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="table to learn from, all labels known")
    parser.add_argument("--others", type=Path, nargs="*", default=[], help="tables whose texts are to be answered too")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--label_columns", nargs="+", required=True)
    parser.add_argument("--folds", type=int, default=5, help="of cross-fitting (default: 5)")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    rows = read_table(arguments.train)
    texts = normalise(rows, arguments.text_column)
    labels = np.array([[float(row[label]) for label in arguments.label_columns] for row in rows])
    answered = [*zip([row[arguments.text_column] for row in rows], cross_fit(texts, labels, arguments.folds), strict=True)]
    for path in arguments.others:
        other = read_table(path)
        probs = fit_and_answer(texts, labels, normalise(other, arguments.text_column))
        answered += zip([row[arguments.text_column] for row in other], probs, strict=True)
    with arguments.output.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([arguments.text_column, *arguments.label_columns])
        writer.writerows([text, *map(float, probs)] for text, probs in answered)
    return 0


if __name__ == "__main__":
    sys.exit(main())
