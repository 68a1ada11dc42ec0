"""Teacher and student: what they return, and that no checkpoint is ever read wrongly or with a random head."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.builders import TOKENIZERS, build_encoder, build_model_folder, encoder_config, make_texts
from torch import nn

from research.errors import InputError
from research.models.attention import RECORDED_SDPA
from research.models.classifiers import EncoderClassifier, SequenceClassifier, StudentModel, TeacherModel, TextClassifier
from research.models.cutting import cut_layers
from research.models.encoders import (
    load_encoder,
    load_model_config,
    load_tokenizer,
    prepare_encoder,
)
from research.models.fingerprint import read_model_files, resolve_model_folder
from research.models.mapping import pick_layers
from research.models.saved import load_classifier, save_classifier

ARCHITECTURES = ("bert", "electra", "distilbert", "mobilebert", "xlm-roberta", "roberta", "albert", "deberta-v2")
LAYER_STACKS = {
    "bert": "encoder.layer",
    "electra": "encoder.layer",
    "distilbert": "transformer.layer",
    "mobilebert": "encoder.layer",
    "xlm-roberta": "encoder.layer",
}
LABELS = ("bully", "threat", "spam")
TEXTS = tuple(make_texts(12))
VOCABULARY, HEADS, LAYERS = 60, 4, 3


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


def token_batch(padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids (2, 7 + padding) and their mask; the second row has two padded cells of its own."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (2, 7), generator=generator)
    ids[1, 5:] = 1
    ids = nn.functional.pad(ids, (0, padding), value=1)
    return ids, (ids != 1).long()


def text_batch(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    encoded = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"]


def logits_of(model: TextClassifier, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(*batch)["logits"]


def build_student(folder: Path, num_labels: int = 3, **options: Any) -> StudentModel:
    torch.manual_seed(1)
    return StudentModel(str(folder), num_labels, 0.1, 8, **options)


def save_student(model: TextClassifier, bert: Path, folder: Path, labels: Sequence[str] = LABELS) -> Path:
    save_classifier(model, load_tokenizer(str(bert)), folder, {"labels": list(labels)})
    return folder


def save_sequence_classifier(folder: Path, labels: Sequence[str]) -> Any:
    """Save a fine-tuned transformers classifier with these labels, and return it."""
    tokenizer = TOKENIZERS["wordpiece"](TEXTS, folder, 200)
    config = encoder_config("bert", len(tokenizer), 2, 16, 2, tokenizer.pad_token_id)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: place for place, label in enumerate(labels)}
    torch.manual_seed(2)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    return model


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def fault_of(name: Path | str, labels: Sequence[str] = LABELS) -> str:
    with pytest.raises(InputError) as caught:
        load_classifier(str(name), labels)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What the models return


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


# Cutting layers


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


@pytest.mark.parametrize("kind", LAYER_STACKS)
def test_cut_student_gives_the_same_logits_after_saving(kind: str, encoders: dict[str, Path], bert: Path, tmp_path: Path) -> None:
    student = build_student(encoders[kind], encoder=cut_layers(load_encoder(str(encoders[kind])), 2))
    loaded = load_classifier(str(save_student(student, bert, tmp_path / "student")), LABELS).model
    assert loaded.num_layers == 2
    assert torch.equal(logits_of(loaded, token_batch()), logits_of(student, token_batch()))


def test_more_layers_than_there_are_is_an_error_naming_both(encoders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"^bert has 3 layers, got 4$"):
        cut_layers(load_encoder(str(encoders["bert"])), 4)


def test_shared_layers_cannot_be_cut(encoders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"albert model cannot be cut"):
        cut_layers(load_encoder(str(encoders["albert"])), 2)


# Checkpoints


def test_saved_student_gives_equal_logits_and_keeps_its_settings(bert: Path, tmp_path: Path) -> None:
    student = build_student(bert, pooling="mean")
    tokenizer = load_tokenizer(str(bert))
    settings = {"labels": list(LABELS), "max_length": 64, "thresholds": {"bully": 0.3}}
    save_classifier(student, tokenizer, tmp_path / "student", settings)
    loaded = load_classifier(str(tmp_path / "student"), LABELS)
    assert torch.equal(logits_of(loaded.model, text_batch(loaded.tokenizer)), logits_of(student, text_batch(tokenizer)))
    assert loaded.settings.items() >= settings.items()


def test_saved_encoder_config_holds_no_private_attention_name(bert: Path, tmp_path: Path) -> None:
    save_student(build_student(bert), bert, tmp_path / "student")
    assert RECORDED_SDPA not in (tmp_path / "student" / "encoder" / "config.json").read_text(encoding="utf-8")
    assert transformers.AutoModel.from_pretrained(tmp_path / "student" / "encoder").config.num_hidden_layers == 2


@pytest.mark.parametrize("wanted", [("spam", "bully", "threat"), ("THREAT", "Bully", "spam"), ("threat",)])
def test_saved_labels_are_matched_by_name(wanted: tuple[str, ...], bert: Path, tmp_path: Path) -> None:
    student = build_student(bert)
    loaded = load_classifier(str(save_student(student, bert, tmp_path / "student")), wanted)
    order = [LABELS.index(label.lower()) for label in wanted]
    batch = text_batch(loaded.tokenizer)
    torch.testing.assert_close(logits_of(loaded.model, batch), logits_of(student, batch)[:, order])


@pytest.mark.parametrize(
    "found", [LABELS, ("spam", "bully", "threat"), ("Spam", "BULLY", "threat"), ("x", "spam", "threat", "bully")]
)
def test_labels_of_a_sequence_classifier_are_matched_by_name(found: tuple[str, ...], tmp_path: Path) -> None:
    model = save_sequence_classifier(tmp_path, found)
    loaded = load_classifier(str(tmp_path), LABELS)
    order = [[label.lower() for label in found].index(label) for label in LABELS]
    ids, mask = text_batch(loaded.tokenizer)
    with torch.no_grad():
        expected = model(ids, mask).logits[:, order]
    torch.testing.assert_close(logits_of(loaded.model, (ids, mask)), expected, rtol=0, atol=1e-6)


def test_exact_label_wins_over_one_that_differs_in_case(tmp_path: Path) -> None:
    save_sequence_classifier(tmp_path, ("Spam", "spam", "SPAM"))
    model = load_classifier(str(tmp_path), ("SPAM", "Spam")).model
    assert isinstance(model, SequenceClassifier)
    assert model.label_order.tolist() == [2, 0]


def test_sequence_classifier_is_the_same_after_saving(tmp_path: Path) -> None:
    save_sequence_classifier(tmp_path / "theirs", ("spam", "bully", "threat"))
    first = load_classifier(str(tmp_path / "theirs"), LABELS)
    save_classifier(first.model, first.tokenizer, tmp_path / "ours", {"labels": list(LABELS)})
    second = load_classifier(str(tmp_path / "ours"), LABELS)
    batch = text_batch(first.tokenizer)
    assert torch.equal(logits_of(first.model, batch), logits_of(second.model, text_batch(second.tokenizer)))
    written = (tmp_path / "ours" / "sequence_classifier" / "config.json").read_text(encoding="utf-8")
    assert RECORDED_SDPA not in written


def test_sequence_classifier_gives_states_and_maps_too(tmp_path: Path) -> None:
    save_sequence_classifier(tmp_path, LABELS)
    loaded = load_classifier(str(tmp_path), LABELS)
    ids, mask = text_batch(loaded.tokenizer)
    with torch.no_grad():
        outputs = loaded.model.eval()(ids, mask, output_hidden_states=True, output_attentions=True)
    assert len(outputs["hidden_states"]) == 3
    assert [entry.shape for entry in outputs["attentions"]] == [(len(TEXTS), 2, *ids.shape[1:], *ids.shape[1:])] * 2


def test_generic_label_names_are_an_error_naming_both(tmp_path: Path) -> None:
    save_sequence_classifier(tmp_path, ("LABEL_0", "LABEL_1", "LABEL_2"))
    message = fault_of(tmp_path)
    assert "LABEL_0, LABEL_1, LABEL_2" in message and "bully, threat, spam" in message and "id2label" in message


def test_bare_encoder_is_no_teacher_checkpoint(bert: Path) -> None:
    assert "has no trained head" in fault_of(bert)


def test_head_of_a_sequence_classifier_of_another_size_is_an_error(tmp_path: Path) -> None:
    save_sequence_classifier(tmp_path, ("a", "b", "c", "d"))
    edit_json(tmp_path / "config.json", id2label=dict(enumerate(LABELS)), label2id={})
    assert str(tmp_path) in fault_of(tmp_path)


def test_checkpoint_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    save_sequence_classifier(tmp_path, LABELS)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    assert "no tokenizer" in fault_of(tmp_path)


def test_missing_head_beside_an_encoder_is_an_error(bert: Path, tmp_path: Path) -> None:
    save_student(build_student(bert), bert, tmp_path / "student")
    (tmp_path / "student" / "classifier.safetensors").unlink()
    assert "no head beside encoder/" in fault_of(tmp_path / "student")


def rewrite_head(folder: Path, head: dict[str, torch.Tensor]) -> None:
    save_file(head, folder / "classifier.safetensors")


def test_head_that_does_not_fit_is_an_error_saying_why(bert: Path, tmp_path: Path) -> None:
    folder = save_student(build_student(bert), bert, tmp_path / "student")
    head = load_file(folder / "classifier.safetensors")
    for changes, complaint in (
        ({"0.weight": torch.zeros(8, 20)}, "takes vectors of 20, its encoder gives 16"),
        ({"3.weight": torch.zeros(4, 8), "3.bias": torch.zeros(4)}, "4 outputs for 3 labels"),
        ({"3.weight": torch.zeros(3, 9)}, "do not fit each other"),
        ({"0.bias": torch.zeros(9)}, "do not fit each other"),
        ({"0.weight": torch.zeros(16)}, "do not fit each other"),
    ):
        rewrite_head(folder, head | changes)
        assert complaint in fault_of(folder)


def test_head_file_of_other_keys_is_an_error_listing_them(bert: Path, tmp_path: Path) -> None:
    folder = save_student(build_student(bert), bert, tmp_path / "student")
    rewrite_head(folder, {"dense.weight": torch.zeros(2, 2), "out_proj.weight": torch.zeros(2, 2)})
    message = fault_of(folder)
    assert "dense.weight, out_proj.weight" in message and "expected 0.bias, 0.weight" in message


def save_encoder_and_head(bert: Path, folder: Path, head: Any) -> StudentModel:
    """Save an encoder with its tokenizer and a head as a separate .pt file, without classifier.json."""
    student = build_student(bert)
    student.encoder.save_pretrained(folder / "encoder")  # type: ignore[operator]
    load_tokenizer(str(bert)).save_pretrained(folder / "encoder")
    torch.save(head(student) if callable(head) else head, folder / "head.pt")
    return student


@pytest.mark.parametrize("prefix", ["", "classifier.", "head."])
def test_separate_head_file_is_loaded_with_one_warning(
    prefix: str, bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def prefixed(student: StudentModel) -> dict[str, torch.Tensor]:
        return {prefix + name: tensor for name, tensor in student.classifier.state_dict().items()}

    student = save_encoder_and_head(bert, tmp_path, prefixed)
    loaded = load_classifier(str(tmp_path), LABELS)
    batch = text_batch(loaded.tokenizer)
    assert torch.equal(logits_of(loaded.model, batch), logits_of(student, batch))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "bully, threat, spam" in caplog.text


class Malicious:
    """A pickled object that leaves a file behind when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


