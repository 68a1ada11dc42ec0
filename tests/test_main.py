"""The command line from end to end: what runs, what is refused and how, and what stands in the run directory."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.builders import (
    LABELS,
    QUICK_EXTRAS,
    ROOT,
    TOKENIZERS,
    build_model_folder,
    build_reference_hub_cache,
    encoder_config,
    make_table,
    make_texts,
)

import research_main
from research.models.saved import load_classifier
from research_data import hash_text

KD_METHODS = ("logit", "hidden", "attention", "multi_level")
# The commands that the people the suite is for wrote down, to be run exactly as they stand.
REFERENCE_COMMANDS = (
    *(f"--pipeline kd_only --kd_method {method} --output_dir results/kd_method_{method}" for method in KD_METHODS),
    *(f"--pipeline kd_only --kd_alpha {alpha} --output_dir results/alpha_{alpha}" for alpha in (0.3, 0.5, 0.7, 0.9)),
    *(f"--pipeline kd_only --kd_temperature {temp} --output_dir results/temp_{temp}" for temp in (2, 4, 6, 10)),
    "--pipeline kd_only --student_path google/mobilebert-uncased --student_hidden_size 128 "
    "--output_dir results/student_mobilebert",
    "--student_path distilbert-base-multilingual-cased --student_hidden_size 256",
    "--student_path bert-base-multilingual-cased --student_hidden_size 512",
)
RUN_FILES = {
    "config.json", "metrics.json", "history.csv", "predictions.csv", "validation_predictions.csv", "efficiency.json",
    "environment.json", "report.md", "report.html", "run.log", "student", "teacher", "plots",
}  # fmt: skip
PLOTS = {"training.png", "label_f1.png", "precision_recall.png", "reliability.png"}
DETERMINISTIC_FILES = ("metrics.json", "history.csv", "predictions.csv", "validation_predictions.csv")
QUICK = (
    "--teacher_path models/teacher --student_path models/student --lr 1e-3 --teacher_epochs 1 --epochs 2 --batch 16 "
    "--max_length 32 --student_hidden_size 8 --allow_weak_teacher --num_threads 1"
)


@dataclass
class Lab:
    """A folder with a table and two tiny models, in which commands are run."""

    folder: Path
    capture: Callable[[], tuple[str, str]]

    def run(self, flags: str, *more: str) -> tuple[int, str, str]:
        """Run one command in this process; return its status, stdout and stderr."""
        self.capture()
        status = research_main.main([*flags.split(), *more], QUICK_EXTRAS)
        return status, *self.capture()

    def done(self, name: str, flags: str = "") -> Path:
        """Run a quick command that has to succeed, in results/<name>."""
        status, _, errors = self.run(f"{QUICK} {flags} --output_dir results/{name}")
        assert status == 0, errors
        return self.folder / "results" / name

    def refused(self, flags: str, *more: str) -> str:
        """Run a command that has to be refused: one error line, no traceback, nothing written; return the line."""
        before = snapshot(self.folder)
        status, output, errors = self.run(flags, *more)
        faults = [line for line in errors.splitlines() if line.startswith("error:")]
        assert (status, output, len(faults)) == (2, "", 1), errors
        assert "Traceback" not in errors
        assert snapshot(self.folder) == before
        return faults[0]


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return every path below a folder, links not followed, with its size and time of change."""
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table and the models, made once; their cache is shared too, so one teacher serves most tests."""
    folder = tmp_path_factory.mktemp("materials")
    make_table(folder / "data" / "comments.csv", rows=80)
    texts = make_texts(80)
    build_model_folder("electra", "wordpiece", folder / "models" / "teacher", texts, layers=2, width=24, seed=1)
    build_model_folder("distilbert", "unigram", folder / "models" / "student", texts, layers=2, width=16, seed=2)
    (folder / "cache").mkdir()
    return folder


@pytest.fixture
def lab(tmp_path: Path, materials: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lab:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "comments.csv").write_bytes((materials / "data" / "comments.csv").read_bytes())
    for name in ("models", "cache"):
        (tmp_path / name).symlink_to(materials / name)
    monkeypatch.chdir(tmp_path)
    return Lab(tmp_path, lambda: tuple(capsys.readouterr()))  # type: ignore[return-value, arg-type]


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def columns_of(path: Path, prefix: str) -> np.ndarray:
    """Return the columns of a predictions file that begin with a prefix, (N, C)."""
    rows = read_rows(path)
    return np.array([[float(cell) for name, cell in row.items() if name.startswith(prefix)] for row in rows])


def assert_same_results(left: Path, right: Path) -> None:
    for name in DETERMINISTIC_FILES:
        assert (left / name).read_bytes() == (right / name).read_bytes(), name


def table_rows(lab: Lab) -> list[list[str]]:
    with (lab.folder / "data" / "comments.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def write_rows(path: Path, rows: list[list[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


# The reference commands


def test_reference_commands_run_as_written(tmp_path: Path) -> None:
    """One process runs them all, with the hub's own folders and default flags; only its imports are shared."""
    table = make_table(tmp_path / "data" / "comments.csv", rows=60, label_rate=0.75)
    build_reference_hub_cache(tmp_path / "hub", [row["text"] for row in read_rows(table)])
    script = (
        "import json, sys, research_main\n"
        "from research.experiment.runtime import Extras\n"
        "print(json.dumps([research_main.main(line.split(), Extras(0.01)) for line in json.loads(sys.argv[1])]))\n"
    )
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    finished = subprocess.run(
        [sys.executable, "-c", script, json.dumps(REFERENCE_COMMANDS)],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert json.loads(lines[-1]) == [0] * len(REFERENCE_COMMANDS), finished.stderr
    assert len({line.split()[0] for line in lines[:-1]}) == len(REFERENCE_COMMANDS)
    for line in lines[:-1]:
        run_dir = tmp_path / line.split()[0]
        assert {path.name for path in run_dir.iterdir()} >= RUN_FILES
        assert {path.name for path in (run_dir / "plots").iterdir()} == PLOTS
        assert not (run_dir / "checkpoint").exists()
        assert read_json(run_dir / "metrics.json")["headline"]["value"] is not None
    alphas = [(tmp_path / f"results/alpha_{alpha}/history.csv").read_bytes() for alpha in (0.3, 0.5, 0.7, 0.9)]
    assert len(set(alphas)) == 4
    components = {name: read_rows(tmp_path / f"results/kd_method_{name}/history.csv")[0] for name in KD_METHODS}
    for method, first in components.items():
        assert (first["hidden_loss"] != "") == (method in ("hidden", "multi_level"))
        assert (first["attention_loss"] != "") == (method in ("attention", "multi_level"))
        assert all(float(first[name]) > 0 for name in ("hidden_loss", "attention_loss") if first[name])


# Bad input


def edit_cell(value: str) -> Callable[[Lab], str]:
    def edit(lab: Lab) -> str:
        rows = table_rows(lab)
        rows[5][2] = value
        write_rows(lab.folder / "data" / "comments.csv", rows)
        return ""

    return edit


def write_table_bytes(content: bytes, flags: str = "") -> Callable[[Lab], str]:
    def write(lab: Lab) -> str:
        (lab.folder / "data" / "comments.csv").write_bytes(content)
        return flags

    return write


def break_utf8(lab: Lab) -> str:
    path = lab.folder / "data" / "comments.csv"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[6] = b"\xff" + lines[6]
    path.write_bytes(b"".join(lines))
    return ""


def below_a_file(lab: Lab) -> str:
    (lab.folder / "file").write_text("", encoding="utf-8")
    return "--output_dir file/run"


BAD_INPUTS: dict[str, tuple[str | Callable[[Lab], str], tuple[str, ...]]] = {
    "missing file": ("--dataset_path data/none.csv", ("--dataset_path", "data/none.csv")),
    "empty file": (write_table_bytes(b""), ("data/comments.csv", "empty")),
    "header only": (write_table_bytes(b"text,bully\n"), ("data/comments.csv",)),
    "no text column": (write_table_bytes(b"id,words,bully\n1,x,0\n"), ("id", "words", "bully", "--text_column")),
    "unknown text column": ("--text_column comment", ("comment", "text, bully, sexual")),
    "unknown label column": ("--label_columns bully hate", ("hate", "text, bully, sexual")),
    "label of 2": (edit_cell("2"), ("data/comments.csv", "line 6", "sexual", "2")),
    "label of 0.5": (edit_cell("0.5"), ("data/comments.csv", "line 6", "sexual", "0.5")),
    "label of yes": (edit_cell("yes"), ("data/comments.csv", "line 6", "sexual", "yes")),
    "broken UTF-8": (break_utf8, ("data/comments.csv", "line 7", "UTF-8")),
    "fewer rows than folds": ("--num_folds 90", ("80", "90", "--num_folds")),
    "too few rows": (write_table_bytes(b"text,bully\na,0\nb,1\n"), ("2 distinct texts",)),
    "alpha over 1": ("--kd_alpha 1.5", ("--kd_alpha", "1.5")),
    "temperature 0": ("--kd_temperature 0", ("--kd_temperature", "0")),
    "unknown method": ("--kd_method magic", ("--kd_method", "magic", "multi_level")),
    "unknown flag": ("--kd_alfa 0.5", ("--kd_alfa", "--kd_alpha")),
    "layer out of range": ("--kd_method hidden --layer_mapping 9:1", ("--layer_mapping", "9")),
    "student layer out of range": ("--kd_method attention --layer_mapping 2:1,2:7", ("--layer_mapping", "7")),
    "too many student layers": ("--student_layers 3", ("--student_layers", "2", "3")),
    "teacher that is not there": ("--teacher_path nobody/nothing", ("--teacher_path", "nobody/nothing")),
    "student that is not there": ("--student_path nobody/nothing", ("--student_path", "nobody/nothing")),
    "checkpoint that is not there": ("--teacher_checkpoint nobody/nothing", ("--teacher_checkpoint", "nobody/nothing")),
    "checkpoint without a head": ("--teacher_checkpoint models/teacher", ("--teacher_checkpoint", "no trained head")),
    "alpha of an unknown label": ("--label_alphas hate=0.5", ("--label_alphas", "hate", "bully, sexual")),
    "max_length over the model's": ("--max_length 4096", ("--max_length", "512", "4096")),
    "output_dir below a file": (below_a_file, ("--output_dir", "file")),
    "card that is not there": ("--device cuda:77", ("--device", "cuda:77")),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_one_line_with_status_2_and_writes_nothing(name: str, lab: Lab) -> None:
    given, fragments = BAD_INPUTS[name]
    flags = given if isinstance(given, str) else given(lab)
    line = lab.refused(f"{QUICK} {flags}")
    assert all(fragment in line for fragment in fragments), line


@pytest.mark.parametrize("name", ["label of 2", "no text column", "too few rows", "broken UTF-8", "alpha of an unknown label"])
def test_bad_table_is_refused_without_torch(name: str, lab: Lab) -> None:
    """Importing torch and transformers first made every refusal take ten seconds."""
    given, fragments = BAD_INPUTS[name]
    flags = given if isinstance(given, str) else given(lab)
    errors, loaded = run_and_list_modules(f"{QUICK} {flags}", 2)
    assert all(fragment in errors for fragment in fragments), errors
    assert not {"torch", "transformers"} & loaded


def run_and_list_modules(flags: str, status: int) -> tuple[str, set[str]]:
    """Run a command in a process of its own; return its stderr and the modules it had imported at its end."""
    script = "import sys, research_main\nstatus = research_main.main(sys.argv[1:])\nprint(status, *sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", script, *flags.split()], env=environment, capture_output=True, text=True)
    found, *modules = ended.stdout.splitlines()[-1].split()
    assert found == str(status), ended.stderr
    return ended.stderr, set(modules)


