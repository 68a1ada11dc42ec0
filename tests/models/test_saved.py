"""No checkpoint is ever read wrongly or with a random head."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.builders import TOKENIZERS, encoder_config
from support.checkpoints import (
    LABELS,
    LAYER_STACKS,
    TEXTS,
    build_student,
    edit_json,
    logits_of,
    save_former,
    text_batch,
    token_batch,
)

from research.errors import InputError
from research.models.attention import RECORDED_SDPA
from research.models.classifiers import SequenceClassifier, StudentModel, TextClassifier
from research.models.cutting import cut_layers
from research.models.encoders import (
    load_encoder,
    load_tokenizer,
)
from research.models.saved import load_classifier, match_labels, save_classifier


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


def fault_of(name: Path | str, labels: Sequence[str] = LABELS) -> str:
    with pytest.raises(InputError) as caught:
        load_classifier(str(name), labels)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", LAYER_STACKS)
def test_cut_student_gives_the_same_logits_after_saving(kind: str, encoders: dict[str, Path], bert: Path, tmp_path: Path) -> None:
    student = build_student(encoders[kind], encoder=cut_layers(load_encoder(str(encoders[kind])), 2))
    loaded = load_classifier(str(save_student(student, bert, tmp_path / "student")), LABELS).model
    assert loaded.num_layers == 2
    assert torch.equal(logits_of(loaded, token_batch()), logits_of(student, token_batch()))


def test_saved_student_gives_equal_logits_and_keeps_its_settings(bert: Path, tmp_path: Path) -> None:
    student = build_student(bert, pooling="mean")
    tokenizer = load_tokenizer(str(bert))
    settings = {"labels": list(LABELS), "max_length": 64, "thresholds": {"bully": 0.3}}
    save_classifier(student, tokenizer, tmp_path / "student", settings)
    loaded = load_classifier(str(tmp_path / "student"), LABELS)
    assert torch.equal(logits_of(loaded.model, text_batch(loaded.tokenizer)), logits_of(student, text_batch(tokenizer)))
    assert loaded.settings.items() >= settings.items()


def test_saved_config_holds_neither_a_private_attention_name_nor_a_path(bert: Path, tmp_path: Path) -> None:
    folder = save_student(build_student(bert), bert, tmp_path / "student")
    for path in folder.glob("*.json"):
        written = path.read_text(encoding="utf-8")
        assert RECORDED_SDPA not in written and str(bert) not in written and "_name_or_path" not in written


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
    assert RECORDED_SDPA not in (tmp_path / "ours" / "config.json").read_text(encoding="utf-8")


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


def save_former_student(bert: Path, folder: Path) -> Path:
    return save_former(build_student(bert), load_tokenizer(str(bert)), folder, {"labels": list(LABELS), "max_length": 32})


def test_missing_head_is_an_error_in_every_layout(bert: Path, tmp_path: Path) -> None:
    former = save_former_student(bert, tmp_path / "former")
    (former / "classifier.safetensors").unlink()
    assert "no head beside encoder/" in fault_of(former)
    folder = save_student(build_student(bert), bert, tmp_path / "student")
    weights = load_file(folder / "model.safetensors")
    save_file({name: of for name, of in weights.items() if name.startswith("encoder.")}, folder / "model.safetensors")
    assert "model.safetensors holds no head; expected 0.bias, 0.weight" in fault_of(folder)
    (folder / "model.safetensors").unlink()
    assert "model.safetensors cannot be read" in fault_of(folder)


def rewrite_head(folder: Path, head: dict[str, torch.Tensor]) -> None:
    """Put these tensors in the place of a folder's head, whichever layout it has."""
    if (folder / "classifier.safetensors").exists():
        save_file(head, folder / "classifier.safetensors")
    else:
        encoder = {name: of for name, of in load_file(folder / "model.safetensors").items() if name.startswith("encoder.")}
        save_file(
            encoder | {f"classifier.{name}": of for name, of in head.items()}, folder / "model.safetensors", {"format": "pt"}
        )


def test_head_that_does_not_fit_is_an_error_saying_why(bert: Path, tmp_path: Path) -> None:
    former = save_former_student(bert, tmp_path / "former")
    head = load_file(former / "classifier.safetensors")
    for folder in (former, save_student(build_student(bert), bert, tmp_path / "student")):
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
    former = save_former_student(bert, tmp_path / "former")
    (former / "classifier.json").write_text(content, encoding="utf-8")
    assert "classifier.json" in fault_of(former)
    if content != "not json":
        folder = save_student(build_student(bert), bert, tmp_path / "student")
        edit_json(folder / "config.json", classifier_settings=json.loads(content))
        assert "config.json does not describe a classifier under classifier_settings" in fault_of(folder)


def test_folders_of_former_versions_load_as_they_did(bert: Path, tmp_path: Path) -> None:
    student, tokenizer = build_student(bert, pooling="mean"), load_tokenizer(str(bert))
    settings = {"labels": list(LABELS), "max_length": 32, "text_normalization": "nfc", "thresholds": dict.fromkeys(LABELS, 0.4)}
    loaded = load_classifier(str(save_former(student, tokenizer, tmp_path / "former", settings)), LABELS)
    assert torch.equal(logits_of(loaded.model, text_batch(loaded.tokenizer)), logits_of(student, text_batch(tokenizer)))
    assert loaded.settings == settings | {"classifier_width": 8, "dropout": 0.1, "pooling": "mean"}
    theirs = SequenceClassifier(save_sequence_classifier(tmp_path / "theirs", LABELS), range(3))
    again = load_classifier(str(save_former(theirs, tokenizer, tmp_path / "again", settings)), LABELS).model
    assert torch.equal(logits_of(again, token_batch()), logits_of(theirs, token_batch()))


def test_labels_match_by_exact_name_before_ignoring_case() -> None:
    assert match_labels(["bully", "Bully", "spam"], ["Bully", "SPAM", "bully"], "here") == [1, 2, 0]


def test_two_labels_never_share_one_output() -> None:
    with pytest.raises(InputError, match="its output for insult would stand for Insult and insult") as caught:
        match_labels(["insult", "spam"], ["Insult", "insult"], "models/toxic")
    assert str(caught.value).startswith("models/toxic: ")