def test_pickled_code_in_a_head_file_is_refused_and_not_run(bert: Path, tmp_path: Path) -> None:
    save_encoder_and_head(bert, tmp_path, {"0.weight": Malicious(tmp_path / "executed")})
    assert "head.pt cannot be read" in fault_of(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_pickled_code_in_encoder_weights_is_refused_and_not_run(bert: Path, tmp_path: Path) -> None:
    save_encoder_and_head(bert, tmp_path, {})
    (tmp_path / "encoder" / "model.safetensors").unlink()
    torch.save({"embeddings": Malicious(tmp_path / "executed")}, tmp_path / "encoder" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"^model '.*encoder': cannot be loaded: [^\n]*$"):
        load_encoder(str(tmp_path / "encoder"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {"0.weight": 1, "0.bias": 1, "3.weight": 1, "3.bias": 1}])
def test_head_file_that_holds_no_tensors_by_name_is_an_error(content: Any, bert: Path, tmp_path: Path) -> None:
    save_encoder_and_head(bert, tmp_path, content)
    assert "head.pt" in fault_of(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a head", b"\x80\x02broken"])
@pytest.mark.parametrize("name", ["head.pt", "classifier.safetensors"])
def test_damaged_head_file_is_an_error(name: str, content: bytes, bert: Path, tmp_path: Path) -> None:
    save_encoder_and_head(bert, tmp_path, {})
    (tmp_path / "head.pt").unlink()
    (tmp_path / name).write_bytes(content)
    assert f"{name} cannot be read" in fault_of(tmp_path)


@pytest.mark.parametrize(
    "content", ["[]", "not json", '{"labels": 3}', '{"labels": [1]}', '{"pooling": "max"}', '{"dropout": "x"}']
)
def test_altered_settings_of_a_classifier_are_an_error(content: str, bert: Path, tmp_path: Path) -> None:
    folder = save_student(build_student(bert), bert, tmp_path / "student")
    (folder / "classifier.json").write_text(content, encoding="utf-8")
    assert "classifier.json" in fault_of(folder)


# Encoders


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
