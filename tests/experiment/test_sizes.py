"""Runs whose student is made smaller: by its vocabulary, or to a bag of vectors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.builders import LABELS, QUICK_EXTRAS, build_model_folder, make_table, make_texts

import research_main
from research.kd.loop import EpochLoop
from research.models.classifiers import ModelShape
from research.models.encoders import load_tokenizer
from research.models.saved import load_classifier
from research.models.static import StaticEncoder

QUICK = (
    "--teacher_path models/teacher --student_path models/student --lr 1e-3 --teacher_epochs 1 --epochs 2 --batch 16 "
    "--max_length 32 --student_hidden_size 8 --static_dim 6 --allow_weak_teacher --num_threads 1"
)
DETERMINISTIC_FILES = ("metrics.json", "history.csv", "predictions.csv")
KINDS = {
    "trimmed": "--trim_student_vocab 1",
    "trimmed, layers compared": "--trim_student_vocab 2 --kd_method multi_level --student_layers 1",
    "trimmed teacher": "--trim_student_vocab 1 --student_init teacher --kd_method hidden",
    "factorised": "--embedding_rank 4 --trim_student_vocab 1 --with_control",
    "static": "--student_kind static --with_control",
    "static and trimmed": "--student_kind static --static_weighting none --trim_student_vocab 2 --student_init teacher",
}
Done = Callable[..., Path]


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("materials")
    make_table(folder / "data" / "comments.csv", rows=80)
    texts = make_texts(80)
    build_model_folder("electra", "wordpiece", folder / "models" / "teacher", texts, layers=2, width=24, seed=1)
    build_model_folder("distilbert", "unigram", folder / "models" / "student", texts, layers=2, width=16, seed=2)
    (folder / "cache").mkdir()
    return folder


@pytest.fixture
def done(tmp_path: Path, materials: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Done:
    """Run a quick command in a folder of its own, which has to succeed, and return its run directory."""
    for name in ("data", "models", "cache"):
        (tmp_path / name).symlink_to(materials / name)
    monkeypatch.chdir(tmp_path)

    def run(name: str, flags: str = "") -> Path:
        status = research_main.main([*f"{QUICK} {flags} --output_dir results/{name}".split()], QUICK_EXTRAS)
        assert status == 0, capsys.readouterr().err
        return tmp_path / "results" / name

    return run


def refusal(flags: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert research_main.main([*f"{QUICK} {flags} --output_dir results/refused".split()], QUICK_EXTRAS) == 2
    assert not Path("results/refused").exists()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


@pytest.mark.parametrize("kind", KINDS)
def test_same_command_twice_gives_equal_bytes_and_a_student_that_loads(kind: str, done: Done) -> None:
    first, second = done("first", KINDS[kind]), done("second", KINDS[kind])
    for name in DETERMINISTIC_FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    costs = json.loads((first / "efficiency.json").read_text())
    saved = load_classifier(str(first / "student"), LABELS)
    vocabulary = ModelShape.of(saved.model.backbone_config).vocabulary
    if "trim" in KINDS[kind]:
        source = "teacher" if "student_init" in KINDS[kind] else "student"
        assert len(saved.tokenizer) == vocabulary < len(load_tokenizer(f"models/{source}"))
    assert costs["student"]["parameters_total"] == sum(weight.numel() for weight in saved.model.parameters())
    batch = saved.tokenizer(["ভিডিওটা ভালো xyz 😀"], return_tensors="pt")
    logits = saved.model.eval()(batch["input_ids"], batch["attention_mask"])["logits"]
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("kind", ["trimmed, layers compared", "factorised", "static"])
def test_killed_run_goes_on_to_the_same_bytes(kind: str, done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = done("whole", KINDS[kind])
    flags = f"{QUICK} {KINDS[kind]} --output_dir results/killed".split()
    finish_epoch = EpochLoop._finish_epoch

    def kill(loop: EpochLoop, started: float) -> None:
        finish_epoch(loop, started)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(EpochLoop, "_finish_epoch", kill)
        assert research_main.main(flags, QUICK_EXTRAS) == 130
    resumed = done("killed", KINDS[kind])
    for name in DETERMINISTIC_FILES:
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_teacher_is_that_of_a_run_with_a_whole_student(done: Done, capsys: pytest.CaptureFixture[str]) -> None:
    done("whole")
    for name, kind in KINDS.items():
        capsys.readouterr()
        done(name.replace(" ", "_").replace(",", ""), kind)
        assert "fine-tuning the teacher" not in capsys.readouterr().err


def test_words_of_a_teacher_and_its_trimmed_student_are_all_compared(done: Done) -> None:
    assert "100.0 % of the words are whole in both tokenizers" in (done("run", KINDS["trimmed teacher"]) / "run.log").read_text()


def test_each_fold_trims_by_its_own_training_texts(done: Done) -> None:
    run_dir = done("folds", "--num_folds 2 --trim_student_vocab 1")
    pieces = [set(load_classifier(str(run_dir / f"fold_{fold}" / "student")).tokenizer.get_vocab()) for fold in (1, 2)]
    assert pieces[0] != pieces[1]


def test_each_flag_of_a_static_student_changes_what_it_learns(done: Done) -> None:
    trim = "--trim_student_vocab 1"
    flags = ("", "--static_lr 0.1", "--static_weighting none", "--student_init teacher", trim, f"{trim} --static_weighting none")
    histories = {
        (done(f"run_{place}", f"--student_kind static {more}") / "history.csv").read_text() for place, more in enumerate(flags)
    }
    assert len(histories) == len(flags)


def test_trimmed_and_static_students_serve_as_teacher_and_as_student(done: Done) -> None:
    trimmed, static = done("trimmed", KINDS["trimmed"]), done("static", KINDS["static and trimmed"])
    for name, folder in (("of_trimmed", trimmed), ("of_static", static)):
        found = done(name, f"--pipeline baseline --teacher_checkpoint {folder / 'student'}")
        metrics = [json.loads((path / "metrics.json").read_text()) for path in (folder, found)]
        assert metrics[1]["teacher"]["test"]["at_0.5"] == metrics[0]["student"]["test"]["at_0.5"]
    model = load_classifier(str(static / "student")).model
    assert isinstance(model.encoder, StaticEncoder)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--student_kind static --kd_method hidden", "--student_kind: static has no layers for --kd_method hidden"),
        ("--student_kind static --static_dim 17", "--static_dim: the student's encoder gives vectors of at most 16, got 17"),
        ("--student_kind static --embedding_rank 4", "--embedding_rank: is for transformers"),
        ("--embedding_rank 17", "--student_path: distilbert has embeddings of rank 16, got --embedding_rank 17"),
        ("--trim_student_vocab 0", "--trim_student_vocab: must be at least 1, got 0"),
        ("--student_kind bag", "--student_kind: must be one of transformer, static, got 'bag'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    flags: str, complaint: str, done: Done, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complaint in refusal(flags, capsys)
