"""A folder of a classifier is what it passes for: transformers loads it whole, or not at all."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.builders import ROOT, TOKENIZERS, build_encoder, requires_shared, shared_path
from support.checkpoints import LABELS, TEXTS, build_student, logits_of

from research.errors import InputError
from research.models.classifiers import TextClassifier
from research.models.cutting import cut_layers
from research.models.encoders import load_encoder, load_tokenizer
from research.models.native import build_native
from research.models.saved import load_classifier, save_classifier
from research.text.tables import clean_text
from research.text.tokens import fingerprint_tokenizer

SETTINGS = {"labels": list(LABELS), "max_length": 12, "text_normalization": "nfc", "thresholds": dict.fromkeys(LABELS, 0.4)}
# Outer white space, letters that NFC takes apart or puts together, a text past the longest, none at all.
RAW_TEXTS = [f"  {TEXTS[0]} \n", "\u09df\u09a1\u09bc বোকা", "e\u0301 মেঘ", " ".join(TEXTS), "", TEXTS[1]]
NATIVE_KINDS = ("bert", "electra", "distilbert", "roberta", "xlm-roberta", "albert", "deberta-v2", "mobilebert")
FIRST_POSITION = ("bert", "electra", "distilbert", "roberta", "xlm-roberta")


def build(kind: str, folder: Path, layers: int | None = None, tokenizer_kind: str = "wordpiece") -> tuple[TextClassifier, Any]:
    """Return a native student of an architecture, cut if that is asked, and its tokenizer."""
    tokenizer = TOKENIZERS[tokenizer_kind](TEXTS, folder, 320)
    build_encoder(kind, folder, len(tokenizer), layers=3, pad_token_id=tokenizer.pad_token_id, seed=3)
    encoder = load_encoder(str(folder), pooler=True)
    torch.manual_seed(1)
    student = build_native(encoder if layers is None else cut_layers(encoder, layers), LABELS, 0.25)
    # Biases begin at zero, and a head without any is easily mistaken.
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return student.eval(), load_tokenizer(str(folder))


def probs_of(saved: Any, texts: list[str]) -> np.ndarray:
    """Return the suite's probabilities of raw texts, each by itself."""
    rows = []
    for text in texts:
        cleaned = clean_text(text, saved.settings["text_normalization"])
        batch = saved.tokenizer([cleaned], truncation=True, max_length=saved.settings["max_length"], return_tensors="pt")
        rows.append(logits_of(saved.model, (batch["input_ids"], batch["attention_mask"])).sigmoid()[0].numpy())
    return np.array(rows)


