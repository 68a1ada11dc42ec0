"""--search: teacher, student and control are each trained with every combination, and validation chooses."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.builders import LABELS, QUICK_EXTRAS
from support.tiny_lab import QUICK, TinyLab, read_metrics, read_table, repeated_bytes, write_table

import research_main
from research.errors import FlagErrors, TrainingFault
from research.experiment import student_stage
from research.experiment.search import describe_edges, rank
from research.kd import loop
from research.runs.directory import RunDirectory
from research.runs.run import load_run
from research.settings.search import list_trials
from research_config import parse_arguments

GRID = "lr=1e-4,3e-3 epochs=1,2"
TAUGHT = f"--search {GRID} --with_control"


def trials_of(run_dir: Path, model: str) -> list[dict[str, Any]]:
    return list(read_metrics(run_dir)["training"][model]["trials"])


def chosen_of(run_dir: Path, model: str) -> dict[str, Any]:
    (chosen,) = [trial for trial in trials_of(run_dir, model) if trial.get("chosen")]
    return chosen


def test_every_trial_is_the_run_of_its_settings_and_the_best_on_validation_is_kept(lab: TinyLab) -> None:
    run = lab.done("run", TAUGHT)
    teacher = chosen_of(run, "teacher")
    assert [trial["settings"] for trial in trials_of(run, "teacher")] == [{"lr": 1e-4}, {"lr": 3e-3}]
    grid = [{"lr": rate, "epochs": epochs} for rate in (1e-4, 3e-3) for epochs in (1, 2)]
    for model in ("student", "control"):
        assert [trial["settings"] for trial in trials_of(run, model)] == grid
        best = max(trial["validation"] for trial in trials_of(run, model))
        assert chosen_of(run, model)["validation"] == best
        assert read_metrics(run)["training"][model]["best_epoch"] == chosen_of(run, model)["best_epoch"]
    # The student alone again, from the chosen teacher, with the chosen settings: the same model to the bit.
    checkpoint = f"--teacher_checkpoint {run / 'teacher'}"
    settings = " ".join(f"--{name} {value}" for name, value in chosen_of(run, "student")["settings"].items())
    alone = load_run(lab.done("alone", f"{checkpoint} {settings}"))
    searched = load_run(run)
    for model in ("teacher", "student"):
        np.testing.assert_array_equal(searched.predictions.probs[model], alone.predictions.probs[model])
    assert searched.history == alone.history
    assert teacher["validation"] == pytest.approx(searched.metrics["teacher"]["validation"]["at_0.5"]["average_precision_macro"])


def test_teachers_of_the_trials_are_those_of_plain_runs(lab: TinyLab) -> None:
    lab.done("plain", "--lr 3e-3")
    before = lab.entries("teachers")
    status, errors = lab.run(f"--search {GRID} --output_dir results/run")
    assert status == 0 and errors.count("fine-tuning the teacher") == 1, errors
    assert before < lab.entries("teachers") and len(lab.entries("teachers")) == 2
    status, errors = lab.run("--search epochs=1,2 --lr 3e-3 --output_dir results/length")
    assert status == 0 and "fine-tuning the teacher" not in errors and "to compute: student (2 trials" in errors, errors
    assert "trials" not in read_metrics(lab.folder / "results/length")["training"]["teacher"]


def test_test_rows_are_asked_about_once_and_of_the_chosen_student_alone(lab: TinyLab, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    predict = student_stage.predict_parts
    monkeypatch.setattr(
        student_stage,
        "predict_parts",
        lambda name, *rest: (asked.append(name), predict(name, *rest))[1],  # type: ignore[func-returns-value]
    )
    lab.done("run", TAUGHT)
    assert asked == ["student", "control"]


def test_stopped_in_a_trial_it_goes_on_to_the_same_bytes(lab: TinyLab, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = repeated_bytes(lab.done("whole", f"{TAUGHT} --cache_dir other"))
    schedule, calls = loop.schedule, [0]

    def stop_now_and_then(*arguments: Any) -> float:
        calls[0] += 1
        if calls[0] in (6, 14, 22, 40):
            os.kill(os.getpid(), signal.SIGTERM)
        return schedule(*arguments)

    monkeypatch.setattr(loop, "schedule", stop_now_and_then)
    for _ in range(4):
        status, errors = lab.run(f"{TAUGHT} --output_dir results/stopped")
        assert status == 130, errors
    stopped = lab.done("stopped", TAUGHT)
    assert repeated_bytes(stopped) == expected and not list(stopped.glob("checkpoint*"))


def test_finished_trials_keep_one_model_each_until_the_run_ends(lab: TinyLab, monkeypatch: pytest.MonkeyPatch) -> None:
    train, kept = student_stage.train, list[list[int]]()
    run = lab.folder / "results/run"

    def looking(name: str, trainer: Any, *rest: Any) -> Any:
        found = sorted((run / "checkpoint").glob("trial_*"))
        kept.append([sum(path.stat().st_size for path in trial.iterdir()) for trial in found])
        return train(name, trainer, *rest)

    monkeypatch.setattr(student_stage, "train", looking)
    lab.done("run", f"--search {GRID}")
    model = (run / "student/model.safetensors").stat().st_size
    assert [len(sizes) for sizes in kept] == [0, 1, 2, 3]
    assert all(size < 1.2 * model + 50_000 for size in kept[-1]), (kept[-1], model)


def test_a_trial_that_fails_is_told_and_left_out(lab: TinyLab, monkeypatch: pytest.MonkeyPatch) -> None:
    train = student_stage.train

    def failing(name: str, trainer: Any, *rest: Any) -> Any:
        if trainer.config.lr == 3e-3:
            raise TrainingFault("step 1: hard_loss is nan")
        return train(name, trainer, *rest)

    monkeypatch.setattr(student_stage, "train", failing)
    status, errors = lab.run("--search lr=3e-3,1e-4 --output_dir results/run")
    assert status == 0 and "warning: student: trial 1 failed: step 1: hard_loss is nan" in errors
    first, second = trials_of(lab.folder / "results/run", "student")
    assert first == {"settings": {"lr": 3e-3}, "failed": True} and second["chosen"]
    assert "| failed |" in (lab.folder / "results/run/report.md").read_text(encoding="utf-8")
    status, errors = lab.run("--search lr=3e-3 --output_dir results/none")
    assert status == 1 and "error: step 1: hard_loss is nan" in errors


def test_a_trial_that_memory_ran_out_in_stops_the_run(lab: TinyLab, monkeypatch: pytest.MonkeyPatch) -> None:
    train = student_stage.train

    def failing(name: str, trainer: Any, *rest: Any) -> Any:
        if trainer.config.lr == 3e-3:
            raise TrainingFault("step 1: out of memory") from MemoryError()
        return train(name, trainer, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(student_stage, "train", failing)
        status, errors = lab.run("--search lr=1e-4,3e-3 --output_dir results/run")
    assert status == 1 and "error: step 1: out of memory" in errors and "failed" not in errors
    lab.done("run", "--search lr=1e-4,3e-3")
    assert len(trials_of(lab.folder / "results/run", "student")) == 2


def test_each_trial_remembers_on_how_many_processes_its_teacher_was_fine_tuned(
    lab: TinyLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[str] = []
    monkeypatch.setattr(RunDirectory, "keep_num_processes", lambda _, name, _number: kept.append(name))
    lab.done("run", "--search lr=1e-4,3e-3 --teacher_seeds 2 --pipeline baseline")
    assert kept == ["teacher_trial_1", "teacher_trial_2", "teacher_2"]


def test_report_shows_the_trials_and_an_edge_is_told(lab: TinyLab) -> None:
    status, errors = lab.run(f"{TAUGHT} --output_dir results/run")
    assert status == 0 and "student: trial 4 of 4: --lr 0.003 --epochs 2" in errors
    assert "that was tried, so a better one may lie beyond it" in errors
    report = (lab.folder / "results/run/report.md").read_text(encoding="utf-8")
    assert "| --lr | --epochs | mAP, validation | Best epoch | Epochs run |" in report and report.count("| chosen |") == 3


def test_folds_and_seeds_of_teachers(lab: TinyLab) -> None:
    folds = lab.done("folds", "--search lr=1e-4,3e-3 --num_folds 2")
    assert all(len(trials_of(folds / f"fold_{fold}", "student")) == 2 for fold in (1, 2))
    several = lab.done("several", "--search lr=1e-4,3e-3 --teacher_seeds 2 --cache_dir other")
    assert len(trials_of(several, "teacher")) == 2 and "trials" not in read_metrics(several)["training"]["teacher_2"]
    assert len({path.name for path in (lab.folder / "other/teachers").iterdir() if path.is_dir()}) == 3


def test_sweep_of_searches_is_the_single_searches(lab: TinyLab) -> None:
    status, errors = lab.run("--search lr=1e-4,3e-3 --sweep kd_alpha=0.2,0.8 --output_dir results/grid")
    assert status == 0, errors
    alone = lab.done("alone", "--search lr=1e-4,3e-3 --kd_alpha 0.8")
    assert repeated_bytes(lab.folder / "results/grid/kd_alpha_0.8") == repeated_bytes(alone)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--search kd_alpha=0.3,0.5", "--search: 'kd_alpha=0.3,0.5' is no setting that validation may choose; these are: lr, "),
        ("--search lr", "--search: 'lr' is not FLAG=V1,V2"),
        ("--search lr=1e-4 lr=1e-5", "--search: 'lr=1e-5' is given twice"),
        ("--search lr=0,1e-4", "--search: --lr: must be greater than 0, got 0"),
        ("--search lr=many", "--search: lr "),
        ("--search static_lr=1e-3,1e-2", "--search: no training of this run reads --static_lr"),
        ("--search teacher_epochs=1,2 --teacher_checkpoint x", "--search: no training of this run reads --teacher_epochs"),
        ("--search lr=1e-4,1e-3 --sweep lr=1,2", "--search: lr is swept as well; leave it to one of --search and --sweep"),
    ],
)
def test_mistakes_are_named_before_anything_is_read(flags: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert research_main.main([*QUICK.split(), *flags.split(), "--output_dir", "nowhere"], QUICK_EXTRAS) == 2
    errors = capsys.readouterr().err
    assert words in errors and "Traceback" not in errors and not Path("nowhere").exists()


def test_trials_are_of_what_a_model_reads() -> None:
    config = parse_arguments(["--demo", "--search", "lr=1e-4,1e-3", "teacher_epochs=1,2", "epochs=3"]).config
    assert list_trials(config, "teacher") == [{"lr": rate, "teacher_epochs": n} for rate in (1e-4, 1e-3) for n in (1, 2)]
    assert list_trials(config, "student") == [{"lr": 1e-4, "epochs": 3}, {"lr": 1e-3, "epochs": 3}]
    static = dataclasses.replace(config, student_kind="static", search=("lr=1e-4,1e-3", "static_lr=0.1,0.2"))
    assert list_trials(static, "student") == [{"static_lr": 0.1}, {"static_lr": 0.2}]
    assert list_trials(dataclasses.replace(config, search=()), "student") == [{}]


def test_scores_that_cannot_be_computed_are_last_and_only_ends_are_edges() -> None:
    assert rank(float("nan")) < rank(-1.0) < rank(0.2)
    trials = [{"lr": rate, "epochs": epochs} for rate in (1, 2, 3) for epochs in (6, 12)]
    assert describe_edges("student", {"lr": 2, "epochs": 6}, trials) == []
    assert len(describe_edges("student", {"lr": 1, "epochs": 12}, trials)) == 2
    off = [{"dropout": share, "batch": rows} for share in (0.0, 0.1, 0.9) for rows in (1, 2)]
    assert describe_edges("student", {"dropout": 0.0, "batch": 1}, off) == []
    assert describe_edges("student", {"dropout": 0.9, "batch": 1}, off) == []
    assert len(describe_edges("student", {"dropout": 0.1, "batch": 1}, off[:4])) == 1


def test_a_score_that_validation_does_not_have_chooses_nothing(lab: TinyLab) -> None:
    rows = read_table(lab.folder / "data" / "comments.csv")
    unlabelled = [{**row, **dict.fromkeys(LABELS, "0")} for row in rows[60:70]]
    for name, part in {"train": rows[:60], "none": unlabelled}.items():
        write_table(lab.folder / f"{name}.csv", [list(rows[0]), *(list(row.values()) for row in part)])
    status, errors = lab.run(
        "--pipeline student_only --search lr=1e-4,3e-3 --dataset_path train.csv --val_path none.csv --output_dir results/run"
    )
    assert status == 0 and "may lie beyond" not in errors and "is best" not in errors
    assert "warning: student: trial 1 of 2 is taken, but not for its score: validation has no mAP. Choose another" in errors
    assert [trial["validation"] for trial in trials_of(lab.folder / "results/run", "student")] == [None, None]


def test_one_value_is_a_setting_and_no_edge(lab: TinyLab) -> None:
    status, errors = lab.run("--search lr=3e-3 --output_dir results/run")
    assert status == 0 and "may lie beyond" not in errors
    plain = lab.done("plain", "--lr 3e-3")
    np.testing.assert_array_equal(
        load_run(lab.folder / "results/run").predictions.probs["student"], load_run(plain).predictions.probs["student"]
    )


def test_grid_problems_come_together() -> None:
    with pytest.raises(FlagErrors) as caught:
        parse_arguments(["--demo", "--search", "lr", "kd_alpha=1", "epochs=x"])
    assert len(caught.value.problems) == 3
