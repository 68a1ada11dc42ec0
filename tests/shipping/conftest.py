"""Small trained classifiers, as a run saves them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.builders import LABELS, build_model_folder, make_texts

from research.models.classifiers import StudentModel
from research.models.encoders import load_tokenizer
from research.models.saved import save_classifier

THRESHOLDS = dict(zip(LABELS, (0.45, 0.5, 0.55, 0.48, 0.52), strict=True))


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved student of random weights: a BERT of two layers with the mean of its tokens as text vector."""
    root = tmp_path_factory.mktemp("student")
    build_model_folder("bert", "wordpiece", root / "encoder", make_texts(60), layers=2, width=32, seed=5)
    torch.manual_seed(1)
    model = StudentModel(str(root / "encoder"), len(LABELS), classifier_hidden_size=16, pooling="mean").eval()
    with torch.no_grad():  # so that probabilities are not all about 0.5
        next(model.classifier[3].parameters()).mul_(20)
    settings = {"labels": list(LABELS), "thresholds": THRESHOLDS, "max_length": 20, "text_normalization": "nfc"}
    save_classifier(model, load_tokenizer(str(root / "encoder")), root / "saved", settings)
    return root / "saved"