def ask_clean_room(folder: Path, texts: list[str], scratch: Path) -> dict[str, Any]:
    """Return what transformers alone says of texts, in a process that cannot import the suite."""
    scratch.mkdir()
    (scratch / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    script = ROOT / "tests" / "support" / "clean_room.py"
    command = [sys.executable, "-I", str(script), str(folder), str(scratch / "texts.json"), str(scratch / "answers.json")]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((scratch / "answers.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", NATIVE_KINDS)
def test_stock_transformers_gives_the_logits_of_a_native_student(kind: str, tmp_path: Path) -> None:
    student, tokenizer = build(kind, tmp_path / "encoder", layers=None if kind == "albert" else 2)
    save_classifier(student, tokenizer, tmp_path / "student", SETTINGS)
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "student", output_loading_info=True
    )
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.problem_type == "multi_label_classification"
    assert [model.config.id2label[place] for place in range(3)] == list(LABELS)
    batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model.eval()(batch["input_ids"], batch["attention_mask"]).logits
    torch.testing.assert_close(logits_of(student, (batch["input_ids"], batch["attention_mask"])), theirs, rtol=0, atol=1e-6)
    loaded = load_classifier(str(tmp_path / "student"), LABELS)
    assert loaded.settings == SETTINGS | {"pooling": "native"}
    assert torch.equal(
        logits_of(loaded.model, (batch["input_ids"], batch["attention_mask"])),
        logits_of(student, (batch["input_ids"], batch["attention_mask"])),
    )


def test_folder_of_a_native_student_gives_the_same_probabilities_in_a_clean_room(tmp_path: Path) -> None:
    student, tokenizer = build("bert", tmp_path / "encoder", 2, "unigram")
    save_classifier(student, tokenizer, tmp_path / "student", SETTINGS)
    answers = ask_clean_room(tmp_path / "student", RAW_TEXTS, tmp_path / "room")
    assert answers["labels"] == list(LABELS)
    expected = probs_of(load_classifier(str(tmp_path / "student")), RAW_TEXTS)
    np.testing.assert_allclose(np.array(answers["probs"]), expected, rtol=0, atol=1e-6)
    assert np.ptp(expected, axis=0).min() > 1e-4  # or every text would get the same answer


@requires_shared
def test_real_comments_get_the_same_probabilities_in_a_clean_room(tmp_path: Path) -> None:
    with shared_path("data", "bn_cyberbully5.csv").open(encoding="utf-8", newline="") as file:
        comments = [row["comment"] for row in csv.DictReader(file)]
    odd = [text for text in comments if text != text.strip() or text != unicodedata.normalize("NFC", text)]
    texts = odd[:100] + comments[:100]
    encoder = shared_path("models", "me5-small-bn")
    torch.manual_seed(0)
    student = build_native(cut_layers(load_encoder(str(encoder), pooler=True), 2), LABELS, 0.1).eval()
    save_classifier(student, load_tokenizer(str(encoder)), tmp_path / "student", SETTINGS | {"max_length": 64})
    answers = ask_clean_room(tmp_path / "student", texts, tmp_path / "room")
    expected = probs_of(load_classifier(str(tmp_path / "student")), texts)
    np.testing.assert_allclose(np.array(answers["probs"]), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("form", ["none", "nfc", "nfkc"])
def test_saved_tokenizer_reads_raw_texts_as_training_read_cleaned_ones(kind: str, form: str, tmp_path: Path) -> None:
    student, tokenizer = build("bert", tmp_path / "encoder", tokenizer_kind=kind)
    save_classifier(student, tokenizer, tmp_path / "student", SETTINGS | {"text_normalization": form})
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path / "student")
    expected = tokenizer([clean_text(text, form) for text in RAW_TEXTS], truncation=True, max_length=12)["input_ids"]
    assert stock(RAW_TEXTS, truncation=True)["input_ids"] == expected
    assert fingerprint_tokenizer(load_classifier(str(tmp_path / "student")).tokenizer) == fingerprint_tokenizer(tokenizer)


def test_tokenizer_of_a_class_that_rebuilds_itself_is_saved_as_it_was(tmp_path: Path) -> None:
    student, tokenizer = build("bert", tmp_path / "encoder")
    own = transformers.BertTokenizer(vocab=tokenizer.get_vocab(), do_lower_case=True)
    save_classifier(student, own, tmp_path / "student", SETTINGS)
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path / "student")
    expected = own([clean_text(text, "nfc") for text in RAW_TEXTS], truncation=True, max_length=12)["input_ids"]
    assert stock(RAW_TEXTS, truncation=True)["input_ids"] == expected


@pytest.mark.parametrize("kind", FIRST_POSITION)
def test_native_head_reads_the_first_position_alone(kind: str, tmp_path: Path) -> None:
    student, tokenizer = build(kind, tmp_path / "encoder")
    batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    gradients = []
    for first_is_enough in (True, False):
        student.first_is_enough = first_is_enough  # type: ignore[assignment]
        student.zero_grad()
        logits = student(batch["input_ids"], batch["attention_mask"])["logits"]
        logits.square().sum().backward()
        gradients.append([logits.detach()] + [entry.grad for entry in student.parameters() if entry.grad is not None])
    for narrowed, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(narrowed, whole, rtol=1e-4, atol=1e-5)