def test_every_fault_of_the_flags_is_reported_on_a_line_of_its_own(lab: Lab) -> None:
    status, _, errors = lab.run("--kd_alpha 1.5 --kd_temperature 0 --kd_method magic --dataset_path none.csv")
    assert status == 2
    flags = [line.split()[1] for line in errors.splitlines()]
    assert sorted(flags) == ["--dataset_path:", "--kd_alpha:", "--kd_method:", "--kd_temperature:"]


def test_folder_of_somebody_else_is_refused(lab: Lab) -> None:
    (lab.folder / "thesis").mkdir()
    (lab.folder / "thesis" / "chapter.tex").write_text("words", encoding="utf-8")
    assert "thesis" in lab.refused(f"{QUICK} --output_dir thesis")
    assert "thesis" in lab.refused(f"{QUICK} --output_dir thesis --overwrite")


def test_label_without_a_positive_row_is_a_warning_and_the_run_goes_on(lab: Lab) -> None:
    rows = table_rows(lab)
    write_rows(lab.folder / "data" / "comments.csv", [rows[0], *([*row[:4], "0", row[5]] for row in rows[1:])])
    status, _, errors = lab.run(f"{QUICK} --pipeline student_only --output_dir results/run")
    assert status == 0
    assert "label 'threat' has no positive row to train on" in errors


