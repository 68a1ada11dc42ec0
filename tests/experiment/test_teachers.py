"""Several teachers answer as one, from fine-tuning to the report, and each is paid for once."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from support.builders import LABELS, TOKENIZERS, build_model_folder, encoder_config, make_texts
from support.tiny_lab import TinyLab, columns_of, read_metrics, repeated_bytes

from research.kd import loop
from research.models.saved import load_classifier
from research.runs.directory import find_teachers, teacher_name


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def teacher_probs(run_dir: Path) -> np.ndarray:
    return sigmoid(columns_of(run_dir / "predictions.csv", "logit_teacher_"))


def fine_tunings(errors: str) -> int:
    return errors.count("fine-tuning the teacher")


def test_one_seed_is_the_run_without_the_flag_to_the_byte(lab: TinyLab) -> None:
    plain = lab.done("plain")
    teachers = lab.entries("teachers")
    assert repeated_bytes(lab.done("one", "--teacher_seeds 1")) == repeated_bytes(plain)
    assert lab.entries("teachers") == teachers and len(teachers) == 1


def test_two_seeds_add_one_teacher_and_answer_with_the_mean_of_their_probabilities(lab: TinyLab) -> None:
    plain = lab.done("plain")
    status, errors = lab.run("--teacher_seeds 2 --with_control --output_dir results/two")
    assert status == 0 and fine_tunings(errors) == 1  # the first is that of the plain run
    two = lab.folder / "results" / "two"
    assert "as teacher_2, seed 43," in errors and [path.name for path in find_teachers(two)] == ["teacher", "teacher_2"]
    names = ("teacher", "teacher_2")
    singles = [lab.done(name, f"--pipeline baseline --teacher_checkpoint results/two/{name}") for name in names]
    np.testing.assert_allclose(teacher_probs(singles[0]), teacher_probs(plain), atol=1e-6)
    assert np.abs(teacher_probs(singles[0]) - teacher_probs(singles[1])).max() > 1e-3
    np.testing.assert_allclose(teacher_probs(two), np.mean([teacher_probs(single) for single in singles], axis=0), atol=1e-6)
    metrics = read_metrics(two)
    assert set(metrics["teachers"]) == {"teacher", "teacher_2"} == set(metrics["training"]) - {"student", "control"}
    for name, single in zip(names, singles, strict=True):
        assert metrics["teachers"][name]["test"] == read_metrics(single)["teacher"]["test"]
    report = (two / "report.md").read_text(encoding="utf-8")
    assert (
        "## Teachers" in report and "| all together |" in report and "The best single teacher by mean average precision" in report
    )
    assert "## Teachers" not in (plain / "report.md").read_text(encoding="utf-8")


def test_soft_loss_in_the_metrics_is_that_of_the_softened_ensemble(lab: TinyLab) -> None:
    run = lab.done("run", "--teacher_seeds 2 --kd_temperature 3")
    logits = [
        columns_of(lab.done(name, f"--pipeline baseline --teacher_checkpoint results/run/{name}") / "predictions.csv", "logit_")
        for name in ("teacher", "teacher_2")
    ]
    target = np.mean([sigmoid(entry / 3) for entry in logits], axis=0)
    student = sigmoid(columns_of(run / "predictions.csv", "logit_student_") / 3)
    loss = -9 * np.mean(target * np.log(student) + (1 - target) * np.log(1 - student))
    assert read_metrics(run)["student"]["test"]["soft_loss"] == pytest.approx(loss, abs=2e-6)


def test_costs_of_several_teachers_are_their_sums(lab: TinyLab) -> None:
    run = lab.done("run", "--teacher_seeds 3")
    single = lab.done("single", "--pipeline baseline --teacher_checkpoint results/run/teacher_2")
    of_run, of_one = (json.loads((path / "efficiency.json").read_text())["teacher"] for path in (run, single))
    assert of_run["members"] == 3 and "members" not in of_one
    for entry in ("parameters_total", "parameters_embeddings", "size_mb"):
        assert of_run[entry] == pytest.approx(3 * of_one[entry])


def test_a_run_s_folder_gives_all_its_teachers_and_each_guards_the_test_part(lab: TinyLab) -> None:
    first = lab.done("first", "--teacher_seeds 2")
    second = lab.done("second", "--teacher_checkpoint results/first")
    assert repeated_bytes(second)["predictions.csv"].count(b"\n") == repeated_bytes(first)["predictions.csv"].count(b"\n")
    np.testing.assert_allclose(teacher_probs(second), teacher_probs(first), atol=1e-6)
    assert read_metrics(second)["training"]["teacher_2"] == {"source": "checkpoint", "training_texts": "known"}
    other = lab.done("other", "--split_seed 7")
    error = lab.refused(f"--teacher_checkpoint results/first/teacher {other}/teacher")
    assert f"{other}/teacher was trained on the texts of" in error
    (lab.folder / "results/first/teacher_2/training_texts.npy").unlink()
    status, errors = lab.run("--teacher_checkpoint results/first --output_dir results/unknown")
    assert status == 0 and "teacher_2 does not say which texts" in errors
    assert not (lab.folder / "results/unknown/student/training_texts.npy").exists()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--teacher_checkpoint results/first results/first/teacher", ("results/first/teacher is given twice",)),
        ("--teacher_checkpoint results/alone", ("results/alone is the folder of a run without teacher/",)),
        ("--teacher_checkpoint results/first/teacher --teacher_seeds 2", ("--teacher_seeds: 2 would be fine-tuned",)),
    ],
)
def test_teachers_that_cannot_be_are_refused_in_one_line(lab: TinyLab, flags: str, parts: tuple[str, ...]) -> None:
    lab.done("first")
    lab.done("alone", "--pipeline student_only")
    error = lab.refused(flags)
    assert all(part in error for part in parts), error


def test_teachers_with_different_tokenizers_and_label_orders_answer_together(lab: TinyLab) -> None:
    import torch
    import transformers

    tokenizer = TOKENIZERS["unigram"](make_texts(80), lab.folder / "finetuned", 150)
    config = encoder_config("bert", len(tokenizer), 2, 16, 2, tokenizer.pad_token_id)
    config.id2label = dict(enumerate(reversed(LABELS)))
    torch.manual_seed(4)
    transformers.BertForSequenceClassification(config).save_pretrained(lab.folder / "finetuned")
    lab.done("own")
    flags = "--teacher_checkpoint results/own/teacher finetuned"
    together = lab.done("together", f"{flags} --kd_method multi_level")
    singles = [
        lab.done(name, f"--pipeline baseline --teacher_checkpoint {place}")
        for name, place in (("a", "results/own/teacher"), ("b", "finetuned"))
    ]
    np.testing.assert_allclose(teacher_probs(together), np.mean([teacher_probs(run) for run in singles], axis=0), atol=1e-6)
    labels = load_classifier(str(together / "teacher_2"), LABELS).settings["labels"]
    assert sorted(labels) == sorted(LABELS)
    # The whole run is a teacher again, and its order of teachers is that of the flag.
    again = lab.done("again", "--pipeline baseline --teacher_checkpoint results/together")
    np.testing.assert_allclose(teacher_probs(again), teacher_probs(together), atol=1e-6)


def test_sweep_over_the_temperature_asks_each_teacher_once(lab: TinyLab) -> None:
    status, errors = lab.run("--teacher_seeds 2 --sweep kd_temperature=1,4 --output_dir results/grid")
    assert status == 0, errors
    assert (len(lab.entries("teachers")), len(lab.entries("logits"))) == (2, 6)  # of train, validation and test
    runs = [lab.folder / "results" / "grid" / f"kd_temperature_{temperature}" for temperature in (1, 4)]
    assert repeated_bytes(runs[0])["history.csv"] != repeated_bytes(runs[1])["history.csv"]
    np.testing.assert_array_equal(teacher_probs(runs[0]), teacher_probs(runs[1]))
    assert repeated_bytes(lab.done("single", "--teacher_seeds 2 --kd_temperature 4")) == repeated_bytes(runs[1])


def test_run_with_two_teachers_that_is_stopped_goes_on_to_the_same_bytes(lab: TinyLab, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = repeated_bytes(lab.done("whole", "--teacher_seeds 2 --cache_dir other"))
    schedule, calls = loop.schedule, [0]

    def stop_in_the_second_teacher_and_in_the_student(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] in (6, 12):
            os.kill(os.getpid(), signal.SIGTERM)
        return schedule(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "schedule", stop_in_the_second_teacher_and_in_the_student)
    for _ in range(2):
        status, errors = lab.run("--teacher_seeds 2 --output_dir results/stopped")
        assert status == 130, errors
    assert repeated_bytes(lab.done("stopped", "--teacher_seeds 2")) == expected


def test_folds_have_two_teachers_each_and_the_mean_of_their_scores(lab: TinyLab) -> None:
    run = lab.done("run", "--teacher_seeds 2 --num_folds 2")
    folds = [read_metrics(run / f"fold_{fold}")["teachers"] for fold in (1, 2)]
    total = read_metrics(run)["mean"]["teachers"]
    for name in ("teacher", "teacher_2"):
        values = [fold[name]["test"]["at_0.5"]["brier"] for fold in folds]
        assert total[name]["test"]["at_0.5"]["brier"] == pytest.approx(np.mean(values), abs=1e-6)
    assert len(lab.entries("teachers")) == 4
    assert "## Teachers" in (run / "report.md").read_text(encoding="utf-8")
    before = repeated_bytes(run / "fold_2")
    assert repeated_bytes(lab.done("run", "--teacher_seeds 2 --num_folds 2") / "fold_2") == before


def test_overwriting_with_fewer_teachers_leaves_none_behind(lab: TinyLab) -> None:
    run = lab.done("run", "--teacher_seeds 3")
    assert [path.name for path in find_teachers(run)] == [teacher_name(number) for number in (1, 2, 3)]
    lab.done("run", "--overwrite")
    assert [path.name for path in find_teachers(run)] == ["teacher"]


def test_changed_second_checkpoint_is_noticed_by_the_finished_run(lab: TinyLab) -> None:
    lab.done("first", "--teacher_seeds 2")
    lab.done("second", "--teacher_checkpoint results/first")
    model = lab.folder / "results/first/teacher_2/model.safetensors"
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    status, errors = lab.run("--teacher_checkpoint results/first --output_dir results/second")
    assert status == 2 and "made from other files of the teacher_2" in errors


def test_two_teachers_with_two_tokenizers_of_their_own_model_are_asked_with_their_own_tokens(lab: TinyLab) -> None:
    """A vocabulary that is too small for the tokens of another teacher would be refused or answer nonsense."""
    build_model_folder("bert", "wordpiece", lab.folder / "small", make_texts(80), vocab_size=90, layers=2, width=16, seed=5)
    lab.done("large")
    status, errors = lab.run("--pipeline baseline --teacher_path small --output_dir results/small")
    assert status == 0, errors
    together = lab.done("together", "--pipeline baseline --teacher_checkpoint results/large/teacher results/small/teacher")
    singles = [lab.folder / "results" / name for name in ("large", "small")]
    np.testing.assert_allclose(teacher_probs(together), np.mean([teacher_probs(run) for run in singles], axis=0), atol=1e-6)
