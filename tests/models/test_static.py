"""A static student: the vectors of model2vec's recipe, in a model that is saved and loaded as any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import LABELS, TEXTS, build_student, logits_of, text_batch

from research.evaluation.efficiency import count_parameters
from research.models.classifiers import ModelShape
from research.models.encoders import load_encoder, load_tokenizer
from research.models.saved import load_classifier, save_classifier
from research.models.static import SIF_SMOOTHING, StaticEncoder, build_static, read_pieces, sif_weights

WIDTH = 5


@pytest.fixture
def static(bert: Path) -> StaticEncoder:
    return build_static(load_encoder(str(bert)), load_tokenizer(str(bert)), WIDTH, None)


def test_vectors_are_the_principal_components_of_what_the_encoder_says_of_each_piece(bert: Path, static: StaticEncoder) -> None:
    tokenizer, encoder = load_tokenizer(str(bert)), load_encoder(str(bert)).eval()
    rows = []
    with torch.no_grad():
        for piece in range(len(tokenizer)):
            ids = torch.tensor([[tokenizer.cls_token_id, piece, tokenizer.sep_token_id]])
            rows.append(encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].mean(dim=0).numpy())
    outputs = np.array(rows, dtype=np.float64)
    centred = outputs - outputs.mean(axis=0)
    _, _, components = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ components[:WIDTH].T
    expected[tokenizer.all_special_ids] = 0.0
    found = static.embeddings.weight.detach().numpy()
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=2e-5)  # a component's sign is free
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=2e-5)


def test_frequent_pieces_weigh_less(bert: Path, static: StaticEncoder) -> None:
    counts = np.arange(60)
    weighted = build_static(load_encoder(str(bert)), load_tokenizer(str(bert)), WIDTH, counts)
    factors = np.ones(len(static.embeddings.weight))
    factors[:60] = [SIF_SMOOTHING / (SIF_SMOOTHING + count / counts.sum()) for count in range(60)]
    expected = static.embeddings.weight.detach().numpy() * factors[:, None]
    np.testing.assert_allclose(weighted.embeddings.weight.detach().numpy(), expected, rtol=1e-5, atol=1e-9)
    assert sif_weights(np.zeros(3, dtype=np.int64)).tolist() == [1.0, 1.0, 1.0]


def test_text_vector_is_the_mean_of_its_pieces_whatever_the_padding(bert: Path, static: StaticEncoder) -> None:
    student = build_student(bert, pooling="mean", encoder=static)
    ids, mask = text_batch(load_tokenizer(str(bert)))
    vectors = static.embeddings.weight.detach()
    for row, logits in enumerate(logits_of(student, (ids, mask))):
        mean = torch.stack([vectors[token] for token in ids[row][mask[row] == 1]]).mean(dim=0)
        torch.testing.assert_close(student.classifier(mean), logits)


def test_saved_static_student_gives_equal_logits_and_its_sizes(bert: Path, static: StaticEncoder, tmp_path: Path) -> None:
    student = build_student(bert, pooling="mean", encoder=static)
    tokenizer = load_tokenizer(str(bert))
    save_classifier(student, tokenizer, tmp_path / "student", {"labels": list(LABELS)})
    loaded = load_classifier(str(tmp_path / "student"), LABELS)
    assert torch.equal(logits_of(loaded.model, text_batch(loaded.tokenizer)), logits_of(student, text_batch(tokenizer)))
    assert ModelShape.of(loaded.model.backbone_config) == ModelShape(0, WIDTH, 1, len(static.embeddings.weight))
    counts = count_parameters(loaded.model)
    assert counts["parameters_embeddings"] == static.embeddings.weight.numel()
    assert counts["parameters_encoder"] == 0


def test_pieces_are_read_with_the_special_tokens_around_them_in_any_number(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, tokenizer = load_encoder(str(bert)), load_tokenizer(str(bert))
    at_once = read_pieces(encoder, tokenizer)
    monkeypatch.setattr("research.models.static.PIECES_AT_ONCE", 7)
    np.testing.assert_allclose(read_pieces(encoder, tokenizer), at_once, atol=1e-6)
    assert len(TEXTS) and at_once.shape == (encoder.config.vocab_size, encoder.config.hidden_size)  # type: ignore[union-attr]