# What is said before anything is computed


def test_run_begins_with_what_it_read_and_what_it_will_do_and_its_log_file_says_so_too(lab: Lab) -> None:
    rows = table_rows(lab)
    rows[3][4] = ""
    write_rows(lab.folder / "data" / "comments.csv", [*rows, rows[1], ["", *rows[1][1:]]])
    flags = f"{QUICK} --cache_dir other --unlabelled_path more.csv --output_dir results/run"
    write_rows(lab.folder / "more.csv", [["text"], ["আরও একটি"], rows[1][:1]])
    status, _, errors = lab.run(flags)
    assert status == 0
    lines = [
        "data/comments.csv: 81 rows, 80 distinct texts in column 'text'; left out: 1 row without a text",
        "labels, with their share of positives: ",
        "rows (distinct texts) of each part: train ",
        "device: cpu (",
        "there already: nothing",
        "to compute: the teacher's tokens, the student's tokens, teacher (at most 1 epoch of ",
        "writing results/run",
    ]
    said = errors.splitlines()
    found = [next(place for place, line in enumerate(said) if line.startswith(start)) for start in lines]
    assert found == sorted(found)
    bully = 100 * np.mean([float(row[1]) for row in [*rows[1:], rows[1]]])
    assert said[found[1]].startswith(f"{lines[1]}bully {bully:.1f} %, sexual ")
    assert re.search(r"threat \d+\.\d % \(1\.2 % unknown\)", said[found[1]])
    in_file = (lab.folder / "results/run/run.log").read_text(encoding="utf-8")
    assert all(start in in_file for start in lines)


