"""What teacher and student return: logits, and on request states and maps."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.checkpoints import (
    ARCHITECTURES,
    HEADS,
    LAYERS,
    build_student,
    logits_of,
    text_batch,
    token_batch,
)
from torch import nn

from research.errors import InputError
from research.models.classifiers import EncoderClassifier, StudentModel, TeacherModel
from research.models.encoders import (
    load_tokenizer,
)


def test_constructors_take_what_the_reference_names() -> None:
    def defaults(kind: type) -> dict[str, Any]:
        parameters = inspect.signature(kind).parameters.values()
        return {entry.name: entry.default for entry in parameters if entry.kind is entry.POSITIONAL_OR_KEYWORD}

    assert defaults(TeacherModel) == {"model_name": "csebuetnlp/banglabert", "num_labels": 5, "dropout": 0.1}
    assert defaults(StudentModel) == {
        "model_name": "distilbert-base-multilingual-cased",
        "num_labels": 5,
        "dropout": 0.1,
        "classifier_hidden_size": 256,
    }


def test_heads_have_the_widths_of_the_reference(bert: Path) -> None:
    def widths(model: EncoderClassifier) -> list[tuple[int, int]]:
        return [(layer.in_features, layer.out_features) for layer in model.classifier if isinstance(layer, nn.Linear)]

    teacher = TeacherModel(str(bert), 3, 0.25)
    assert [type(layer) for layer in teacher.classifier] == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    assert teacher.classifier[2].p == 0.25
    assert widths(teacher) == [(16, 16), (16, 3)]
    assert widths(StudentModel(str(bert), num_labels=4, classifier_hidden_size=8)) == [(16, 8), (8, 4)]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_states_and_maps_come_for_every_layer_and_only_on_request(kind: str, encoders: dict[str, Path]) -> None:
    model = build_student(encoders[kind]).eval()
    ids, mask = token_batch()
    with torch.no_grad():
        plain = model(ids, mask)
        full = model(ids, mask, output_hidden_states=True, output_attentions=True)
    assert set(plain) == {"logits"}
    assert plain["logits"].shape == (2, 3)
    torch.testing.assert_close(full["logits"], plain["logits"], rtol=0, atol=1e-6)
    assert [state.shape for state in full["hidden_states"]] == [(2, 7, model.hidden_size)] * (LAYERS + 1)
    assert [entry.shape for entry in full["attentions"]] == [(2, HEADS, 7, 7)] * LAYERS
    maps = torch.stack(full["attentions"])
    torch.testing.assert_close(maps.sum(dim=-1)[..., mask.bool().all(dim=0)], torch.ones(LAYERS, 2, HEADS, 5))
    assert (maps[:, 1, :, :5, 5:] == 0).all()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_maps_are_those_of_the_open_attention_kernel(kind: str, encoders: dict[str, Path]) -> None:
    ids, mask = token_batch()
    eager = transformers.AutoModel.from_pretrained(encoders[kind], attn_implementation="eager").eval()
    model = build_student(encoders[kind]).eval()
    with torch.no_grad():
        expected = eager(ids, mask, output_attentions=True, output_hidden_states=True)
        found = model(ids, mask, output_attentions=True, output_hidden_states=True)
        averaged = model(ids, mask, attention_layers=(2,))["attention_maps"]
    for left, right in zip(found["attentions"], expected.attentions, strict=True):
        torch.testing.assert_close(left[0], right[0], rtol=0, atol=1e-6)
    for left, right in zip(found["hidden_states"], expected.hidden_states, strict=True):
        torch.testing.assert_close(left[0], right[0], rtol=0, atol=1e-5)
    assert list(averaged) == [2]
    torch.testing.assert_close(averaged[2][0], expected.attentions[1][0].mean(dim=0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_padding_never_changes_logits(kind: str, pooling: str, encoders: dict[str, Path]) -> None:
    model = build_student(encoders[kind], pooling=pooling)
    torch.testing.assert_close(logits_of(model, token_batch(9)), logits_of(model, token_batch()), rtol=0, atol=1e-6)


def test_mean_pooling_averages_real_tokens_only(bert: Path) -> None:
    model = build_student(bert, pooling="mean").eval()
    ids, mask = text_batch(load_tokenizer(str(bert)))
    with torch.no_grad():
        states = model.encoder(ids, mask).last_hidden_state
        vectors = torch.stack([row[: int(length)].mean(dim=0) for row, length in zip(states, mask.sum(dim=1), strict=True)])
        expected = model.classifier(vectors)
    torch.testing.assert_close(logits_of(model, (ids, mask)), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(logits_of(build_student(bert), (ids, mask)), expected, atol=1e-3)


def test_relations_are_an_error_where_the_attention_gives_none(encoders: dict[str, Path]) -> None:
    model = build_student(encoders["deberta-v2"])
    with pytest.raises(InputError, match=r"deberta-v2 model.*layer 2 of 3.*--attention_objective mse"):
        model(*token_batch(), relation_layers=(2,))
