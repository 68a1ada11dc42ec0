"""What a search promises holds when trials diverge, memory runs out or the run is killed, and for what is said of it."""

from __future__ import annotations

import dataclasses
import gc
import re
import signal
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
from support.fault_injection import FLAGS, TIMEOUT_S, attempt, build_inputs, copy_inputs, find_litter, read_results
from support.processes import launch, said
from support.tiny_lab import TinyLab, read_metrics, repeated_bytes

from research.distributed import check_launch
from research.errors import InputError, TrainingFault
from research.experiment import student_stage
from research.settings.search import smallest_batch
from research_config import parse_arguments

SEARCHED = [*FLAGS, "--search", "lr=1e-4,3e-3"]
# Of about 750, so that every model is hit in a few kills and each attempt comes further than the one before.
WRITES_BETWEEN_KILLS = 150
MOST_KILLS = 12


def trials_of(run_dir: Path, model: str) -> list[dict[str, Any]]:
    return list(read_metrics(run_dir)["training"][model]["trials"])


def planned(lab: TinyLab, flags: str) -> tuple[str, str]:
    """Return what a dry run says is there, and what it says is to be computed."""
    status, errors = lab.run(f"{flags} --dry_run --output_dir results/planned")
    assert status == 0 and not (lab.folder / "results/planned").exists(), errors
    there, missing = (re.search(f"{words}: (.*)", errors) for words in ("there already", "to compute"))
    assert there is not None and missing is not None
    return there[1], missing[1]


def finished_teachers(folder: Path) -> list[Path]:
    """Return the cache's whole teachers whose builder has cleared up."""
    entries = [path.parent for path in folder.glob("cache/teachers/*/manifest.json") if not path.parent.suffix]
    return [entry for entry in entries if not entry.with_suffix(".work").exists()]


def test_killed_in_trials_of_every_model_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    inputs = build_inputs(tmp_path / "inputs")
    whole, killed = (copy_inputs(inputs, tmp_path / name) for name in ("whole", "killed"))
    done = attempt(whole, SEARCHED)
    assert done.status == 0, done.errors
    kills: list[str] = []
    while (tried := attempt(killed, SEARCHED, kill_at_write=WRITES_BETWEEN_KILLS)).status == -signal.SIGKILL:
        kills.append(tried.phase)
        assert len(kills) < MOST_KILLS, kills
    assert tried.status == 0, tried.errors
    assert {"teacher", "student", "control"} <= set(kills)
    assert read_results(killed / "run") == read_results(whole / "run") and not find_litter(killed)


def test_processes_of_one_run_agree_on_the_trials(tmp_path: Path) -> None:
    place = copy_inputs(build_inputs(tmp_path / "inputs"), tmp_path / "place")
    ranks = launch(place, [*FLAGS, "--search", "lr=1e30,1e-4,3e-3"])
    assert ranks.wait() == [0, 0], said(place)
    assert said(place).count("trial 1 failed") == 3 and "trial" not in said(place, 1)
    for model in ("teacher", "student", "control"):
        trials = trials_of(place / "run", model)
        best = max(trial["validation"] for trial in trials[1:])
        assert trials[0] == {"settings": {"lr": 1e30}, "failed": True}
        assert [trial["validation"] for trial in trials if trial.get("chosen")] == [best]
    assert not list((place / "run").rglob("checkpoint*"))


def test_trials_keep_the_processes_they_were_tuned_on_when_the_run_moves(tmp_path: Path) -> None:
    place = copy_inputs(build_inputs(tmp_path / "inputs"), tmp_path / "place")
    ranks = launch(place, SEARCHED)
    until = time.monotonic() + TIMEOUT_S
    while not list(place.glob("cache/teachers/*.work/step-*.ckpt")) or len(finished_teachers(place)) != 1:
        assert time.monotonic() < until, "it did not come to the second trial"
        time.sleep(0.002)
    ranks.processes[0].kill()
    assert 0 not in ranks.wait() and len(finished_teachers(place)) == 1
    moved = attempt(place, SEARCHED, kill_at_write=250)
    assert moved.status == -signal.SIGKILL and moved.phase != "teacher" and moved.errors.count("fine-tuning the teacher") == 1
    last = attempt(place, SEARCHED)
    assert last.status == 0 and "fine-tuning the teacher" not in last.errors, last.errors


def test_a_trial_whose_validation_is_not_finite_is_told_and_left_out(lab: TinyLab) -> None:
    # One step an epoch: the loss before it is finite, the logits after it are not.
    run = "--search lr=1e-3,1e30 --batch 64 --epochs 1 --teacher_epochs 1 --with_control --output_dir results/run"
    status, errors = lab.run(run)
    assert status == 0, errors
    for model in ("teacher", "student", "control"):
        assert f"warning: {model}: trial 2 failed: evaluation: logits of" in errors
        assert trials_of(lab.folder / "results/run", model)[1] == {"settings": {"lr": 1e30}, "failed": True}


