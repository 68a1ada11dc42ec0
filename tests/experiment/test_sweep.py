"""A sweep is the grid its flags say, and each of its runs is the run that one command would make."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.builders import build_model_folder, make_table, make_texts

import research_main
from research.errors import FlagErrors
from research.experiment.sweep import command_line, expand_sweep, name_run, parse_sweep, threads_per_run
from research_config import ExperimentConfig, parse_arguments

QUICK = (
    "--teacher_path teacher --student_path student --lr 1e-3 --teacher_epochs 1 --epochs 1 --batch 16 --max_length 32 "
    "--student_hidden_size 8 --allow_weak_teacher --num_threads 1"
)
DETERMINISTIC_FILES = ("config.json", "metrics.json", "history.csv", "predictions.csv")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_table(tmp_path / "data" / "comments.csv", rows=60)


def sweep_config(*entries: str, **changes: Any) -> ExperimentConfig:
    return dataclasses.replace(ExperimentConfig(output_dir="out", sweep=entries), **changes)


# The grid


def test_grid_is_the_product_of_the_values_in_order(table: Path) -> None:
    runs = expand_sweep(sweep_config("kd_alpha=0.3,0.5", "kd_temperature=2,4", seed=7))
    assert [(run.kd_alpha, run.kd_temperature) for run in runs] == [(0.3, 2.0), (0.3, 4.0), (0.5, 2.0), (0.5, 4.0)]
    assert {run.seed for run in runs} == {7}
    assert all(run.sweep == () for run in runs)
    assert len({run.run_dir for run in runs}) == 4
    assert runs[0].run_dir == Path("out/kd_alpha_0.3_kd_temperature_2")


def test_values_get_the_type_of_their_flag() -> None:
    swept = parse_sweep(
        ["amp=on,off", "student_layers=2,3", "kd_method=logit,hidden", "layer_mapping=2:1,4:2;4:1", "label_columns=a b;a"]
    )
    assert swept == {
        "amp": (True, False),
        "student_layers": (2, 3),
        "kd_method": ("logit", "hidden"),
        "layer_mapping": ("2:1,4:2", "4:1"),
        "label_columns": (("a", "b"), ("a",)),
    }


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("kd_alpha", "'kd_alpha' is not FLAG=V1,V2"),
        ("kd_alfa=0.1", "'kd_alfa=0.1' is not FLAG=V1,V2"),
        ("output_dir=a,b", "'output_dir=a,b' cannot be swept: the runs of a sweep share one --output_dir"),
        ("demo=on,off", "'demo=on,off' cannot be swept"),
        ("jobs=1,2", "'jobs=1,2' cannot be swept"),
        ("kd_alpha=0.1,x", "kd_alpha must be a number, got 'x'"),
        ("amp=yes", "amp must be on or off, got 'yes'"),
        ("seed=1.5", "seed must be a whole number, got '1.5'"),
    ],
)
def test_problem_in_an_entry_names_it(entry: str, problem: str) -> None:
    with pytest.raises(FlagErrors) as caught:
        parse_sweep([entry])
    assert [error.removeprefix("--sweep: ").startswith(problem) for error in caught.value.problems] == [True]


def test_every_problem_of_a_grid_is_reported_at_once_and_only_once(table: Path) -> None:
    with pytest.raises(FlagErrors) as caught:
        parse_sweep(["kd_alpha=x", "nothing=1", "seed=1", "seed=2"])
    assert len(caught.value.problems) == 3
    with pytest.raises(FlagErrors) as caught:
        expand_sweep(sweep_config("kd_alpha=0.5,1.5", "kd_temperature=0,1,2"))
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["--kd_temperature", "--kd_alpha"]


def test_names_are_single_folders_and_differ() -> None:
    names = [
        name_run({"kd_alpha": 0.3}),
        name_run({"kd_alpha": 0.30001}),
        name_run({"kd_alpha": 0.12345678}),
        name_run({"lr": 2e-5, "amp": True}),
        name_run({"student_path": "google/mobilebert-uncased"}),
        name_run({"layer_mapping": "2:1,4:2"}),
        name_run({"label_alphas": ("threat=0.9", "bully=0.5")}),
        name_run({"label_alphas": ()}),
        name_run({"kd_temperature": 1e6}),
        name_run({"kd_temperature": 1e-6}),
    ]
    assert names[:4] == ["kd_alpha_0.3", "kd_alpha_0.30001", "kd_alpha_0.12345678", "lr_2e-05_amp_on"]
    assert names[6:8] == ["label_alphas_threat-0.9-bully-0.5", "label_alphas_none"]
    assert len(set(names)) == len(names)
    assert all("/" not in name and name not in (".", "..") for name in names)


@pytest.mark.parametrize(
    ("entry", "values"),
    [("kd_alpha=0.12345678,0.12345679", 2), ("student_path=a/b,a-b", 2), ("seed=1,1", 1), ("kd_alpha=0.5,0.50", 1)],
)
def test_runs_that_differ_never_share_a_folder_and_equal_ones_are_one(entry: str, values: int, table: Path) -> None:
    runs = expand_sweep(sweep_config(entry))
    assert len(runs) == values
    assert len({run.run_dir for run in runs}) == values


def test_command_line_of_a_run_gives_its_config_back(table: Path) -> None:
    config = dataclasses.replace(
        sweep_config("label_alphas=spam=0.9 bully=0.1", "kd_alpha=0.25"), amp=False, text_column="--odd", overwrite=True
    )
    (run,) = expand_sweep(config)
    assert parse_arguments(command_line(run)).config == dataclasses.replace(run, overwrite=False)


def test_threads_are_shared_out_among_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    assert threads_per_run(ExperimentConfig(jobs=3)) == 2
    assert threads_per_run(ExperimentConfig(jobs=20)) == 1
    assert threads_per_run(ExperimentConfig(jobs=1)) is None
    assert threads_per_run(ExperimentConfig(jobs=3, num_threads=5)) == 5


# Runs


def test_each_run_is_that_of_its_own_command_and_a_second_sweep_does_nothing(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = make_texts(60)
    build_model_folder("electra", "wordpiece", tmp_path / "teacher", texts, layers=2, width=24, seed=1)
    build_model_folder("distilbert", "unigram", tmp_path / "student", texts, layers=2, width=16, seed=2)
    sweep = [*QUICK.split(), "--sweep", "kd_alpha=0.3,0.9", "--jobs", "2", "--output_dir", "out"]
    assert research_main.main(sweep) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["out/kd_alpha_0.3", "out/kd_alpha_0.9"]
    assert lines[-1].startswith("out  2 of 2 runs, best: out/kd_alpha_0.")

    for alpha in ("0.3", "0.9"):
        single = [*QUICK.split(), "--kd_alpha", alpha, "--output_dir", f"single_{alpha}", "--cache_dir", "cache_2"]
        assert research_main.main(single) == 0
        for name in DETERMINISTIC_FILES:
            left, right = tmp_path / f"out/kd_alpha_{alpha}" / name, tmp_path / f"single_{alpha}" / name
            assert left.read_bytes() == right.read_bytes(), name
    capsys.readouterr()

    # The same sweep with one more value, whose run cannot work: it is named, the others are found finished.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*")}
    (tmp_path / "out" / "kd_alpha_0.5").mkdir()
    (tmp_path / "out" / "kd_alpha_0.5" / "stranger.txt").write_text("in the way", encoding="utf-8")
    sweep[sweep.index("kd_alpha=0.3,0.9")] = "kd_alpha=0.3,0.5,0.9"
    monkeypatch.setattr(
        "research.experiment.sweep.ProcessPoolExecutor", lambda jobs, mp_context, **options: ThreadPoolExecutor(1, **options)
    )
    assert research_main.main(sweep) == 2
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()[:-1]] == ["out/kd_alpha_0.3", "out/kd_alpha_0.9"]
    assert "2 of 3 runs" in captured.out.splitlines()[-1]
    assert "out/kd_alpha_0.5" in captured.err
    assert {path: path.stat().st_mtime_ns for path in before} == before