def test_dry_run_says_what_is_there_and_writes_nothing(lab: Lab) -> None:
    flags = f"{QUICK} --cache_dir other --with_control --output_dir results/run"
    before = snapshot(lab.folder)
    status, output, errors = lab.run(f"{flags} --dry_run")
    assert (status, output) == (0, "") and snapshot(lab.folder) == before
    assert "there already: nothing\n" in errors
    assert "dry run: results/run would be written; nothing was written" in errors
    assert lab.run(flags)[0] == 0
    before = snapshot(lab.folder)
    _, _, errors = lab.run(f"{flags.replace('results/run', 'results/other')} --seed 7 --dry_run")
    assert "there already: the teacher's tokens, the student's tokens, teacher, teacher outputs\n" in errors
    assert re.search(r"^to compute: student \(at most 2 epochs of \d+ rows\), control \(", errors, re.MULTILINE)
    assert "results/run holds a run with another config: --seed 42 there, 7 asked" in lab.refused(f"{flags} --seed 7 --dry_run")
    assert "results/run would be written" in lab.run(f"{flags} --seed 7 --overwrite --dry_run")[2]
    assert snapshot(lab.folder) == before


def test_label_columns_that_were_found_are_named_with_what_was_left_and_why(lab: Lab) -> None:
    rows = table_rows(lab)
    path = lab.folder / "data" / "comments.csv"
    more = [["none", "id"], *([str(place % 2), f"c{place}"] for place in range(len(rows)))]
    write_rows(path, [[*row, *cells] for row, cells in zip(rows, more, strict=False)])
    errors = lab.run(f"{QUICK} --dry_run")[2]
    assert "label columns: the five known ones; left: none (holds only 0 and 1), id (is 'c0' on line 2)." in errors
    assert "warning: none also holds only 0 and 1, but no label is made of it" in errors
    assert "label columns" not in lab.run(f"{QUICK} --dry_run --label_columns {' '.join(LABELS)} none")[2]
    rows[0] = ["text", "bully", "sexual", "religious", "threat", "likes"]
    write_rows(path, [[*row, *cells] for row, cells in zip(rows, more, strict=False)])
    errors = lab.run(f"{QUICK} --dry_run")[2]
    assert re.search(r"share of positives: bully .*, likes .*, none ", errors)
    assert "label columns: every column that holds only 0, 1 and empty cells; left: id (is 'c0' on line 2)." in errors
    assert "warning" not in errors


# The run directory and running again


def test_last_line_on_stdout_is_the_run_and_its_headline(lab: Lab) -> None:
    _, output, _ = lab.run(f"{QUICK} --output_dir results/run")
    metrics = read_json(lab.folder / "results/run/metrics.json")
    student, teacher = (metrics[model]["test"]["at_0.5"]["f1_macro"] for model in ("student", "teacher"))
    assert output == f"results/run  student test f1_macro={student:.4f} (teacher {teacher:.4f})\n"


def test_same_command_in_two_directories_gives_the_same_bytes(lab: Lab) -> None:
    """Both with a warm cache and with none, for the method that uses everything."""
    flags = "--kd_method multi_level --layer_mapping 1:1,2:2"
    first = lab.done("first", flags)
    second = lab.done("second", flags)
    third = lab.done("third", f"{flags} --cache_dir other_cache")
    assert_same_results(first, second)
    assert_same_results(first, third)
    assert (first / "config.json").read_bytes() == (second / "config.json").read_bytes()


def test_finished_run_answers_at_once_without_torch_and_changes_nothing(lab: Lab) -> None:
    run_dir = lab.done("run")
    before = snapshot(run_dir)
    errors, loaded = run_and_list_modules(f"{QUICK} --output_dir results/run", 0)
    assert "results/run is finished already" in errors
    assert not {"torch", "transformers", "sklearn", "matplotlib"} & loaded
    assert snapshot(run_dir) == before
    assert lab.run(f"{QUICK} --output_dir results/run")[1].startswith("results/run  student test f1_macro=")


