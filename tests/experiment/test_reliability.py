"""No run is lost and no wrong number is written, whatever is killed, damaged, full, changed or hostile."""

from __future__ import annotations

import json
import os
import pickle
import pkgutil
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from support.builders import LABELS, QUICK_EXTRAS, ROOT, build_model_folder, make_texts
from support.fault_injection import (
    DAMAGES,
    FLAGS,
    Attempt,
    attempt,
    build_inputs,
    copy_inputs,
    find_litter,
    fork_server,
    hold_run_directory,
    kill_runs,
    limit_runs,
    read_results,
)
from support.sweep_kills import Strike, read_sweep, strike_when

import research_main
from research.errors import InputError
from research.experiment import dataset as dataset_room
from research.experiment import inputs as inputs_room
from research.experiment import runtime as runtime_room
from research.experiment.command import STOP_SIGNALS
from research.models.encoders import load_encoder, load_tokenizer
from research.models.saved import load_classifier
from research.storage.cache import Cache
from research.storage.checkpoints import CheckpointFolder

CHILD = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


@dataclass
class Lab:
    """A folder with a table and two models of its own, in which the command is run as in a new process."""

    folder: Path
    capture: Callable[[], tuple[str, str]]

    def run(self, *more: str) -> tuple[int, str]:
        """Run the command; return its status and stderr."""
        runtime_room.open_cache.cache_clear()
        dataset_room._read_tables.cache_clear()
        dataset_room._split_tables.cache_clear()
        self.capture()
        status = research_main.main([*FLAGS, *more], QUICK_EXTRAS)
        errors = self.capture()[1]
        assert "Traceback" not in errors
        assert "Logging error" not in errors
        return status, errors

    def fails(self, status: int, *more: str) -> str:
        """Run a command that has to fail with one error line; return the line."""
        got, errors = self.run(*more)
        lines = [line for line in errors.splitlines() if line.startswith("error:")]
        assert (got, len(lines)) == (status, 1), errors
        assert not (self.folder / "run" / "metrics.json").exists()
        return lines[0]

    def ends_like(self, expected: dict[str, bytes], *more: str) -> str:
        """Run the command, which has to end well with these bytes; return its stderr."""
        status, errors = self.run(*more)
        assert status == 0, errors
        assert read_results(self.folder / "run") == expected
        assert not find_litter(self.folder)
        return errors


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def lab(tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lab:
    copy_inputs(inputs, tmp_path)
    monkeypatch.chdir(tmp_path)
    return Lab(tmp_path, lambda: tuple(capsys.readouterr()))  # type: ignore[return-value, arg-type]


@pytest.fixture(scope="module")
def untouched_folder(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> Path:
    return copy_inputs(inputs, tmp_path_factory.mktemp("untouched"))


@pytest.fixture(scope="module")
def untouched(untouched_folder: Path) -> Attempt:
    """A run that nothing happened to, in a process of its own."""
    run = attempt(untouched_folder)
    assert run.status == 0, run.errors
    assert not find_litter(untouched_folder)
    return run


@pytest.fixture(scope="module")
def expected(untouched_folder: Path, untouched: Attempt) -> dict[str, bytes]:
    return read_results(untouched_folder / "run")


def at_call(patch: pytest.MonkeyPatch, target: str, number: int, act: Callable[[], None]) -> None:
    """Do something just before the n-th call of a function."""
    owner, name = target.rsplit(".", 1)
    module: Any = pkgutil.resolve_name(owner)
    function, calls = getattr(module, name), [0]

    def counted(*arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            act()
        return function(*arguments, **keywords)

    patch.setattr(module, name, counted)


def interrupt(lab: Lab, target: str, number: int, *more: str, by: signal.Signals = signal.SIGTERM) -> str:
    """Send this process a signal at the n-th call of a function while the command runs; return its stderr."""
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, target, number, lambda: os.kill(os.getpid(), by))
        status, errors = lab.run(*more)
    assert status == 130, errors
    return errors


# Each step asks for its learning rate: the teacher has 3 steps, the student 6, the control 6.
STEP = "research.kd.loop.schedule"


# Kills and signals


def test_killed_runs_end_with_the_same_bytes(
    inputs: Path, untouched: Attempt, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """A short form of benchmarks/kill.py; how many of its kills come at a random moment hangs on the machine's speed."""
    result = kill_runs(tmp_path, inputs, untouched, expected, wanted=10, seed=0)
    assert result["kills"] >= 10
    assert result["runs_that_differ"] == []
    assert len(result["kills_by_phase"]) >= 3
    assert result["kills_by_kind"]["at a write"] > 0


def test_sweep_that_is_stopped_or_killed_or_loses_a_worker_ends_with_the_bytes_of_single_runs(
    inputs: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """The benchmark's --sweep_kills in short, each as soon as a run has begun and both workers have been told theirs.

    One whose parent is killed before that ends in multiprocessing's own traceback.
    """
    place = copy_inputs(inputs, tmp_path / "sweep")
    generator = random.Random(0)
    for target, by in (("group", signal.SIGINT), ("parent", signal.SIGKILL), ("worker", signal.SIGKILL)):
        strike = strike_when(
            lambda sweep: any(sweep.folder.glob("run/*/config.json")) and sweep.errors().count(": started") >= 2,
            place,
            target,
            by,
            generator,
        )
        assert isinstance(strike, Strike), strike
        assert strike.fault() is None, strike
    assert read_sweep(place)["kd_alpha_0.7"] == expected
    assert len(read_sweep(place)) == 3
    assert not find_litter(place)


@pytest.mark.parametrize("by", STOP_SIGNALS)
@pytest.mark.parametrize(("step", "where"), [(2, "2 of 3"), (5, "2 of 6"), (11, "2 of 6")])
def test_signal_leaves_a_checkpoint_of_that_step_and_the_run_goes_on_from_it(
    lab: Lab, expected: dict[str, bytes], by: signal.Signals, step: int, where: str
) -> None:
    """In the teacher's fine-tuning, in distilling and in the control; by time alone there is no checkpoint yet."""
    rarely = ("--checkpoint_minutes", "100")
    errors = interrupt(lab, STEP, step, *rarely, by=by)
    assert "the same command goes on from here" in errors
    assert f"resuming at step {where}" in lab.ends_like(expected, *rarely)


def test_signal_while_validating_loses_no_step_of_the_epoch(lab: Lab, expected: dict[str, bytes]) -> None:
    rarely = ("--checkpoint_minutes", "100")
    interrupt(lab, "research.experiment.training.compute_metrics", 1, *rarely)
    assert "resuming at step 3 of 3" in lab.ends_like(expected, *rarely)


@pytest.mark.parametrize(
    "target",
    [
        "research.experiment.tokenised.tokenize",
        "research.experiment.teacher_stage.fetch_logits",
        "research.kd.teacher.run_layers",
    ],
)
def test_signal_outside_training_stops_at_once_and_nothing_is_lost(lab: Lab, expected: dict[str, bytes], target: str) -> None:
    interrupt(lab, target, 1)
    lab.ends_like(expected)


def test_folds_go_on_where_a_signal_stopped_them(lab: Lab) -> None:
    flags = ("--num_folds", "2", "--pipeline", "student_only", "--no-with_control", "--checkpoint_minutes", "100")
    assert lab.run(*flags, "--output_dir", "whole")[0] == 0
    interrupt(lab, STEP, 7, *flags)
    finished = {path: path.stat().st_mtime_ns for path in (lab.folder / "run" / "fold_1").rglob("*") if path.is_file()}
    status, errors = lab.run(*flags)
    assert status == 0, errors
    assert "resuming at step" in errors
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    for fold in ("fold_1", "fold_2"):
        assert read_results(lab.folder / "run" / fold) == read_results(lab.folder / "whole" / fold)
    assert (lab.folder / "run/metrics.json").read_bytes() == (lab.folder / "whole/metrics.json").read_bytes()


def test_overwriting_that_a_signal_stopped_goes_on_with_the_same_command(lab: Lab, expected: dict[str, bytes]) -> None:
    lab.ends_like(expected)
    interrupt(lab, STEP, 8, "--overwrite")
    assert "resuming at step" in lab.ends_like(expected, "--overwrite")
    assert "resuming" not in lab.ends_like(expected, "--overwrite"), "a finished run is overwritten"


@pytest.mark.parametrize("by", STOP_SIGNALS)
def test_signal_before_the_run_is_claimed_is_an_interrupt_too(lab: Lab, expected: dict[str, bytes], by: signal.Signals) -> None:
    assert "the same command goes on" in interrupt(lab, "research.experiment.command.load_dataset", 1, by=by)
    assert not (lab.folder / "run").exists()


def test_signal_between_the_last_step_of_an_epoch_and_its_validation_stops_the_run(lab: Lab, expected: dict[str, bytes]) -> None:
    """The losses are read after each of the teacher's three steps, and once more when the stop was looked at last."""
    rarely = ("--checkpoint_minutes", "100")
    interrupt(lab, "research_distillation.DistillationTrainer.read_losses", 4, *rarely)
    assert "resuming at step 3 of 3" in lab.ends_like(expected, *rarely)


# Damage


def half_finished(lab: Lab) -> list[Path]:
    """Stop the run in the student's second epoch; return every file of its cache and checkpoints."""
    interrupt(lab, STEP, 8)
    roots = (lab.folder / "cache", lab.folder / "run" / "checkpoint")
    return sorted(path for root in roots for path in root.rglob("*") if path.is_file() and path.suffix != ".lock")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_entries_and_checkpoints_are_noticed_and_made_again(
    lab: Lab, expected: dict[str, bytes], damage: str
) -> None:
    """A file of every entry at once, and the newest checkpoint; the benchmark damages every file alone."""
    files = half_finished(lab)
    parts = [path.relative_to(lab.folder).parts for path in files]
    # The last file of each cache entry, cache/<kind>/<hash>, and the newest checkpoint.
    chosen = {names[:3] if names[0] == "cache" else names[:2]: path for names, path in zip(parts, files, strict=True)}
    assert {names[1] for names in chosen} == {"tokens", "words", "teachers", "logits", "layers", "checkpoint"}
    for path in chosen.values():
        DAMAGES[damage](path)
    errors = lab.ends_like(expected)
    assert errors.count("is damaged") == len(chosen) - 1
    assert ("cannot be used" in errors) == (damage != "delete")


@pytest.mark.parametrize("kind", ["logits", "layers"])
def test_missing_cache_entry_changes_no_number(lab: Lab, expected: dict[str, bytes], kind: str) -> None:
    """The teacher is then loaded at another moment, which once moved the random numbers of the projections."""
    half_finished(lab)
    shutil.rmtree(lab.folder / "run")
    shutil.rmtree(lab.folder / "cache" / kind)
    lab.ends_like(expected)


def test_leavings_of_a_process_killed_after_its_last_file_go_with_the_next_command(tmp_path: Path) -> None:
    def build(folder: Path, scratch: Path) -> None:
        (folder / "weights").write_bytes(b"weights")

    entry = Cache(tmp_path).fetch("teachers", {"seed": 1}, build)
    scratch = entry.with_suffix(".work")
    scratch.mkdir()
    (scratch / "step.ckpt").write_bytes(b"large")
    assert Cache(tmp_path).fetch("teachers", {"seed": 1}, lambda folder, scratch: pytest.fail("it is whole")) == entry
    assert not scratch.exists()


def test_checkpoints_left_in_a_finished_run_go_with_the_next_command(lab: Lab, expected: dict[str, bytes]) -> None:
    lab.ends_like(expected)
    for name in ("checkpoint", "checkpoint_control"):
        (lab.folder / "run" / name).mkdir()
    assert "finished already" in lab.ends_like(expected)


# Changed inputs


def edit_text(folder: Path) -> None:
    path = folder / "data" / "comments.csv"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[10] = "মেঘ নদী " + lines[10]
    path.write_text("".join(lines), encoding="utf-8")


def edit_labels(folder: Path) -> None:
    """Give some training rows another label; no text changes."""
    path = folder / "data" / "comments.csv"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for row in range(5, 25):
        text, *cells = lines[row].rstrip().split(",")
        lines[row] = ",".join([text, *cells[:-1], str(1 - int(cells[-1]))]) + "\n"
    path.write_text("".join(lines), encoding="utf-8")


def replace_table(folder: Path) -> None:
    texts = make_texts(60, seed=77)
    lines = [
        "text," + ",".join(LABELS),
        *(f"{text},{row % 2},{row % 3 // 2},0,1,{(row + 1) % 2}" for row, text in enumerate(texts)),
    ]
    (folder / "data" / "comments.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def change_tokenizer(folder: Path) -> None:
    """Take a vocabulary of the same size from other texts; the weights stay."""
    scratch = folder / "scratch"
    build_model_folder("electra", "wordpiece", scratch, make_texts(90, seed=3)[::-1], layers=1, width=24, vocab_size=150)
    shutil.copy(scratch / "tokenizer.json", folder / "models" / "teacher" / "tokenizer.json")


def change_weights(model: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "models" / model / "model.safetensors"
        tensors = load_file(path)
        save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, path, {"format": "pt"})

    return change


CHANGES = {
    "an edited text": edit_text,
    "edited labels": edit_labels,
    "another table of as many rows": replace_table,
    "another tokenizer of the teacher": change_tokenizer,
    "another teacher": change_weights("teacher"),
    "another student": change_weights("student"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_input_is_never_served_from_an_old_cache_or_checkpoint(
    lab: Lab, inputs: Path, expected: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, change: str
) -> None:
    half_finished(lab)
    CHANGES[change](lab.folder)
    fresh = copy_inputs(inputs, tmp_path_factory.mktemp("fresh"))
    CHANGES[change](fresh)
    clean = attempt(fresh)
    assert clean.status == 0, clean.errors
    results = read_results(fresh / "run")
    assert results["predictions.csv"] != expected["predictions.csv"], "the change changes nothing"
    lab.ends_like(results)


@pytest.mark.parametrize("finished", [True, False])
def test_folds_of_an_edited_table_are_refused_not_mixed(lab: Lab, finished: bool) -> None:
    flags = ("--num_folds", "2", "--pipeline", "student_only", "--no-with_control")
    if finished:
        assert lab.run(*flags)[0] == 0
    else:
        interrupt(lab, STEP, 7, *flags)
    edit_labels(lab.folder)
    status, errors = lab.run(*flags)
    assert status == 2
    assert "run/fold_1 was made from another content of data/comments.csv" in errors


def test_edited_test_table_of_a_finished_run_is_refused(lab: Lab) -> None:
    shutil.copy(lab.folder / "data" / "comments.csv", lab.folder / "test.csv")
    flags = ("--pipeline", "student_only", "--no-with_control", "--test_path", "test.csv", "--dataset_path", "main.csv")
    texts = make_texts(50, seed=9)
    rows = [f"{text},{place % 2},1,0,{place % 3 // 2},1" for place, text in enumerate(texts)]
    (lab.folder / "main.csv").write_text("\n".join(["text," + ",".join(LABELS), *rows]) + "\n", encoding="utf-8")
    assert lab.run(*flags)[0] == 0
    (lab.folder / "test.csv").write_text(
        (lab.folder / "test.csv").read_text(encoding="utf-8") + "নতুন,1,0,0,0,0\n", encoding="utf-8"
    )
    status, errors = lab.run(*flags)
    assert (status, "another content of test.csv" in errors) == (2, True)


# Models that change under a run or after it


def link_out(folder: Path) -> None:
    """Move the files of a model, subfolders included, elsewhere and leave links, as the hub's cache has them."""
    store = folder.with_name(f"{folder.name} of elsewhere")
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        blob = store / path.relative_to(folder)
        blob.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blob)
        path.symlink_to(blob)


def link_folder(folder: Path) -> None:
    """Move the folder of a model elsewhere and leave a link."""
    store = folder.with_name(f"{folder.name} of elsewhere")
    folder.rename(store)
    folder.symlink_to(store)


def scale_weights(path: Path, factor: float = 1.01) -> None:
    """Write other weights of the same size into a file."""
    content = save({name: tensor * factor for name, tensor in load_file(path).items()}, {"format": "pt"})
    with open(path, "r+b") as file:
        file.write(content)


def make_checkpoint(lab: Lab) -> Path:
    """Fine-tune a teacher with another table and cache; return its folder, for --teacher_checkpoint."""
    status, errors = lab.run("--pipeline", "baseline", "--no-with_control", "--output_dir", "other", "--cache_dir", "cache_other")
    assert status == 0, errors
    return (lab.folder / "other" / "teacher").rename(lab.folder / "checkpoint")


CHECKPOINT = ("--teacher_checkpoint", "checkpoint", "--no-with_control")


@pytest.mark.parametrize("link", [link_out, link_folder])
def test_linked_checkpoint_whose_weights_change_gives_no_old_logits(lab: Lab, link: Callable[[Path], None]) -> None:
    link(make_checkpoint(lab))
    assert lab.run(*CHECKPOINT, "--output_dir", "before")[0] == 0
    scale_weights((lab.folder / "checkpoint" / "model.safetensors").resolve())
    assert lab.run(*CHECKPOINT)[0] == 0
    assert lab.run(*CHECKPOINT, "--output_dir", "fresh", "--cache_dir", "fresh_cache")[0] == 0
    before, after, fresh = (read_results(lab.folder / name) for name in ("before", "run", "fresh"))
    assert after == fresh
    assert after["predictions.csv"] != before["predictions.csv"]


@pytest.mark.parametrize("model", ["teacher", "student", "checkpoint"])
def test_finished_run_whose_model_has_changed_is_refused(lab: Lab, model: str) -> None:
    flags, folder, file = ["--no-with_control"], f"models/{model}", "model.safetensors"
    if model == "checkpoint":
        make_checkpoint(lab)
        flags, folder, file = [*CHECKPOINT], "checkpoint", "model.safetensors"
    assert lab.run(*flags)[0] == 0
    results = read_results(lab.folder / "run")
    path = lab.folder / folder / file
    os.utime(path)
    assert "finished already" in lab.run(*flags)[1], "another time alone is no change"
    scale_weights(path)
    status, errors = lab.run(*flags)
    side = "student" if model == "student" else "teacher"
    assert (status, errors.splitlines()) == (
        2,
        [
            f"error: run was made from other files of the {side} {folder} ({file}). "
            "Use another --output_dir, or --overwrite to run on the model as it is now."
        ],
    )
    assert read_results(lab.folder / "run") == results
    status, errors = lab.run(*flags, "--overwrite")
    assert status == 0, errors
    assert read_results(lab.folder / "run")["predictions.csv"] != results["predictions.csv"]
    assert "finished already" in lab.run(*flags)[1]


def test_finished_run_answers_where_its_models_are_gone_or_its_environment_is_of_an_earlier_version(lab: Lab) -> None:
    flags = ("--pipeline", "student_only", "--no-with_control")
    assert lab.run(*flags)[0] == 0
    environment = lab.folder / "run" / "environment.json"
    content = json.loads(environment.read_text(encoding="utf-8"))
    assert set(content["models"]) == {"student"}
    shutil.move(lab.folder / "models" / "student", lab.folder / "moved")
    assert "finished already" in lab.run(*flags)[1]
    shutil.move(lab.folder / "moved", lab.folder / "models" / "student")
    change_weights("student")(lab.folder)
    del content["models"]
    environment.write_text(json.dumps(content), encoding="utf-8")
    assert "finished already" in lab.run(*flags)[1]


def test_folds_of_two_students_are_refused_not_mixed(lab: Lab) -> None:
    flags = ("--num_folds", "2", "--pipeline", "student_only", "--no-with_control")
    interrupt(lab, STEP, 7, *flags)
    change_weights("student")(lab.folder)
    status, errors = lab.run(*flags)
    assert status == 2
    assert "run/fold_1 was made from other files of the student models/student (model.safetensors)" in errors


@pytest.mark.parametrize("model", ["teacher", "student"])
def test_weights_swapped_between_hashing_and_loading_poison_nothing(
    lab: Lab, inputs: Path, tmp_path_factory: pytest.TempPathFactory, model: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, f"research.experiment.{model}_stage.load_encoder", 1, lambda: change_weights(model)(lab.folder))
        line = lab.fails(2)
    assert f"model 'models/{model}': model.safetensors changed while the run was reading it" in line
    fresh = copy_inputs(inputs, tmp_path_factory.mktemp("fresh"))
    change_weights(model)(fresh)
    clean = attempt(fresh)
    assert clean.status == 0, clean.errors
    lab.ends_like(read_results(fresh / "run"))


def test_checkpoint_swapped_while_it_is_loaded_is_loaded_again(lab: Lab) -> None:
    path = make_checkpoint(lab) / "model.safetensors"
    loads: list[str] = []

    def load(*arguments: Any, **keywords: Any) -> Any:
        loaded = load_classifier(*arguments, **keywords)
        if not loads:
            scale_weights(path)
        loads.append("loaded")
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs_room, "load_classifier", load)
        assert lab.run(*CHECKPOINT)[0] == 0
    assert len(loads) == 2
    assert lab.run(*CHECKPOINT, "--output_dir", "fresh", "--cache_dir", "fresh_cache")[0] == 0
    assert read_results(lab.folder / "run") == read_results(lab.folder / "fresh")


def test_cached_teacher_altered_between_checking_and_loading_is_not_used(lab: Lab, expected: dict[str, bytes]) -> None:
    interrupt(lab, "research.experiment.teacher_stage.fetch_logits", 1)
    path = next((lab.folder / "cache" / "teachers").glob("*/model/model.safetensors"))
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, "research.experiment.teacher_stage.load_classifier", 1, lambda: scale_weights(path))
        assert "was changed while it was in use" in lab.fails(2)
    assert "is damaged" in lab.ends_like(expected)


def test_what_is_written_into_a_runs_teacher_stays_there(lab: Lab, expected: dict[str, bytes]) -> None:
    lab.ends_like(expected)
    for path in (lab.folder / "run" / "teacher").rglob("*"):
        if path.is_file():
            with open(path, "r+b") as file:
                file.write(b"edited in place")
    assert "is damaged" not in lab.run("--output_dir", "second")[1]
    assert read_results(lab.folder / "second") == expected


# Memory, disk and numbers that are none


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


CPU_ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
)
OUT_OF_MEMORY = {
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    "CPU": RuntimeError(CPU_ALLOCATOR),
    "Python": MemoryError(),
}


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_out_of_memory_names_the_batch_and_nothing_is_lost(
    lab: Lab, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    with monkeypatch.context() as patch:
        at_call(patch, "research_distillation.DistillationTrainer.compute_losses", 8, raising(OUT_OF_MEMORY[kind]))
        line = lab.fails(1)
    assert re.search(r"step 5: out of memory with a batch of 16 rows, the longest of \d+ tokens\. Lower --batch", line)
    assert "resuming at step 4 of 6" in lab.ends_like(expected)


def test_out_of_memory_outside_training_says_what_to_lower(
    lab: Lab, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_call(patch, "research.kd.labelling.predict_logits", 1, raising(MemoryError()))
        assert "without training, on rows of up to --max_length 32 tokens" in lab.fails(1)
    lab.ends_like(expected)


def test_other_runtime_errors_keep_their_traceback(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    at_call(monkeypatch, "research_distillation.DistillationTrainer.compute_losses", 2, raising(RuntimeError("a fault of ours")))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        lab.run()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A function that mounts a disk of a size below the test's folder, or gives the mounted one another size."""
    place = tmp_path / "small"
    place.mkdir()

    def resize(size: str) -> Path:
        options = f"size={size}" if not os.path.ismount(place) else f"remount,size={size}"
        try:
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a small disk cannot be mounted here: {error}")
        return place

    yield resize
    if os.path.ismount(place):
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize(
    ("flag", "size"),
    [("output_dir", size) for size in ("4k", "64k", "300k")] + [("cache_dir", size) for size in ("16k", "64k", "600k")],
)
def test_full_disk_is_one_line_and_the_same_command_goes_on_after_making_room(
    lab: Lab, expected: dict[str, bytes], small_disk: Callable[[str], Path], flag: str, size: str
) -> None:
    small_disk(size)
    place = "small/run" if flag == "output_dir" else "small/cache"
    line = lab.fails(1, f"--{flag}", place)
    assert re.search(rf"(No space left on device|full disk).*: .*{place}.*Make room", line), line
    small_disk("50m")
    status, errors = lab.run(f"--{flag}", place)
    assert status == 0, errors
    assert read_results(lab.folder / ("small/run" if flag == "output_dir" else "run")) == expected


def test_files_that_end_early_are_one_line_and_the_same_command_goes_on(
    inputs: Path, untouched_folder: Path, untouched: Attempt, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """A short form of the benchmark."""
    result = limit_runs(tmp_path, inputs, untouched_folder, untouched, expected, wanted=8)
    assert result["limits_that_differ"] == []
    assert result["limits_end_in"]["an error line, then the same bytes"] >= 4


def test_non_finite_loss_names_step_component_and_rows_and_keeps_the_last_good_checkpoint(lab: Lab) -> None:
    line = lab.fails(1, "--lr", "1e30")
    assert re.search(r"step \d+: (hard_loss|grad_norm) is (nan|inf).*Rows \d+, \d+.*Try a lower --lr", line), line
    kept = [path for path in (lab.folder / "cache" / "teachers").glob("*.work/*.ckpt")]
    assert len(kept) >= 1
    state = CheckpointFolder(kept[0].parent).load()
    assert state is not None
    assert all(torch.isfinite(tensor).all() for tensor in state["student"].values())


# Locks


def test_second_process_of_a_directory_is_refused_and_a_killed_one_gives_it_up(lab: Lab, expected: dict[str, bytes]) -> None:
    context = fork_server()
    holding = context.Event()
    owner = context.Process(target=hold_run_directory, args=(lab.folder / "run", holding))
    owner.start()
    assert holding.wait(60)
    assert "run is being written by another process" in lab.fails(2)
    owner.kill()
    owner.join()
    assert (lab.folder / "run" / ".lock").exists(), "the killed process left its lock"
    lab.ends_like(expected)


def test_two_runs_of_one_cache_build_each_entry_once(inputs: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    folders = [copy_inputs(inputs, tmp_path / name) for name in ("left", "right")]
    flags = [*FLAGS, "--cache_dir", str(tmp_path / "cache")]
    fork_server()
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda folder: attempt(folder, flags), folders))
    assert [each.status for each in both] == [0, 0], both
    assert sum(each.errors.count("fine-tuning the teacher") for each in both) == 1
    assert [read_results(folder / "run") for folder in folders] == [expected, expected]


# Hostile folders


class Hostile:
    """Makes a folder when it is unpickled without a guard."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.witness),)


def update_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def plant_pickled_weights(folder: Path, witness: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"embeddings.word_embeddings.weight": Hostile(witness)}, folder / "pytorch_model.bin")


def plant_bare_pickle(folder: Path, witness: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile(witness), protocol=2))


def plant_code(folder: Path, witness: Path) -> None:
    (folder / "hostile.py").write_text(f"import os\nos.mkdir({str(witness)!r})\nclass Model: pass\n", encoding="utf-8")
    update_json(folder / "config.json", auto_map={"AutoConfig": "hostile.Model", "AutoModel": "hostile.Model"})
    update_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["hostile.Model", "hostile.Model"]})


def plant_unknown_architecture(folder: Path, witness: Path) -> None:
    plant_code(folder, witness)
    update_json(folder / "config.json", model_type="hostile", architectures=["Model"])


def plant_attention_of_the_hub(folder: Path, witness: Path) -> None:
    update_json(folder / "config.json", _attn_implementation="hostile/kernel")


HOSTILE: dict[Callable[[Path, Path], None], str | None] = {
    plant_pickled_weights: "Weights only load failed",
    plant_bare_pickle: "Weights only load failed",
    plant_code: None,
    plant_unknown_architecture: "custom code",
    plant_attention_of_the_hub: None,
}


@pytest.mark.parametrize("plant", HOSTILE)
def test_hostile_model_folder_runs_no_code(inputs: Path, tmp_path: Path, plant: Callable[[Path, Path], None]) -> None:
    """It is refused in one line, or what is hostile of it is not looked at."""
    folder, witness = tmp_path / "model", tmp_path / "witness"
    shutil.copytree(inputs / "models" / "student", folder)
    plant(folder, witness)
    if (reason := HOSTILE[plant]) is None:
        load_encoder(str(folder))
    else:
        with pytest.raises(InputError, match=reason):
            load_encoder(str(folder))
    load_tokenizer(str(folder))
    with pytest.raises(InputError):
        load_classifier(str(folder), LABELS)
    assert not witness.exists()


def test_hostile_pickle_does_run_code_without_the_guard(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Hostile(tmp_path / "witness")))
    assert (tmp_path / "witness").exists()


@pytest.mark.parametrize("head", ["classifier.pt", "head.bin"])
def test_hostile_head_runs_no_code(inputs: Path, tmp_path: Path, head: str) -> None:
    shutil.copytree(inputs / "models" / "student", tmp_path / "model" / "encoder")
    torch.save({"0.weight": Hostile(tmp_path / "witness")}, tmp_path / "model" / head)
    with pytest.raises(InputError, match=f"{head} cannot be read"):
        load_classifier(str(tmp_path / "model"), LABELS)
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize("target", ["../secret.safetensors", "{absolute}", "..", "", "a/b.safetensors", 7])
def test_index_of_weights_is_not_followed_out_of_its_folder(inputs: Path, tmp_path: Path, target: Any) -> None:
    folder, secret = tmp_path / "model", tmp_path / "secret.safetensors"
    shutil.copytree(inputs / "models" / "student", folder)
    (folder / "model.safetensors").rename(secret)
    file = str(secret) if target == "{absolute}" else target
    weight_map = dict.fromkeys(load_file(secret), file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    with pytest.raises(InputError, match="no file of its folder"):
        load_encoder(str(folder))


def test_index_of_weights_in_its_folder_is_loaded(inputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(inputs / "models" / "student", folder)
    shard = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / shard)
    weight_map = dict.fromkeys(load_file(folder / shard), shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    loaded, single = load_encoder(str(folder)), load_encoder(str(inputs / "models" / "student"))
    assert all(torch.equal(left, right) for left, right in zip(loaded.parameters(), single.parameters(), strict=True))


def test_names_and_texts_of_the_table_are_escaped_in_the_reports(lab: Lab) -> None:
    attack = "<script>alert(1)</script>"
    rows = [f"{attack} {text},{place % 2},{place % 3 // 2}" for place, text in enumerate(make_texts(60))]
    (lab.folder / "data/comments.csv").write_text("\n".join([f"text,{attack}|x,b", *rows]) + "\n", encoding="utf-8")
    status, errors = lab.run("--pipeline", "student_only", "--no-with_control")
    assert status == 0, errors
    reports = [path for path in (lab.folder / "run").glob("report.*")]
    assert lab.folder / "run" / "report.md" in reports
    for path in reports:
        text = path.read_text(encoding="utf-8")
        assert attack not in text
        assert "&lt;script&gt;" in text


# Bad tables, configs and model folders


def test_bad_tables_configs_and_models_end_in_one_line_each(tmp_path: Path) -> None:
    """A short form of the benchmark."""
    command = [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), "--cases", "150", "--models", "60"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | CHILD, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["cases"] >= 150
    assert result["refused"] > result["cases"] / 2
    assert result["models"]["loaded"] + result["models"]["refused"] == 60
    assert not list(tmp_path.iterdir())