@pytest.mark.parametrize("flags", ["--search lr=1e30,1e-3 --teacher_seeds 2", "--lr 1e30"])
def test_checkpoints_of_a_failed_teacher_stay_where_nobody_leaves_it_out(lab: TinyLab, flags: str) -> None:
    status, errors = lab.run(f"{flags} --pipeline baseline --checkpoint_minutes 0 --output_dir results/run")
    searched = "--search" in flags
    assert status == (0 if searched else 1) and (not searched or "teacher: trial 1 failed: step" in errors), errors
    assert len(list(lab.folder.glob("cache/teachers/*.work/*.ckpt"))) == (0 if searched else 1)
    assert len(list(lab.folder.glob("cache/teachers/*.work"))) == (not searched)


def test_lack_of_memory_stops_the_run_and_it_goes_on_in_that_trial(lab: TinyLab, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = repeated_bytes(lab.done("whole", "--search lr=1e-4,3e-3"))
    train = student_stage.train

    def out_of_memory(name: str, trainer: Any, *rest: Any) -> Any:
        if trainer.config.lr == 3e-3:
            raise TrainingFault("step 1: out of memory") from MemoryError()
        return train(name, trainer, *rest)

    monkeypatch.setattr(student_stage, "train", out_of_memory)
    status, errors = lab.run("--search lr=1e-4,3e-3 --output_dir results/run")
    assert status == 1 and "error: step 1: out of memory" in errors and "trial 2 failed" not in errors
    monkeypatch.setattr(student_stage, "train", train)
    assert repeated_bytes(lab.done("run", "--search lr=1e-4,3e-3")) == expected


def test_a_failed_trial_leaves_its_model_to_the_next(lab: TinyLab, monkeypatch: pytest.MonkeyPatch) -> None:
    train = student_stage.train
    models: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    def failing(name: str, trainer: Any, *rest: Any) -> Any:
        gc.collect()
        alive.extend(model() is not None for model in models)
        models.append(weakref.ref(trainer.student))
        if trainer.config.lr == 3e-3:
            raise TrainingFault("step 1: hard_loss is nan")
        return train(name, trainer, *rest)

    monkeypatch.setattr(student_stage, "train", failing)
    lab.done("run", "--search lr=3e-3,1e-4 --pipeline student_only")
    assert alive == [False]


def test_plan_knows_the_teacher_of_a_search_with_one_trial(lab: TinyLab) -> None:
    settled = "--search lr=3e-3 teacher_epochs=2 epochs=3"
    there, missing = planned(lab, settled)
    assert "teacher (at most 2 epochs" in missing and "student (at most 3 epochs" in missing
    lab.done("prepared", "--lr 3e-3 --teacher_epochs 2")
    there, missing = planned(lab, settled)
    assert there.endswith("teacher, teacher outputs") and missing.startswith("student (at most 3 epochs")
    # With the run's own --lr it is another teacher.
    assert "teacher (at most 2 epochs" in planned(lab, "--search teacher_epochs=2 epochs=3")[1]


def test_plan_says_that_only_the_first_of_several_teachers_is_searched_for(lab: TinyLab) -> None:
    missing = planned(lab, "--search lr=1e-4,3e-3 --teacher_seeds 2")[1]
    assert "teacher (2 trials of " in missing and "teacher 2 (one training of " in missing


def test_what_a_sweep_chooses_to_train_may_be_searched_for(lab: TinyLab) -> None:
    lab.done("grid", "--search static_lr=1e-3,1e-1 --sweep student_kind=static --pipeline student_only")
    run = lab.folder / "results/grid/student_kind_static"
    assert [trial["settings"] for trial in trials_of(run, "student")] == [{"static_lr": 1e-3}, {"static_lr": 1e-1}]
    line = lab.refused("--search static_lr=1e-3,1e-1 --sweep kd_alpha=0.2,0.8")
    assert line == "error: --search: no training of this run reads --static_lr"


def test_model_cards_name_the_settings_that_were_chosen(lab: TinyLab) -> None:
    run = lab.done("run", "--search lr=1e-4,3e-3 epochs=1,3 weight_decay=0.2 teacher_epochs=2")
    for model in ("teacher", "student"):
        (chosen,) = [trial["settings"] for trial in trials_of(run, model) if trial.get("chosen")]
        card = (run / model / "README.md").read_text(encoding="utf-8")
        shown = dict(re.findall(r"\| --(\w+) +\| +(\S+) +\|", card))
        assert {name: float(shown[name]) for name in chosen} == chosen and shown["teacher_epochs"] == "2"


def test_smallest_searched_batch_has_a_row_for_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_arguments(["--demo", "--search", "batch=8,1"]).config
    assert smallest_batch(config) == 1 and smallest_batch(dataclasses.replace(config, search=())) == config.batch
    for name, value in {"TORCHELASTIC_RUN_ID": "test", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="--batch: 1 rows cannot be shared by the 2 processes"):
        check_launch(config, smallest_batch(config))