@pytest.mark.parametrize(("flags", "status"), [("--help", 0), ("--kd_alpha 2", 2)])
def test_help_and_a_bad_flag_load_none_of_the_large_libraries(flags: str, status: int) -> None:
    _, loaded = run_and_list_modules(flags, status)
    assert not {"numpy", "torch", "transformers", "sklearn", "matplotlib", "tqdm"} & loaded


def test_directory_of_another_config_is_refused_naming_the_flags_until_overwrite(lab: Lab) -> None:
    run_dir = lab.done("run", "--kd_alpha 0.3")
    first = (run_dir / "history.csv").read_bytes()
    line = lab.refused(f"{QUICK} --kd_alpha 0.8 --output_dir results/run")
    assert "kd_alpha" in line and "0.3" in line and "0.8" in line and "--overwrite" in line
    (run_dir / "notes.txt").write_text("mine", encoding="utf-8")
    lab.done("run", "--kd_alpha 0.8 --overwrite")
    assert (run_dir / "history.csv").read_bytes() != first
    assert read_json(run_dir / "config.json")["kd_alpha"] == 0.8
    assert (run_dir / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_finished_run_of_another_table_content_is_refused(lab: Lab) -> None:
    lab.done("run")
    rows = table_rows(lab)
    write_rows(lab.folder / "data" / "comments.csv", [*rows, ["একটি নতুন মন্তব্য", "0", "0", "0", "0", "1"]])
    assert "another content of data/comments.csv" in lab.refused(f"{QUICK} --output_dir results/run")


def test_config_of_a_run_repeats_it_and_flags_beside_it_win(lab: Lab) -> None:
    first = lab.done("first", "--kd_alpha 0.4 --label_alphas threat=0.9")
    status, _, errors = lab.run("--config results/first/config.json --allow_weak_teacher --output_dir results/second")
    assert status == 0, errors
    assert_same_results(first, lab.folder / "results/second")
    lab.run("--config results/first/config.json --allow_weak_teacher --kd_alpha 0.6 --output_dir results/third")
    config = read_json(lab.folder / "results/third/config.json")
    assert (config["kd_alpha"], config["label_alphas"]) == (0.6, ["threat=0.9"])


def test_weak_teacher_stops_with_status_3_and_the_way_on_that_is_named_works(lab: Lab) -> None:
    flags = QUICK.replace("--allow_weak_teacher", "--min_teacher_f1 1") + " --output_dir results/run"
    status, output, errors = lab.run(flags)
    assert (status, output) == (3, "")
    error = [line for line in errors.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert "--min_teacher_f1 1" in error[0] and "--allow_weak_teacher" in error[0]
    assert not (lab.folder / "results/run/metrics.json").exists()
    assert "macro-F1" in (lab.folder / "results/run/run.log").read_text(encoding="utf-8")
    assert lab.run(f"{flags} --allow_weak_teacher")[0] == 0


def rows_asked(lab: Lab) -> list[int]:
    """Return how many rows each entry of the teacher's logits in the lab's cache holds."""
    return sorted(len(np.load(path)) for path in (lab.folder / "own_cache" / "logits").glob("*/logits.npy"))


def test_weak_teacher_is_asked_about_the_validation_rows_alone(lab: Lab) -> None:
    flags = QUICK.replace("--allow_weak_teacher", "--min_teacher_f1 1") + " --output_dir results/run --cache_dir own_cache"
    assert lab.run(flags)[0] == 3
    whole = lab.done("whole")
    assert rows_asked(lab) == [read_json(whole / "metrics.json")["rows"]["validation"]]


def test_rows_left_out_of_training_are_not_asked_about(lab: Lab) -> None:
    run_dir = lab.done("run", "--data_fraction 0.3 --cache_dir own_cache")
    rows = read_json(run_dir / "metrics.json")["rows"]
    assert rows["train"] < 30 and rows_asked(lab) == sorted(rows.values())


def test_every_phase_says_how_far_it_is_on_stderr_and_in_the_log_file(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("research.logs.SECONDS_BETWEEN_LINES", 0.0)
    flags = f"{QUICK} --kd_method hidden --layer_mapping 2:2 --with_control --cache_dir other --output_dir results/run"
    status, _, errors = lab.run(flags)
    assert status == 0
    found = re.findall(r"^(.+): (\d+) % \(.+ of .+\), .+ left$", errors, re.MULTILINE)
    phases = {
        "tokenising", "teacher outputs", "teacher layers",
        *(f"{name} {phase}" for name in ("teacher", "student", "control") for phase in ("training", "validation")),
        *(f"{name} evaluation on {part}" for name in ("student", "control") for part in ("validation", "test")),
    }  # fmt: skip
    assert {name for name, _ in found} == phases
    assert {name for name, share in found if share == "100"} == phases
    in_file = (lab.folder / "results/run/run.log").read_text(encoding="utf-8")
    assert all(f"{name}: 100 % (" in in_file for name in phases)


# What the shell gives and takes


def in_process(folder: Path, flags: str, stdout: Any = subprocess.PIPE, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command in a process of its own."""
    command = [sys.executable, str(ROOT / "research_main.py"), *flags.split()]
    return subprocess.run(command, cwd=folder, env=os.environ | environment, stdout=stdout, stderr=subprocess.PIPE, check=False)


def test_stdout_that_is_full_closed_or_ascii_is_no_traceback(lab: Lab) -> None:
    flags = f"{QUICK} --pipeline student_only --output_dir results/ফল"
    assert lab.run(flags)[0] == 0
    for command in (flags, "--help"):
        with open("/dev/full", "wb") as full:
            ended = in_process(lab.folder, command, stdout=full)
        assert (ended.returncode, ended.stderr.splitlines()[-1:]) == (
            1, [b"error: stdout cannot be written: No space left on device"],
        )  # fmt: skip
        reader, writer = os.pipe()
        os.close(reader)
        ended = in_process(lab.folder, command, stdout=writer)
        os.close(writer)
        assert ended.returncode == 0 and b"Error" not in ended.stderr
    ended = in_process(lab.folder, flags, PYTHONIOENCODING="ascii")
    assert ended.returncode == 0
    assert ended.stdout.startswith(rb"results/\u09ab\u09b2  student test f1_macro=")


def test_labels_in_bangla_are_said_on_an_ascii_stderr(lab: Lab) -> None:
    rows = table_rows(lab)
    rows[0] = ["text", "গালি", "যৌন", "ধর্ম", "হুমকি", "স্প্যাম"]
    write_rows(lab.folder / "data" / "comments.csv", rows)
    ended = in_process(lab.folder, f"{QUICK} --pipeline student_only --output_dir results/run", PYTHONIOENCODING="ascii")
    assert ended.returncode == 0 and b"Traceback" not in ended.stderr and b"Logging error" not in ended.stderr


def test_deleted_working_directory_is_one_line(tmp_path: Path) -> None:
    script = f"mkdir gone && cd gone && rmdir ../gone && exec {sys.executable} {ROOT / 'research_main.py'} --dataset_path x.csv"
    ended = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: the working directory is not there any more; change to another one (cd) first\n"


# Pipelines and flags


def test_baseline_leaves_the_teacher_alone(lab: Lab) -> None:
    run_dir = lab.done("run", "--pipeline baseline")
    assert not {"student", "history.csv"} & {path.name for path in run_dir.iterdir()}
    metrics = read_json(run_dir / "metrics.json")
    assert metrics["headline"]["model"] == "teacher" and "student" not in metrics and "agreement" not in metrics
    assert len(columns_of(run_dir / "predictions.csv", "teacher_")) == metrics["rows"]["test"]
    assert (run_dir / "report.md").is_file()


def test_student_only_leaves_the_student_alone(lab: Lab) -> None:
    run_dir = lab.done("run", "--pipeline student_only --teacher_path nobody/nothing")
    assert "teacher" not in {path.name for path in run_dir.iterdir()}
    metrics = read_json(run_dir / "metrics.json")
    assert metrics["headline"]["model"] == "student" and "teacher" not in metrics
    first = read_rows(run_dir / "history.csv")[0]
    assert float(first["hard_loss"]) > 0 and first["soft_loss"] == ""


def test_saved_student_gives_the_predictions_of_the_run(lab: Lab) -> None:
    run_dir = lab.done("run")
    saved = load_classifier(str(run_dir / "student"), LABELS)
    rows = table_rows(lab)[1:]
    texts = [rows[int(row["index"])][0] for row in read_rows(run_dir / "predictions.csv")]
    encoded = saved.tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
    with torch.inference_mode():
        probs = saved.model.eval()(encoded["input_ids"], encoded["attention_mask"])["logits"].sigmoid()
    np.testing.assert_allclose(probs.numpy(), columns_of(run_dir / "predictions.csv", "student_"), atol=2e-6)
    truth = np.array([[float(cell) for cell in rows[int(row["index"])][1:]] for row in read_rows(run_dir / "predictions.csv")])
    np.testing.assert_array_equal(truth, columns_of(run_dir / "predictions.csv", "true_"))
    thresholds = read_json(run_dir / "metrics.json")["thresholds"]["student"]
    assert saved.settings["thresholds"] == pytest.approx(thresholds, abs=1e-6)


def test_teacher_of_a_run_is_a_teacher_checkpoint(lab: Lab) -> None:
    first = lab.done("first")
    second = lab.done("second", "--teacher_checkpoint results/first/teacher")
    np.testing.assert_array_equal(
        columns_of(first / "predictions.csv", "teacher_"), columns_of(second / "predictions.csv", "teacher_")
    )
    third = lab.done("third", "--pipeline baseline --teacher_checkpoint results/second/teacher")
    np.testing.assert_array_equal(
        columns_of(first / "predictions.csv", "teacher_"), columns_of(third / "predictions.csv", "teacher_")
    )


def test_teacher_that_was_trained_on_test_rows_is_refused_with_the_ways_out(lab: Lab) -> None:
    first = lab.done("first")
    flags = f"{QUICK} --teacher_checkpoint results/first/teacher --split_seed 7"
    error = lab.refused(f"{flags} --output_dir results/second")
    assert "results/first/teacher was trained on the texts of" in error and "of 8 test rows" in error
    assert "--split_seed" in error and "--drop_seen_rows" in error
    folds = f"{QUICK} --teacher_checkpoint results/first/teacher --num_folds 2 --output_dir results/folds"
    assert "was trained on the texts of" in lab.refused(folds)
    status, _, errors = lab.run(f"{flags} --drop_seen_rows --output_dir results/third --test_fraction 0.5 --val_fraction 0.3")
    assert status == 0, errors
    assert "they are left out" in errors
    table = table_rows(lab)[1:]
    tested = {table[int(row["index"])][0] for row in read_rows(lab.folder / "results/third/predictions.csv")}
    learned = {hash_text(unicodedata.normalize("NFC", text).encode()) for text in tested}
    assert tested and not learned & set(np.load(first / "teacher" / "training_texts.npy").tolist())


def test_student_as_teacher_knows_its_own_and_its_teachers_texts(lab: Lab) -> None:
    lab.done("first", "--data_fraction 0.5")
    taught = np.load(lab.folder / "results/first/student/training_texts.npy")
    assert set(np.load(lab.folder / "results/first/teacher/training_texts.npy").tolist()) <= set(taught.tolist())
    second = lab.done("second", "--teacher_checkpoint results/first/student --data_fraction 0.5")
    assert read_json(second / "metrics.json")["training"]["teacher"]["training_texts"] == "known"


def test_checkpoint_that_does_not_say_its_texts_is_warned_about_and_marked(lab: Lab) -> None:
    lab.done("first")
    (lab.folder / "results/first/teacher/training_texts.npy").unlink()
    status, _, errors = lab.run(f"{QUICK} --teacher_checkpoint results/first/teacher --split_seed 7 --output_dir results/second")
    assert status == 0, errors
    assert "results/first/teacher does not say which texts it was trained on" in errors
    assert "The teacher may have seen test rows." in (lab.folder / "results/second/report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x93NUMPY\x01\x00"])
def test_damaged_list_of_training_texts_is_one_line(lab: Lab, content: bytes) -> None:
    lab.done("first")
    (lab.folder / "results/first/teacher/training_texts.npy").write_bytes(content)
    assert "training_texts.npy" in lab.refused(f"{QUICK} --teacher_checkpoint results/first/teacher --output_dir results/second")


def test_sequence_classifier_with_labels_in_another_order_is_a_teacher_checkpoint(lab: Lab) -> None:
    folder = lab.folder / "finetuned"
    tokenizer = TOKENIZERS["wordpiece"](make_texts(80), folder, 200)
    config = encoder_config("bert", len(tokenizer), 2, 16, 2, tokenizer.pad_token_id)
    order = [*reversed(LABELS)]
    config.id2label = dict(enumerate(order))
    torch.manual_seed(4)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    run_dir = lab.done("run", "--teacher_checkpoint finetuned --kd_method attention")
    rows = table_rows(lab)[1:]
    texts = [rows[int(row["index"])][0] for row in read_rows(run_dir / "predictions.csv")]
    encoded = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        probs = model(**encoded).logits.sigmoid()[:, [order.index(label) for label in LABELS]]
    np.testing.assert_allclose(probs.numpy(), columns_of(run_dir / "predictions.csv", "teacher_"), atol=2e-6)


def test_folds_leave_a_complete_run_each_and_their_mean(lab: Lab) -> None:
    run_dir = lab.done("run", "--num_folds 2 --pipeline student_only")
    values = []
    for fold in ("fold_1", "fold_2"):
        metrics = read_json(run_dir / fold / "metrics.json")
        values.append(metrics["headline"]["value"])
    total = read_json(run_dir / "metrics.json")
    assert total["folds"] == 2
    assert total["headline"]["value"] == pytest.approx(np.mean(values), abs=1e-6)
    tested = [{row["index"] for row in read_rows(run_dir / fold / "predictions.csv")} for fold in ("fold_1", "fold_2")]
    assert not tested[0] & tested[1] and len(tested[0] | tested[1]) == 80
    assert lab.run(f"{QUICK} --num_folds 2 --pipeline student_only --output_dir results/run")[0] == 0


def test_data_fraction_thins_training_and_keeps_the_test_rows(lab: Lab) -> None:
    whole = lab.done("whole", "--pipeline student_only")
    half = lab.done("half", "--pipeline student_only --data_fraction 0.5")
    np.testing.assert_array_equal(columns_of(whole / "predictions.csv", "index"), columns_of(half / "predictions.csv", "index"))
    rows = [read_json(path / "metrics.json")["rows"]["train"] for path in (whole, half)]
    assert rows[1] == pytest.approx(rows[0] / 2, abs=1)


def test_unlabelled_texts_change_the_student_and_not_the_test_rows_nor_the_teacher(lab: Lab) -> None:
    write_rows(lab.folder / "more.csv", [["text"], *([text + " আরও"] for text in make_texts(30, seed=9))])
    without = lab.done("without")
    beside = lab.done("with", "--unlabelled_path more.csv")
    for prefix in ("index", "true_", "teacher_"):
        np.testing.assert_allclose(
            columns_of(without / "predictions.csv", prefix), columns_of(beside / "predictions.csv", prefix), atol=1e-6
        )
    assert (without / "history.csv").read_bytes() != (beside / "history.csv").read_bytes()
    assert read_json(beside / "environment.json")["dataset"]["parts"]["unlabelled"]["rows"] == 30


def test_tables_of_their_own_are_the_validation_and_test_parts(lab: Lab) -> None:
    make_table(lab.folder / "val.csv", rows=12, seed=5)
    make_table(lab.folder / "test.csv", rows=14, seed=6)
    run_dir = lab.done("run", "--pipeline student_only --val_path val.csv --test_path test.csv")
    assert read_json(run_dir / "metrics.json")["rows"] == {"train": 80, "validation": 12, "test": 14}
    truth = [[float(row[label]) for label in LABELS] for row in read_rows(lab.folder / "test.csv")]
    assert columns_of(run_dir / "predictions.csv", "true_").tolist() == truth


def layer_weights(run_dir: Path, part: str) -> dict[str, torch.Tensor]:
    model = load_classifier(str(run_dir / part), LABELS).model
    return {name: tensor for name, tensor in model.encoder.state_dict().items() if "layer" in name}  # type: ignore[union-attr]


def test_frozen_student_cut_from_the_teacher_holds_its_last_layer(lab: Lab) -> None:
    run_dir = lab.done("run", "--student_init teacher --student_layers 1 --freeze_student_encoder")
    teacher, student = layer_weights(run_dir, "teacher"), layer_weights(run_dir, "student")
    assert student
    for name, tensor in student.items():
        assert torch.equal(tensor, teacher[name.replace("layer.0.", "layer.1.")])


def test_frozen_student_keeps_its_start_and_a_random_one_is_another(lab: Lab) -> None:
    pretrained = transformers.AutoModel.from_pretrained("models/student").state_dict()
    frozen = layer_weights(lab.done("pretrained", "--freeze_student_encoder"), "student")
    random = layer_weights(lab.done("random", "--freeze_student_encoder --student_init random"), "student")
    name = next(name for name in frozen if name.endswith("lin1.weight"))
    assert all(torch.equal(tensor, pretrained[key]) for key, tensor in frozen.items())
    assert random[name].shape == frozen[name].shape and not torch.equal(random[name], frozen[name])


LEARNING_FLAGS = (
    "--label_alphas bully=1 sexual=0",
    "--no-class_weights",
    "--no-t_squared",
    "--pooling mean",
    "--gradient_accumulation 2",
    "--seed 7",
    "--kd_method hidden --hidden_objective cosine",
    "--kd_method attention --attention_objective kl",
    "--kd_method attention --attention_objective relation",
)


def test_each_flag_changes_what_the_student_learns(lab: Lab) -> None:
    losses = {}
    for place, flags in enumerate(("", *LEARNING_FLAGS)):
        losses[flags] = float(read_rows(lab.done(f"run_{place}", flags) / "history.csv")[-1]["total_loss"])
    assert all(np.isfinite(loss) for loss in losses.values())
    assert len(set(losses.values())) == len(losses), losses


def test_runs_that_differ_by_seed_share_teacher_and_test_rows(lab: Lab) -> None:
    first, second = lab.done("first", "--seed 1"), lab.done("second", "--seed 2")
    for prefix in ("index", "teacher_"):
        np.testing.assert_array_equal(
            columns_of(first / "predictions.csv", prefix), columns_of(second / "predictions.csv", prefix)
        )
    assert (columns_of(first / "predictions.csv", "student_") != columns_of(second / "predictions.csv", "student_")).any()
