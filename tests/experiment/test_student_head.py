"""Runs whose student has the classification head of its architecture, and the folders and cards that runs leave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from support.builders import LABELS, QUICK_EXTRAS, build_model_folder, make_table, make_texts
from support.checkpoints import save_former

import research_main
from research.experiment import runtime as runtime_room
from research.kd.loop import EpochLoop
from research.models.classifiers import SequenceClassifier
from research.models.saved import load_classifier
from research.runs.run import load_run
from research.storage.cache import MANIFEST
from research.storage.files import hash_tree

QUICK = (
    "--teacher_path models/teacher --student_path models/student --lr 1e-3 --teacher_epochs 1 --epochs 2 --batch 16 "
    "--max_length 32 --allow_weak_teacher --num_threads 1"
)
NATIVE = f"{QUICK} --student_head native"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a table and two models, which is the working directory."""
    folder = tmp_path_factory.mktemp("lab")
    make_table(folder / "data" / "comments.csv", rows=80)
    texts = make_texts(80)
    build_model_folder("electra", "wordpiece", folder / "models" / "teacher", texts, layers=2, width=24, seed=1)
    build_model_folder("bert", "unigram", folder / "models" / "student", texts, layers=3, width=16, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def run(flags: str, name: str) -> Path:
    """Run a command that has to end well; return its directory."""
    runtime_room.open_cache.cache_clear()
    assert research_main.main(f"{flags} --output_dir results/{name}".split(), QUICK_EXTRAS) == 0
    return Path("results", name)


@pytest.fixture(scope="module")
def native(lab: Path) -> Path:
    return lab / run(f"{NATIVE} --with_control --kd_method multi_level --student_layers 2 --layer_mapping 1:1,2:2", "native")


def predict_with_transformers(folder: Path, texts: list[str]) -> np.ndarray[Any, Any]:
    classify: Any = transformers.pipeline("text-classification", model=str(folder), top_k=None)
    rows = [{entry["label"]: entry["score"] for entry in answer} for answer in classify(texts, truncation=True)]
    return np.array([[row[label] for label in LABELS] for row in rows])


def test_transformers_alone_repeats_the_predictions_of_a_native_student(native: Path, lab: Path) -> None:
    predictions = load_run(native).predictions
    table = (lab / "data" / "comments.csv").read_text(encoding="utf-8").splitlines()[1:]
    texts = [table[row].split(",")[0] for row in predictions.index]
    found = predict_with_transformers(native / "student", texts)
    np.testing.assert_allclose(found, predictions.probs["student"], rtol=0, atol=1e-6)
    settings = load_classifier(str(native / "student")).settings
    assert settings["thresholds"] == json.loads((native / "metrics.json").read_text(encoding="utf-8"))["thresholds"]["student"]
    assert (settings["max_length"], settings["text_normalization"], settings["pooling"]) == (32, "nfc", "native")


def test_a_native_student_and_its_control_start_alike_and_resume_to_the_same_bytes(
    native: Path, lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_epoch, epochs = EpochLoop._train_epoch, iter(range(1, 100))

    def train_or_stop(*arguments: Any) -> None:
        if next(epochs) == 2:
            raise KeyboardInterrupt
        train_epoch(*arguments)

    command = f"{NATIVE} --with_control --kd_method multi_level --student_layers 2 --layer_mapping 1:1,2:2"
    with monkeypatch.context() as patch:
        patch.setattr(EpochLoop, "_train_epoch", train_or_stop)
        assert research_main.main(f"{command} --output_dir results/stopped".split(), QUICK_EXTRAS) == 130
    stopped = lab / run(command, "stopped")
    files = ("metrics.json", "predictions.csv", "history.csv", "history_control.csv", "student/model.safetensors")
    for name in (*files, "student/config.json", "student/tokenizer.json"):
        assert (stopped / name).read_bytes() == (native / name).read_bytes(), name


def test_a_native_students_control_is_the_student_only_run(native: Path, lab: Path) -> None:
    alone = load_run(lab / run(f"{NATIVE} --pipeline student_only --student_layers 2", "alone"))
    np.testing.assert_array_equal(load_run(native).predictions.probs["control"], alone.predictions.probs["student"])


def test_a_native_student_is_a_teacher_checkpoint_and_an_encoder(native: Path, lab: Path) -> None:
    again = lab / run(f"{NATIVE} --teacher_checkpoint {native}/student --student_init teacher --student_layers 1", "again")
    former, now = load_run(native).predictions.probs["student"], load_run(again).predictions.probs["teacher"]
    np.testing.assert_allclose(now, former, rtol=0, atol=1e-6)
    assert predict_with_transformers(again / "teacher", ["আজ"]).shape == (1, len(LABELS))
    assert (again / "teacher" / "model.safetensors").read_bytes() == (native / "student" / "model.safetensors").read_bytes()
    onward = lab / run(f"{NATIVE} --pipeline student_only --student_path {native}/student --epochs 1", "onward")
    assert load_classifier(str(onward / "student")).model.num_layers == 2


def test_frozen_encoder_leaves_head_and_pooler_to_be_trained(lab: Path) -> None:
    folder = lab / run(f"{NATIVE} --pipeline student_only --freeze_student_encoder --epochs 1", "frozen")
    model = load_classifier(str(folder / "student")).model
    assert isinstance(model, SequenceClassifier)
    before = transformers.AutoModel.from_pretrained("models/student").state_dict()
    changed = {name for name, weight in model.encoder.state_dict().items() if not np.array_equal(weight, before[name])}
    assert changed == {"pooler.dense.weight", "pooler.dense.bias"}


def save_as_former(folder: Path, target: Path) -> Path:
    """Write the model in a folder as former versions wrote it."""
    saved = load_classifier(str(folder))
    settings = {name: saved.settings[name] for name in ("labels", "max_length", "text_normalization")}
    save_former(saved.model, saved.tokenizer, target, settings)
    shutil.copy(folder / "training_texts.npy", target)
    return target


def test_checkpoint_of_a_former_version_serves_and_is_left_as_a_folder_of_this_one(lab: Path) -> None:
    first = lab / run(f"{QUICK} --student_hidden_size 8", "first")
    save_as_former(first / "teacher", lab / "former")
    second = lab / run(f"{QUICK} --student_hidden_size 8 --teacher_checkpoint former --split_seed 42", "second")
    for name in ("predictions.csv", "history.csv"):
        assert (second / name).read_bytes() == (first / name).read_bytes()
    assert (second / "teacher" / "model.safetensors").read_bytes() == (first / "teacher" / "model.safetensors").read_bytes()
    assert (second / "teacher" / "tokenizer.json").read_bytes() == (first / "teacher" / "tokenizer.json").read_bytes()


def test_teacher_in_a_cache_of_a_former_version_serves_and_is_left_as_a_folder_of_this_one(lab: Path) -> None:
    flags = f"{QUICK} --student_hidden_size 8 --cache_dir cache_of_former"
    first = lab / run(flags, "cached")
    entry = next((lab / "cache_of_former" / "teachers").glob("*/model")).parent
    save_as_former(entry / "model", lab / "entry")
    shutil.rmtree(entry / "model")
    (lab / "entry").rename(entry / "model")
    key = json.loads((entry / MANIFEST).read_text(encoding="ascii"))["key"]
    (entry / MANIFEST).unlink()
    (entry / MANIFEST).write_text(json.dumps({"files": hash_tree(entry), "key": key}, sort_keys=True), encoding="ascii")
    second = lab / run(flags, "from_former_cache")
    assert (entry / "model" / "encoder").is_dir()
    for name in ("predictions.csv", "teacher/model.safetensors", "teacher/config.json", "teacher/training_texts.npy"):
        assert (second / name).read_bytes() == (first / name).read_bytes(), name


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--student_hidden_size 8", "--student_hidden_size: a native head has its architecture's width"),
        ("--pipeline student_only --pooling mean", "--pooling: a native head pools by itself, got mean"),
    ],
)
def test_flags_that_a_native_head_has_no_use_for_are_refused(
    lab: Path, flags: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert research_main.main(f"{NATIVE} {flags} --output_dir results/refused".split(), QUICK_EXTRAS) == 2
    assert complaint in capsys.readouterr().err
    assert not Path("results/refused").exists()


def test_pooling_beside_a_native_head_is_the_teachers_and_said_so(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = lab / run(f"{NATIVE} --pooling mean --epochs 1", "pooled")
    assert "--pooling mean is for the teacher alone" in capsys.readouterr().err
    assert load_classifier(str(folder / "teacher")).settings["pooling"] == "mean"


def test_card_is_one_that_the_hub_reads_and_names_no_path(native: Path, lab: Path) -> None:
    from huggingface_hub import ModelCard

    for model in ("student", "teacher"):
        text = (native / model / "README.md").read_text(encoding="utf-8")
        assert str(lab) not in text and "models/" not in text.split("---")[2] and "comments.csv" not in text
        card: Any = ModelCard(text)
        assert card.data.license == "other" and card.data.language is None and card.data.base_model is None
        results = {result.metric_name: result.metric_value for result in card.data.eval_results or ()}
        metrics = json.loads((native / "metrics.json").read_text(encoding="utf-8"))[model]["test"]
        assert results == {
            "macro-F1 at 0.5": metrics["at_0.5"]["f1_macro"],
            "macro-F1 at tuned thresholds": metrics["tuned"]["f1_macro"],
            "mean average precision": metrics["at_0.5"]["average_precision_macro"],
        }
        assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    student, teacher = ((native / name / "README.md").read_text(encoding="utf-8") for name in ("student", "teacher"))
    assert 'pipeline("text-classification"' in student and "load_classifier" not in student
    assert "load_classifier" in teacher and "refuse it" in teacher
