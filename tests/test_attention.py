"""Maps, queries, keys and values of chosen layers, against what transformers computes by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import build_encoder
from transformers import AutoModel

import research_attention
from research_models import TeacherModel

KINDS = ("bert", "electra", "distilbert", "mobilebert", "xlm-roberta", "roberta", "albert", "deberta-v2")


@pytest.fixture(scope="module", params=KINDS)
def encoder_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_encoder(request.param, tmp_path_factory.mktemp(request.param), 60, layers=3, width=32, heads=4)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    input_ids = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 5:] = attention_mask[2, 8:] = 0
    return input_ids, attention_mask


def test_recorded_maps_equal_those_of_the_models_own_eager_attention(encoder_folder: Path) -> None:
    input_ids, attention_mask = batch()
    eager = AutoModel.from_pretrained(encoder_folder, attn_implementation="eager").eval()
    model = TeacherModel(str(encoder_folder), num_labels=2).eval()
    with torch.no_grad():
        expected = eager(input_ids, attention_mask, output_attentions=True).attentions
        full = model(input_ids, attention_mask, output_attentions=True)["attentions"]
        chosen = model(input_ids, attention_mask, attention_layers=(1, 3))["attention_maps"]
    assert len(full) == len(expected) == 3
    real = attention_mask.bool()
    for layer in range(3):
        for row in range(3):
            torch.testing.assert_close(full[layer][row][:, real[row]], expected[layer][row][:, real[row]], atol=1e-5, rtol=1e-4)
    assert sorted(chosen) == [1, 3]
    for layer, averaged in chosen.items():
        torch.testing.assert_close(averaged[real], expected[layer - 1].mean(dim=1)[real], atol=1e-5, rtol=1e-4)


def test_recording_changes_no_logit(encoder_folder: Path) -> None:
    input_ids, attention_mask = batch()
    model = TeacherModel(str(encoder_folder), num_labels=2).eval()
    with torch.no_grad():
        plain = model(input_ids, attention_mask)["logits"]
        recorded = model(input_ids, attention_mask, attention_layers=(2,), output_hidden_states=True)["logits"]
    torch.testing.assert_close(recorded, plain, atol=1e-5, rtol=1e-4)


def test_rows_of_recorded_maps_are_distributions_in_training_too(encoder_folder: Path) -> None:
    if "deberta" in encoder_folder.name:
        pytest.skip("DeBERTa gives its own maps, after dropout")
    input_ids, attention_mask = batch()
    model = TeacherModel(str(encoder_folder), num_labels=2).train()
    attention = model(input_ids, attention_mask, attention_layers=(1,))["attention_maps"][1]
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(3, 9))
    assert attention.requires_grad


def test_relations_are_queries_keys_and_values_of_the_asked_layers(encoder_folder: Path) -> None:
    input_ids, attention_mask = batch()
    model = TeacherModel(str(encoder_folder), num_labels=2).eval()
    if "deberta" in encoder_folder.name:
        with pytest.raises(ValueError, match="gives nothing for layer 2"):
            model(input_ids, attention_mask, relation_layers=(2,))
        return
    relations = model(input_ids, attention_mask, relation_layers=(2,))["relations"]
    assert list(relations) == [2]
    assert len(relations[2]) == 3
    assert all(part.shape[:2] == (3, 9) for part in relations[2])


def test_only_asked_layers_are_computed_in_the_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TeacherModel(str(build_encoder("bert", tmp_path, 60, layers=4)), num_labels=2).eval()
    calls = []
    original = research_attention.attention_probs

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(research_attention, "attention_probs", counted)
    model(*batch(), attention_layers=(2, 4))
    assert len(calls) == 2
    model(*batch())
    assert len(calls) == 2
