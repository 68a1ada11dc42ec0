"""Encoders and tokenizers from a folder or the hub: whole, cut to fewer layers, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.builders import build_encoder, encoder_config
from support.checkpoints import (
    LABELS,
    LAYER_STACKS,
    LAYERS,
    VOCABULARY,
    edit_json,
    token_batch,
)

from research.errors import InputError
from research.models.classifiers import TextClassifier
from research.models.cutting import cut_layers
from research.models.encoders import (
    load_encoder,
    load_model_config,
    load_tokenizer,
    prepare_encoder,
)
from research.models.fingerprint import read_model_files, resolve_model_folder
from research.models.mapping import pick_layers
from research.models.saved import load_classifier


@pytest.mark.parametrize("wanted", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", LAYER_STACKS)
def test_cut_encoder_keeps_the_layers_the_uniform_mapping_pairs(kind: str, wanted: int) -> None:
    config = encoder_config(kind, VOCABULARY, 5, 16, 2, 1)
    encoder = prepare_encoder(transformers.AutoModel.from_config(config)).eval()
    before = list(encoder.get_submodule(LAYER_STACKS[kind]).children())
    ids, mask = token_batch()
    with torch.no_grad():
        embedded = encoder(ids, mask, output_hidden_states=True).hidden_states[0]
        cut = cut_layers(encoder, wanted)
        states = cut(ids, mask, output_hidden_states=True).hidden_states
    after = list(cut.get_submodule(LAYER_STACKS[kind]).children())
    assert [before.index(layer) for layer in after] == [layer - 1 for layer in pick_layers(5, wanted)]
    assert after[-1] is before[-1]
    assert len(states) == wanted + 1
    torch.testing.assert_close(states[0], embedded)
    assert TextClassifier(cut).num_layers == wanted


def test_cutting_to_every_layer_changes_nothing(encoders: dict[str, Path]) -> None:
    encoder = load_encoder(str(encoders["bert"])).eval()
    before = encoder(*token_batch()).last_hidden_state
    assert torch.equal(cut_layers(encoder, LAYERS)(*token_batch()).last_hidden_state, before)


def test_more_layers_than_there_are_is_an_error_naming_both(encoders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"^bert has 3 layers, got 4$"):
        cut_layers(load_encoder(str(encoders["bert"])), 4)


def test_shared_layers_cannot_be_cut(encoders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"albert model cannot be cut"):
        cut_layers(load_encoder(str(encoders["albert"])), 2)


def test_encoder_with_missing_weights_is_refused(bert: Path, tmp_path: Path) -> None:
    folder = build_encoder("bert", tmp_path, VOCABULARY)
    weights = load_file(folder / "model.safetensors")
    dropped = "encoder.layer.1.output.dense.weight"
    save_file(
        {name: tensor for name, tensor in weights.items() if name != dropped}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError, match=rf"1 weights are missing.*{dropped}"):
        load_encoder(str(folder))


def test_missing_pooler_is_no_fault_since_nobody_uses_it(tmp_path: Path) -> None:
    folder = build_encoder("bert", tmp_path, VOCABULARY)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    assert not [name for name, _ in load_encoder(str(folder)).named_parameters() if name.startswith("pooler")]


def test_encoder_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    folder = build_encoder("bert", tmp_path, VOCABULARY)
    edit_json(folder / "config.json", intermediate_size=40)
    with pytest.raises(InputError, match=r"^model [^\n]*$"):
        load_encoder(str(folder))


def test_random_init_takes_the_architecture_only(encoders: dict[str, Path]) -> None:
    torch.manual_seed(0)
    first = load_encoder(str(encoders["bert"]), random_init=True)
    torch.manual_seed(0)
    second = load_encoder(str(encoders["bert"]), random_init=True)
    stored = load_encoder(str(encoders["bert"]))
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert first.state_dict()[name].shape == stored.state_dict()[name].shape
    assert not torch.equal(first.state_dict()[name], stored.state_dict()[name])


@pytest.mark.parametrize("name", ["no-such-organisation/no-such-model", "not a name", "a/b/c", "./missing"])
def test_model_that_does_not_exist_is_an_error_of_one_line_naming_it(name: str) -> None:
    for load in (
        lambda: load_encoder(name),
        lambda: load_encoder(name, random_init=True),
        lambda: load_model_config(name),
        lambda: load_tokenizer(name),
        lambda: load_classifier(name, LABELS),
        lambda: resolve_model_folder(name),
        lambda: read_model_files(name, weights=False),
    ):
        with pytest.raises(InputError) as caught:
            load()
        assert name in str(caught.value) and "\n" not in str(caught.value)
