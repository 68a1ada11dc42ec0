"""Maps, queries, keys and values of chosen layers, against what transformers computes by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.builders import build_encoder
from transformers import AutoModel

from research.models import attention
from research.models.attention import attention_probs, record_attention, recorded_sdpa
from research.models.classifiers import TeacherModel, narrow_to_first_position

KINDS = ("bert", "electra", "distilbert", "mobilebert", "xlm-roberta", "roberta", "albert", "deberta-v2")


@pytest.fixture(scope="module", params=KINDS)
def encoder_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_encoder(request.param, tmp_path_factory.mktemp(request.param), 60, layers=3, width=32, heads=4)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    input_ids = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 5:] = attention_mask[2, 8:] = 0
    return input_ids, attention_mask


def split_heads(states: torch.Tensor, heads: int) -> torch.Tensor:
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def mask_of(attention_mask: torch.Tensor) -> torch.Tensor:
    return attention_mask.bool()[:, None, None, :]


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


def test_maps_of_a_batch_without_padding_equal_eager_attention(encoder_folder: Path) -> None:
    input_ids, _ = batch()
    eager = AutoModel.from_pretrained(encoder_folder, attn_implementation="eager").eval()
    model = TeacherModel(str(encoder_folder), num_labels=2).eval()
    # Transformers then hands the kernel no mask at all, and the kernel must not take that for a causal one.
    with torch.no_grad():
        expected = eager(input_ids, output_attentions=True).attentions
        found = model(input_ids, torch.ones_like(input_ids), output_attentions=True)["attentions"]
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)


def test_recording_changes_no_logit(encoder_folder: Path) -> None:
    input_ids, attention_mask = batch()
    model = TeacherModel(str(encoder_folder), num_labels=2).eval()
    with torch.no_grad():
        plain = model(input_ids, attention_mask)["logits"]
        recorded = model(input_ids, attention_mask, attention_layers=(2,), output_hidden_states=True)["logits"]
    torch.testing.assert_close(recorded, plain, atol=1e-5, rtol=1e-4)


def test_narrowing_the_last_layer_changes_neither_logits_nor_gradients(encoder_folder: Path) -> None:
    input_ids, attention_mask = batch()
    model = TeacherModel(str(encoder_folder), num_labels=2).eval()
    results = []
    # Whole last states are needed when hidden states are asked for, so that pass is not narrowed.
    for whole in (False, True):
        model.zero_grad()
        logits = model(input_ids, attention_mask, output_hidden_states=whole)["logits"]
        logits.square().sum().backward()
        results.append((logits.detach(), {name: weight.grad for name, weight in model.named_parameters()}))
    (narrow, narrow_gradients), (full, full_gradients) = results
    torch.testing.assert_close(narrow, full, atol=1e-6, rtol=1e-5)
    for name, gradient in full_gradients.items():
        torch.testing.assert_close(narrow_gradients[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "electra", "xlm-roberta"])
def test_a_narrowed_encoder_ends_with_one_position(kind: str, tmp_path: Path) -> None:
    encoder = TeacherModel(str(build_encoder(kind, tmp_path, 60, layers=2, width=32, heads=4)), num_labels=2).encoder.eval()
    input_ids, attention_mask = batch()
    with narrow_to_first_position(encoder):
        narrow = encoder(input_ids, attention_mask=attention_mask).last_hidden_state
    full = encoder(input_ids, attention_mask=attention_mask).last_hidden_state
    assert narrow.shape == (3, 1, 32) and full.shape == (3, 9, 32)
    torch.testing.assert_close(narrow[:, 0], full[:, 0], atol=1e-6, rtol=1e-5)


def test_open_attention_in_training_is_the_fused_one_but_for_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, 6, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    mask[1, ..., 4:] = False
    module = torch.nn.Module()
    module.is_causal = False  # type: ignore[assignment]
    fused, _ = recorded_sdpa(module, query, key, value, mask)
    monkeypatch.setattr(attention, "drop_values", lambda probs, p: probs)
    opened, _ = recorded_sdpa(module, query, key, value, mask, dropout=0.1)
    torch.testing.assert_close(opened, fused, atol=1e-6, rtol=1e-6)


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
    config = model.backbone_config
    width = getattr(config, "true_hidden_size", config.hidden_size)
    assert [part.shape for part in relations[2]] == [(3, 9, width)] * 3
    query, key, _ = (split_heads(part, 4) for part in relations[2])
    probs = attention_probs(query, key, mask_of(attention_mask), None, None)
    with torch.no_grad():
        maps = model(input_ids, attention_mask, output_attentions=True)["attentions"]
    torch.testing.assert_close(probs, maps[1], atol=1e-5, rtol=1e-4)


def test_only_asked_layers_are_computed_in_the_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TeacherModel(str(build_encoder("bert", tmp_path, 60, layers=4)), num_labels=2).eval()
    calls = []
    original = attention.attention_probs

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(attention, "attention_probs", counted)
    model(*batch(), attention_layers=(2, 4))
    assert len(calls) == 2
    model(*batch())
    assert len(calls) == 2


@pytest.mark.parametrize("mask_kind", ["none", "bool", "additive", "causal"])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("biased", [False, True])
def test_open_attention_gives_what_the_fused_kernel_gives(mask_kind: str, key_heads: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 4, 6, 8, generator=generator)
    key, value = torch.randn(2, 2, key_heads, 6, 8, generator=generator)
    module = torch.nn.Module()
    module.is_causal = mask_kind == "causal"  # type: ignore[assignment]
    module.num_key_value_groups = 4 // key_heads  # type: ignore[assignment]
    allowed = (torch.arange(6) < torch.tensor([[6], [3]]))[:, None, None, :]
    mask = {"bool": allowed, "additive": torch.zeros(allowed.shape).masked_fill(~allowed, -1e9)}.get(mask_kind)
    options: dict[str, Any] = {"scaling": 0.3}
    if biased:
        options["position_bias"] = torch.randn(1, 4, 6, 6, generator=generator)
    fused, _ = recorded_sdpa(module, query, key, value, mask, **options)
    with record_attention((1,), "heads") as recorder:
        in_the_open, _ = recorded_sdpa(module, query, key, value, mask, **options)
    torch.testing.assert_close(in_the_open, fused, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(recorder.maps[1].sum(dim=-1), torch.ones(2, 4, 6))


def test_dropout_falls_on_the_output_and_not_on_the_recorded_map() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = torch.randn(3, 2, 4, 6, 8, generator=generator)
    module = torch.nn.Module()
    module.is_causal = False  # type: ignore[assignment]
    with record_attention((1,), "heads") as recorder:
        dropped, _ = recorded_sdpa(module, query, key, value, None, dropout=0.5)
    torch.testing.assert_close(recorder.maps[1].sum(dim=-1), torch.ones(2, 4, 6))
    assert not torch.allclose(dropped, (recorder.maps[1] @ value).transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maps_of_half_precision_states_are_float32_distributions(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    # The products reach 40 * 40 * 64 = 102400, over float16's largest value; scaled they are 12800.
    query = torch.full((1, 1, 5, 64), 40.0, dtype=dtype)
    key, value = query.clone(), torch.randn(1, 1, 5, 64, generator=generator).to(dtype)
    module = torch.nn.Module()
    module.is_causal = False  # type: ignore[assignment]
    with record_attention((1,), "mean") as recorder:
        output, _ = recorded_sdpa(module, query, key, value, None)
    assert output.dtype == dtype
    assert recorder.maps[1].dtype == torch.float32
    torch.testing.assert_close(recorder.maps[1], torch.full((1, 5, 5), 0.2), rtol=0, atol=1e-6)


def test_recording_ends_with_its_block(tmp_path: Path) -> None:
    model = TeacherModel(str(build_encoder("bert", tmp_path, 60)), num_labels=2).eval()
    with record_attention((1,), "mean") as recorder, torch.no_grad():
        model.encoder(*batch())
    model.encoder(*batch())
    assert (recorder.layers_run, sorted(recorder.maps)) == (2, [1])
