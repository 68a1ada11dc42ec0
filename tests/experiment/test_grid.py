"""The grid of a sweep is what its flags say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from support.builders import make_table

from research.errors import FlagErrors
from research.experiment.grid import command_line, expand_sweep, name_run, parse_sweep
from research_config import ExperimentConfig, parse_arguments


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_table(tmp_path / "data" / "comments.csv", rows=60)


def sweep_config(*entries: str, **changes: Any) -> ExperimentConfig:
    return dataclasses.replace(ExperimentConfig(output_dir="out", sweep=entries), **changes)


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
