"""Factorised embeddings start as the closest product, and come back from disk as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from support.checkpoints import ARCHITECTURES, LABELS, VOCABULARY, build_student, logits_of, token_batch

from research.errors import InputError
from research.evaluation.efficiency import count_parameters
from research.models.cutting import cut_layers, factorise_embeddings, keep_pieces
from research.models.encoders import load_encoder, load_tokenizer
from research.models.saved import load_classifier, save_classifier

RANK = 5


def test_product_is_the_truncated_singular_value_decomposition(encoders: dict[str, Path]) -> None:
    weight = load_encoder(str(encoders["bert"])).get_input_embeddings().weight.detach().double().numpy()  # type: ignore[operator]
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    expected = left[:, :RANK] * values[:RANK] @ right[:RANK]
    factorised = factorise_embeddings(load_encoder(str(encoders["bert"])), RANK)
    found = factorised.get_input_embeddings()(torch.arange(VOCABULARY))  # type: ignore[operator]
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_full_rank_changes_nothing_and_a_saved_student_gives_equal_logits(
    kind: str, encoders: dict[str, Path], bert: Path, tmp_path: Path
) -> None:
    whole = load_encoder(str(encoders[kind]))
    width = whole.get_input_embeddings().embedding_dim  # type: ignore[operator]
    full = build_student(encoders[kind], encoder=factorise_embeddings(load_encoder(str(encoders[kind])), width))
    plain = build_student(encoders[kind], encoder=whole)
    plain.classifier.load_state_dict(full.classifier.state_dict())
    torch.testing.assert_close(logits_of(full, token_batch()), logits_of(plain, token_batch()), rtol=1e-4, atol=1e-5)

    student = build_student(encoders[kind], encoder=factorise_embeddings(load_encoder(str(encoders[kind])), RANK))
    save_classifier(student, load_tokenizer(str(bert)), tmp_path / "student", {"labels": list(LABELS)})
    loaded = load_classifier(str(tmp_path / "student"), LABELS).model
    assert torch.equal(logits_of(loaded, token_batch()), logits_of(student, token_batch()))
    assert count_parameters(loaded) == count_parameters(student)
    saved = count_parameters(plain)["parameters_embeddings"] - count_parameters(loaded)["parameters_embeddings"]
    assert saved == VOCABULARY * width - RANK * (VOCABULARY + width)


def test_cut_trimmed_and_factorised_student_is_one_model(encoders: dict[str, Path], bert: Path, tmp_path: Path) -> None:
    encoder = factorise_embeddings(keep_pieces(cut_layers(load_encoder(str(encoders["roberta"])), 2), range(40)), RANK)
    student = build_student(encoders["roberta"], encoder=encoder)
    save_classifier(student, load_tokenizer(str(bert)), tmp_path / "student", {"labels": list(LABELS)})
    loaded = load_classifier(str(tmp_path / "student"), LABELS).model
    ids, mask = (tensor.clamp_max(39) for tensor in token_batch())
    assert torch.equal(logits_of(loaded, (ids, mask)), logits_of(student, (ids, mask)))


def test_transformers_refuses_the_folder_instead_of_drawing_embeddings(
    encoders: dict[str, Path], bert: Path, tmp_path: Path
) -> None:
    student = build_student(encoders["bert"], encoder=factorise_embeddings(load_encoder(str(encoders["bert"])), RANK))
    save_classifier(student, load_tokenizer(str(bert)), tmp_path / "student", {"labels": list(LABELS)})
    with pytest.raises(ValueError, match="research_kd_classifier"):
        transformers.AutoModel.from_pretrained(tmp_path / "student")


def test_missing_factors_are_refused(encoders: dict[str, Path], bert: Path, tmp_path: Path) -> None:
    student = build_student(encoders["bert"], encoder=factorise_embeddings(load_encoder(str(encoders["bert"])), RANK))
    save_classifier(student, load_tokenizer(str(bert)), tmp_path / "student", {"labels": list(LABELS)})
    plain = build_student(encoders["bert"], encoder=load_encoder(str(encoders["bert"])))
    save_classifier(plain, load_tokenizer(str(bert)), tmp_path / "plain", {"labels": list(LABELS)})
    (tmp_path / "plain" / "model.safetensors").replace(tmp_path / "student" / "model.safetensors")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_classifier(str(tmp_path / "student"), LABELS)


def test_rank_over_that_of_the_embeddings_is_refused(encoders: dict[str, Path]) -> None:
    encoder = load_encoder(str(encoders["bert"]))
    width = encoder.get_input_embeddings().embedding_dim  # type: ignore[operator]
    with pytest.raises(InputError, match=f"bert has embeddings of rank {width}, got --embedding_rank {width + 1}"):
        factorise_embeddings(encoder, width + 1)
