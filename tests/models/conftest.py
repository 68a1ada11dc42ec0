"""Encoders that the tests of the models share."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.builders import build_encoder, build_model_folder
from support.checkpoints import ARCHITECTURES, HEADS, LAYERS, TEXTS, VOCABULARY


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny encoder of every architecture, without a tokenizer."""
    root = tmp_path_factory.mktemp("encoders")
    return {
        kind: build_encoder(kind, root / kind, VOCABULARY, layers=LAYERS, heads=HEADS, pad_token_id=1, seed=3)
        for kind in ARCHITECTURES
    }


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny BERT encoder and its tokenizer."""
    return build_model_folder("bert", "wordpiece", tmp_path_factory.mktemp("bert"), TEXTS, layers=2, width=16)