def test_native_head_has_the_dropout_of_the_flag_and_the_encoder_its_own(tmp_path: Path) -> None:
    student, _ = build("roberta", tmp_path / "encoder")
    rates = {name: module.p for name, module in student.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert {rate for name, rate in rates.items() if ".classifier." in name} == {0.25}
    assert {rate for name, rate in rates.items() if ".classifier." not in name} == {0.1}


def test_pretrained_pooler_is_taken_over_and_a_missing_one_depends_on_the_seed_alone(tmp_path: Path) -> None:
    folder = build_encoder("bert", tmp_path, 60, seed=3)
    name = "pooler.dense.weight"
    pretrained = transformers.BertModel.from_pretrained(folder).state_dict()[name]
    built = build_native(load_encoder(str(folder), pooler=True), LABELS, 0.1)
    assert torch.equal(built.encoder.state_dict()[name], pretrained)
    heads = []
    for draws in (0, 5):
        encoder = load_encoder(str(folder))
        torch.rand(draws)
        torch.manual_seed(7)
        heads.append(build_native(encoder, LABELS, 0.1).state_dict())
    assert all(torch.equal(heads[0][key], heads[1][key]) for key in heads[0])
    assert not torch.equal(heads[0][f"model.bert.{name}"], pretrained)


def test_architecture_without_a_classification_head_is_one_line() -> None:
    encoder = transformers.Wav2Vec2BertModel(
        transformers.Wav2Vec2BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    with pytest.raises(InputError, match=r"\Aa wav2vec2-bert model cannot be given its own classification head[^\n]*\Z"):
        build_native(encoder, LABELS, 0.1)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "electra"])
def test_transformers_refuses_a_folder_with_the_suites_own_head(kind: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["wordpiece"](TEXTS, tmp_path / "encoder", 120)
    build_encoder(kind, tmp_path / "encoder", len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    save_classifier(build_student(tmp_path / "encoder"), tokenizer, tmp_path / "student", SETTINGS)
    assert not [path for path in (tmp_path / "student").iterdir() if path.is_dir()]
    model_classes = [name for name in dir(transformers) if name.startswith("AutoModel")]
    assert "AutoModelForSequenceClassification" in model_classes
    for name in ("AutoConfig", *model_classes):
        with pytest.raises((ValueError, OSError)) as caught:
            getattr(transformers, name).from_pretrained(tmp_path / "student")
        assert "research_kd_classifier" in str(caught.value) or "AutoModel" in name, name
    with pytest.raises(ValueError, match="model type `research_kd_classifier`"):
        transformers.pipeline("text-classification", model=str(tmp_path / "student"))
    for prefix in ("Bert", "DistilBert", "Roberta", "Electra", "XLMRoberta"):
        for suffix in ("Model", "ForSequenceClassification"):
            with pytest.raises(Exception, match="hidden_size|type must be tuple of ints"):
                getattr(transformers, prefix + suffix).from_pretrained(tmp_path / "student")


def test_folder_with_the_suites_own_head_serves_as_an_encoder(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["wordpiece"](TEXTS, tmp_path / "encoder", 120)
    build_encoder("bert", tmp_path / "encoder", len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    student = build_student(tmp_path / "encoder")
    save_classifier(student, tokenizer, tmp_path / "student", SETTINGS)
    encoder = load_encoder(str(tmp_path / "student"))
    assert all(torch.equal(weight, student.encoder.state_dict()[name]) for name, weight in encoder.state_dict().items())
    encoder.save_pretrained(tmp_path / "again")  # type: ignore[operator]
    again = transformers.AutoModel.from_pretrained(tmp_path / "again")
    assert torch.equal(again.get_input_embeddings().weight, student.encoder.get_input_embeddings().weight)  # type: ignore[operator]
    assert load_tokenizer(str(tmp_path / "student"))(TEXTS[0]) == tokenizer(TEXTS[0])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"encoder_type": "hostile"}, "names no encoder"),
        ({"encoder_type": ["bert"]}, "names no encoder"),
        ({"encoder": []}, "names no encoder"),
        ({"encoder": {"vocab_size": 10**12}}, "vocab_size"),
        ({"encoder": {"num_hidden_layers": 10**9}}, "num_hidden_layers"),
        ({"encoder": {"hidden_size": "x"}}, "hidden_size"),
        ({"classifier_settings": {"pooling": []}}, "classifier_settings"),
        ({"classifier_settings": None}, "classifier_settings"),
    ],
)
def test_hostile_configuration_is_one_line(changes: dict[str, Any], complaint: str, bert: Path, tmp_path: Path) -> None:
    save_classifier(build_student(bert), load_tokenizer(str(bert)), tmp_path, SETTINGS)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    with pytest.raises(InputError, match=rf"\A[^\n]*{complaint}[^\n]*\Z"):
        load_classifier(str(tmp_path), LABELS)
