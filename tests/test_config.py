"""Every problem in the flags is found before anything is loaded, and no input ends in a traceback."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.strategies import ARGUMENTS, FIELDS, JSON_VALUES

from research.components import LOSS_COMPONENTS
from research.errors import FlagErrors
from research.experiment.demo import DemoFiles
from research.flags import HelpAsked, fields_of_kind, fields_that_decide, setting
from research.models.mapping import parse_layer_mapping
from research_config import (
    DECIDED,
    KD_METHODS,
    MODEL_PARTS,
    PIPELINES,
    Arguments,
    ExperimentConfig,
    build_parser,
    check_config,
    parse_arguments,
    saved_settings,
    settings_that_decide,
    table_paths,
    unused_fields,
)
from research_data import SOURCES

ROOT = Path(__file__).resolve().parent.parent
FUZZ = settings(max_examples=150, deadline=None, database=None, derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder that holds data/comments.csv, so that the defaults are without a problem."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "data").mkdir()
    (folder / "data" / "comments.csv").write_text("text,bully\n")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def parse(line: str) -> ExperimentConfig:
    return parse_arguments(shlex.split(line)).config


def problems_of(*argv: str) -> tuple[str, ...]:
    with pytest.raises(FlagErrors) as caught:
        parse_arguments(argv)
    return caught.value.problems


def problem_of(line: str) -> str:
    (problem,) = problems_of(*shlex.split(line))
    return problem


def write_config(folder: Path, content: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


# Flags


def test_no_flags_give_the_defaults_and_none_is_explicit() -> None:
    assert parse_arguments([]) == Arguments(ExperimentConfig(), frozenset())


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_a_flag_with_its_meaning(name: str) -> None:
    (action,) = (action for action in build_parser()._actions if f"--{name}" in action.option_strings)
    assert action.help is not None
    assert len(action.help) > 10


def test_every_default_stands_in_the_help() -> None:
    text = " ".join(build_parser().format_help().split())
    for entry in dataclasses.fields(ExperimentConfig):
        if entry.default in (None, ()):
            continue
        shown = {True: "on", False: "off"}[entry.default] if isinstance(entry.default, bool) else entry.default
        assert f"(default: {shown})" in text[text.index(f"--{entry.name}") :], entry.name


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("--kd_alpha 0.3", "kd_alpha", 0.3),
        ("--kd_alpha=0.3", "kd_alpha", 0.3),
        ("--lr 1e-5", "lr", 1e-5),
        ("--seed 1 --seed 2", "seed", 2),
        ("--no-amp", "amp", False),
        ("--no-amp --amp", "amp", True),
        ("--label_columns bully threat", "label_columns", ("bully", "threat")),
        ("--label_columns bully", "label_columns", ("bully",)),
        ("--text_column 'the text'", "text_column", "the text"),
        ("--text_column=--odd", "text_column", "--odd"),
        ("--student_layers 3", "student_layers", 3),
        ("--device cuda:1", "device", "cuda:1"),
        ("--layer_mapping 2:1,4:2", "layer_mapping", "2:1,4:2"),
    ],
)
def test_flag_sets_its_field(line: str, name: str, value: object) -> None:
    arguments = parse_arguments(shlex.split(line))
    assert getattr(arguments.config, name) == value
    assert arguments.explicit == {name}


@pytest.mark.parametrize("method", KD_METHODS)
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_method_and_pipeline_of_the_tables_is_accepted(method: str, pipeline: str) -> None:
    config = parse(f"--kd_method {method} --pipeline {pipeline}")
    assert (config.method, config.pipeline) == (KD_METHODS[method], pipeline)


def test_all_problems_are_reported_at_once() -> None:
    line = "stray --kd_alhpa 1 --lr --amp=1 --seed x --pipeline all --kd_alpha 2 --label_alphas t --layer_mapping 2 --val_path no"
    assert [problem.partition(":")[0] for problem in problems_of(*shlex.split(line))] == [
        "'stray'", "--kd_alhpa", "--lr", "--amp/--no-amp", "--seed", "--pipeline", "--kd_alpha", "--label_alphas",
        "--layer_mapping", "--val_path",
    ]  # fmt: skip


def test_flag_that_cannot_be_read_is_not_blamed_for_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the default table is missing
    assert problem_of("--dataset_path ''").startswith("--dataset_path: must be a text")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("--kd_temperature 0", "--kd_temperature: must be greater than 0, got 0.0 (1 leaves logits unsoftened)"),
        ("--kd_temperature -1e-5", "--kd_temperature: must be greater than 0, got -1e-05 (1 leaves logits unsoftened)"),
        ("--kd_alpha 1.0000001", "--kd_alpha: must be at least 0 and at most 1, got 1.0000001"),
        ("--val_fraction 0", "--val_fraction: must be greater than 0 and at most 0.9, got 0.0"),
        ("--epochs 0", "--epochs: must be at least 1, got 0"),
        ("--epochs 1.5", "--epochs: must be a whole number, got '1.5'"),
        ("--epochs -1", "--epochs: must be at least 1, got -1"),
        ("--seed 2147483648", "--seed: must be at most 2147483647, got '2147483648'"),
        ("--lr nan", "--lr: must be a finite number, got 'nan'"),
        ("--lr inf", "--lr: must be a finite number, got 'inf'"),
        ("--lr 1e999", "--lr: must be a finite number, got '1e999'"),
        ("--lr", "--lr: expected one argument"),
        ("--label_columns", "--label_columns: expected at least one argument"),
        ("--label_columns a a", "--label_columns: a column is named twice in 'a a'"),
        ("--label_columns a --label_columns b", "--label_columns: is given twice; list its values after one --label_columns"),
        ("--text_column a --label_columns a b", "--text_column: 'a' is also one of --label_columns"),
        ("--text_column ''", "--text_column: must be a text that is not empty, got ''"),
        ("--amp=1", "--amp/--no-amp: ignored explicit argument '1'"),
        ("--seed 1 2", "--seed: has no place for '2'"),
        ("--kd_method both", "--kd_method: must be one of logit, hidden, attention, multi_level, got 'both'"),
        ("--kd_alhpa 0.5", "--kd_alhpa: unknown flag; did you mean --kd_alpha?"),
        ("--kd_alhpa=0.5", "--kd_alhpa: unknown flag; did you mean --kd_alpha?"),
        ("--kd_alph 0.5", "--kd_alph: unknown flag; did you mean --kd_alpha?"),
        ("--xyzzy -1 -2", "--xyzzy: unknown flag; --help lists them"),
        ("stray words", "'stray': a value without a flag"),
        ("--device 5", "--device: must be auto, cpu, cuda or cuda:N, got '5'"),
        ("--device cuda:", "--device: must be auto, cpu, cuda or cuda:N, got 'cuda:'"),
        ("--num_folds 3 --test_path data/comments.csv", "--num_folds: folds make their own test parts; drop --test_path"),
        ("--val_fraction 0.5 --test_fraction 0.5", "--val_fraction: must be under 1 together with --test_fraction, got 1"),
        ("--pipeline student_only --student_init teacher",
         "--student_init: teacher needs a pipeline with a teacher, got --pipeline student_only"),
    ],
)  # fmt: skip
def test_problem_says_what_was_found_where_and_what_is_wanted(line: str, problem: str) -> None:
    assert problem_of(line) == problem


@pytest.mark.parametrize("entry", ["threat", "=0.5", "threat=", "threat=x", "threat=1.5", "threat=-0.1", "threat=nan"])
def test_label_alpha_that_cannot_be_used_is_named(entry: str) -> None:
    assert problem_of(f"--label_alphas bully=0.5 '{entry}'").startswith(f"--label_alphas: '{entry}' is not LABEL=ALPHA")


def test_label_alpha_given_twice_is_a_problem() -> None:
    assert problem_of("--label_alphas threat=0.9 bully=1 threat=0.5") == "--label_alphas: 'threat' is given twice"


def test_label_alphas_map_names_that_hold_an_equals_sign() -> None:
    assert parse("--label_alphas threat=0.9 a=b=0.5").label_alpha_map == {"threat": 0.9, "a=b": 0.5}


@pytest.mark.parametrize("mapping", ["2", "2:", ":1", "2:1,", "2:1,x", "2:-1", "2:1:3", "middle", "2:1,2:1", "9" * 5000 + ":1"])
def test_layer_mapping_that_cannot_be_read_is_a_problem(mapping: str) -> None:
    problem = problem_of(f"--layer_mapping={mapping}")
    assert problem.startswith("--layer_mapping: ")
    assert len(problem) < 300


def test_layer_mapping_is_read_as_pairs_or_as_a_strategy() -> None:
    assert parse_layer_mapping("2:1, 12 : 6") == ((2, 1), (12, 6))
    assert parse_layer_mapping("uniform") is None


def test_problem_of_a_long_value_stays_one_short_line() -> None:
    (problem,) = problems_of("--kd_method", "a\nb" * 5000)
    assert "\n" not in problem
    assert len(problem) < 300


# Places


def test_missing_table_and_folder_as_table_are_told_apart() -> None:
    assert problem_of("--dataset_path absent.csv").startswith("--dataset_path: no such file: 'absent.csv'")
    assert problem_of("--val_path data").startswith("--val_path: is a folder without .parquet files: 'data'")


def test_missing_model_folder_is_a_problem_but_a_hub_name_is_not() -> None:
    assert problem_of("--teacher_path ./absent") == "--teacher_path: no such folder: './absent'"
    assert parse("--teacher_path org/absent").teacher_path == "org/absent"


def test_demo_builds_each_table_and_model_that_a_run_cannot_do_without() -> None:
    entries = [entry for entry in dataclasses.fields(ExperimentConfig) if entry.metadata["kind"] in ("table", "model")]
    assert {entry.name for entry in entries if entry.default is not None} == {
        entry.name for entry in dataclasses.fields(DemoFiles)
    }


def test_demo_needs_none_of_the_files_it_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse("--demo --teacher_path ./gone --student_path ./gone").demo


@pytest.mark.parametrize("flag", ["--output_dir", "--cache_dir"])
def test_folder_below_a_file_cannot_be_written(flag: str) -> None:
    problem = problem_of(f"{flag} data/comments.csv/deep/run")
    assert problem == f"{flag}: '{Path.cwd() / 'data/comments.csv'}' is a file, not a folder. Choose another folder."
    assert (
        problem_of(f"{flag} data/comments.csv") == f"{flag}: 'data/comments.csv' is a file, not a folder. Choose another folder."
    )


def test_folder_the_system_refuses_is_a_problem() -> None:
    assert "File name too long" in problem_of(f"--output_dir {'x' * 300}")
    assert "no such file" in problem_of(f"--dataset_path {'x' * 300}")


def test_folder_without_write_permission_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_arguments: False)  # which the superuser never sees
    assert [problem.partition(":")[0] for problem in problems_of("--output_dir", "run")] == ["--output_dir", "--cache_dir"]


def test_checking_creates_nothing(tmp_path: Path) -> None:
    parse(f"--output_dir {tmp_path}/a/b --cache_dir {tmp_path}/c")
    assert list(tmp_path.iterdir()) == []


# --config


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--lr 1.23456789012e-07 --kd_alpha 0.1 --no-amp --no-t_squared",
        "--label_columns 'এক' 'two words' --text_column text --label_alphas a=0.5 b=1e-3 --student_layers 2 --num_threads 3",
        "--pipeline baseline --num_folds 5 --demo --layer_mapping 2:1 --device cuda:0 --unlabelled_path data/comments.csv",
    ],
)
def test_saved_settings_given_back_as_config_make_the_same_run(tmp_path: Path, line: str) -> None:
    config = parse(line)
    again = parse(f"--config {write_config(tmp_path, saved_settings(config))}")
    assert again == config
    assert again.run_dir == config.run_dir


def test_explicit_flags_win_over_the_config_file_on_either_side_of_it(tmp_path: Path) -> None:
    path = write_config(tmp_path, {"seed": 1, "epochs": 2, "amp": False, "label_columns": ["a", "b"]})
    config = parse(f"--seed 7 --config {path} --amp --label_columns c")
    assert (config.seed, config.epochs, config.amp, config.label_columns) == (7, 2, True, ("c",))


def test_fields_of_the_config_file_count_as_explicit(tmp_path: Path) -> None:
    path = write_config(tmp_path, {"epochs": 2})
    assert parse_arguments(["--config", path, "--seed", "7"]).explicit == {"epochs", "seed"}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"epochs": "two"}, "--epochs: must be a whole number, got 'two', in "),
        ({"epochs": True}, "--epochs: must be a whole number, got true, in "),
        ({"epochs": 1.5}, "--epochs: must be a whole number, got 1.5, in "),
        ({"epochs": None}, "--epochs: must be a whole number, got null, in "),
        ({"epochs": math.nan}, "--epochs: must be a whole number, got nan, in "),
        ({"lr": math.inf}, "--lr: must be a finite number, got inf, in "),
        ({"lr": 10**400}, "--lr: must be a number, got 1000"),
        ({"amp": 1}, "--amp: must be true or false, got 1, in "),
        ({"pipeline": ["kd_only"]}, "--pipeline: must be a text that is not empty, got a list, in "),
        ({"dataset_path": {"a": 1}}, "--dataset_path: must be a text that is not empty, got an object, in "),
        ({"dataset_path": "a\0b"}, "--dataset_path: must be a text that is not empty, got 'a\\x00b', in "),
        ({"text_column": "\ud800"}, "--text_column: must be a text that is not empty, got '\\ud800', in "),
        ({"label_columns": "bully"}, "--label_columns: must be a list of names, got 'bully', in "),
        ({"label_columns": ["bully", 1]}, "--label_columns: must be a list of names, got a list, in "),
        ({"label_columns": []}, "--label_columns: names no column"),
        ({"learning_rate": 1}, "--config: "),
        ([], "--config: "),
        ("text", "--config: "),
        (None, "--config: "),
    ],
)
def test_config_file_of_the_wrong_kind_is_one_problem(tmp_path: Path, content: Any, problem: str) -> None:
    assert problem_of(f"--config {write_config(tmp_path, content)}").startswith(problem)


def test_unknown_key_of_the_config_file_is_named(tmp_path: Path) -> None:
    path = write_config(tmp_path, {"learning_rate": 1, "seed": 1})
    assert problem_of(f"--config {path}") == f"--config: {path} names an unknown flag 'learning_rate'"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}", b"[" * 400 + b"]" * 400],
    ids=["empty", "cut off", "not utf-8", "endless nesting", "endless number", "nesting"],
)
def test_config_file_that_is_no_object_is_one_short_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    problem = problem_of(f"--config {tmp_path / 'config.json'}")
    assert problem.startswith(f"--config: {tmp_path}")
    assert "\n" not in problem
    assert len(problem) < 400


@pytest.mark.parametrize("depth", range(900, 1000, 7))
def test_nested_value_at_the_edge_of_what_can_be_parsed_is_a_problem(tmp_path: Path, depth: int) -> None:
    (tmp_path / "config.json").write_text('{"seed": ' + "[" * depth + "]" * depth + "}")
    assert problem_of(f"--config {tmp_path / 'config.json'}").startswith("--")


def test_config_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"seed": 3}')
    assert parse(f"--config {tmp_path / 'config.json'}").seed == 3


def test_config_that_is_missing_or_a_folder_is_a_problem(tmp_path: Path) -> None:
    assert problem_of(f"--config {tmp_path}/absent.json") == f"--config: no such file: {tmp_path}/absent.json"
    assert problem_of(f"--config {tmp_path}") == f"--config: {tmp_path} cannot be read: Is a directory"


# Identity


def test_places_do_not_change_the_fingerprint_and_every_other_field_does() -> None:
    config = ExperimentConfig()
    others: dict[type, Any] = {bool: None, int: 7, float: 0.77, str: "another", tuple: ("another",), type(None): "another"}
    for name in FIELDS:
        default = getattr(config, name)
        change: dict[str, Any] = {name: not default if isinstance(default, bool) else others[type(default)]}
        changed = dataclasses.replace(config, **change)
        assert (changed.fingerprint == config.fingerprint) is (name in fields_that_decide(config, "place")), name


@pytest.mark.parametrize("entry", dataclasses.fields(ExperimentConfig), ids=lambda entry: entry.name)
def test_every_field_says_what_it_decides(entry: dataclasses.Field[Any]) -> None:
    decides = entry.metadata["decides"]
    assert decides and decides <= DECIDED.keys()
    assert decides == {"place"} or "place" not in decides  # which is to decide nothing
    assert (entry.metadata["kind"] == "table") is (entry.metadata["rows"] is not None)


def extend(decides: str, **options: Any) -> Any:
    """Return a config class with one more field, as somebody would add a flag."""
    new = setting("as ever", "training", "a flag that a test adds", decides=decides, **options)
    fields = [("added", str | None, new)]
    return dataclasses.make_dataclass("Extended", fields, bases=(ExperimentConfig,), frozen=True)


@pytest.mark.parametrize("decides", DECIDED)
def test_added_field_reaches_what_it_decides_and_nothing_else(decides: str) -> None:
    plain, changed = extend(decides)(), extend(decides)(added="changed")
    found = {what for what in DECIDED if settings_that_decide(plain, what) != settings_that_decide(changed, what)}
    assert found == {decides}
    assert (saved_settings(plain) == saved_settings(changed)) is (decides == "place")
    assert (plain.fingerprint == changed.fingerprint) is (decides == "place")
    for name, pipeline in PIPELINES.items():
        unread = decides in MODEL_PARTS - pipeline.trains
        assert ("added" in unused_fields(name, type(plain))) is unread


def test_added_table_and_model_are_known_as_such(tmp_path: Path) -> None:
    table = extend("data", kind="table", rows="more")(added=str(tmp_path / "more.csv"))
    assert table_paths(table)["more"] == tmp_path / "more.csv"
    assert check_config(table) == [f"--added: no such file: '{tmp_path}/more.csv'. Give a .csv, .tsv or .jsonl table."]
    model = extend("teacher", kind="model")(added="./absent")
    assert check_config(model) == ["--added: no such folder: './absent'"]
    assert "added" not in settings_that_decide(model, "teacher")  # its content enters the key, not its name
    folder = extend("place", kind="folder")(added="data/comments.csv")
    assert [line.partition(":")[0] for line in check_config(folder)] == ["--added"]


def test_tables_are_called_as_the_loaded_rows_are() -> None:
    names = {entry.metadata["rows"] for entry in dataclasses.fields(ExperimentConfig)} - {None}
    assert names == {*SOURCES, "teacher_probs"}
    assert list(table_paths(ExperimentConfig())) == ["main"]


def test_what_is_found_from_the_data_is_columns() -> None:
    assert fields_of_kind(ExperimentConfig, "column") == ("text_column", "label_columns")


def test_pipelines_read_the_flags_of_what_they_train() -> None:
    assert {"teacher_path", "kd_alpha", "unlabelled_path", "with_control"} <= unused_fields("student_only")
    assert not {"class_weights", "pooling", "split_seed", "epochs", "pipeline"} & unused_fields("student_only")
    assert {"student_path", "epochs", "seed", "kd_alpha"} <= unused_fields("baseline")
    assert not {"class_weights", "pooling", "teacher_path", "lr", "pipeline"} & unused_fields("baseline")
    assert {"max_length", "epochs", "seed", "teacher_path", "kd_alpha"} <= unused_fields("tfidf")
    assert not {"class_weights", "select_by", "text_normalization", "split_seed", "num_folds"} & unused_fields("tfidf")
    assert unused_fields("kd_only") == {"with_control", "control_labels"}
    assert unused_fields("of another version") == frozenset()


def test_methods_name_components_that_there_are() -> None:
    components = {component.name: component for component in LOSS_COMPONENTS}
    for method in KD_METHODS.values():
        assert {components[name].weight_flag for name in method.components} <= set(FIELDS)
    assert [(method.hidden, method.attention) for method in KD_METHODS.values()] == [
        (False, False), (True, False), (False, True), (True, True),
    ]  # fmt: skip


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ExperimentConfig().seed = 1  # type: ignore[misc]


# The process


def test_importing_the_config_loads_the_standard_library_only() -> None:
    code = "import sys, research_config; print(*{name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names)"
    output = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(output.split()) <= {"research_config", "research"} | {name for name in output.split() if name.startswith("__")}


def test_help_names_every_flag() -> None:
    with pytest.raises(HelpAsked) as caught:
        parse_arguments(["--seed", "x", "--help"])
    text = str(caught.value)
    assert [name for name in FIELDS if f"--{name}" not in text] == []


@pytest.mark.parametrize("name", ["output_dir", "cache_dir", "teacher_path", "teacher_checkpoint", "dataset_path", "val_path"])
def test_tilde_that_the_shell_left_is_the_home(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "a.csv").write_text("text,spam\n", encoding="utf-8")
    table = {} if name == "dataset_path" else {"dataset_path": "~/z/a.csv"}
    values = table | {name: "~/z/a.csv" if name in ("dataset_path", "val_path") else "~/z"}
    config = parse_arguments([f"--{flag}={value}" for flag, value in values.items()]).config
    assert getattr(config, name) == values[name].replace("~", str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (
            "--augment 2 --epochs 2",
            "--augment: the text itself and 2 views take an epoch each, so --epochs must be at least 3, got 2",
        ),
        ("--augment -1", "--augment: must be at least 0 and at most 1000, got -1"),
        (
            "--augment_kinds noise typos",
            "--augment_kinds: must be of noise, dropout, swap, fill, separated by spaces, got 'typos'",
        ),
        (
            "--augment_kinds noise,swap",
            "--augment_kinds: must be of noise, dropout, swap, fill, separated by spaces, got 'noise,swap'",
        ),
        ("--augment_kinds noise noise", "--augment_kinds: names a kind twice: noise noise"),
        ("--augment 2 --kd_alpha 0", "--augment: the teacher's scores are all that is known of a view, and --kd_alpha is 0"),
    ],
)
def test_views_that_cannot_be_or_teach_nothing_are_refused(flags: str, problem: str) -> None:
    assert problem_of(f"--demo {flags}").startswith(problem)


def test_views_are_in_no_key_while_they_are_off_and_never_in_the_teachers() -> None:
    plain, augmented = ExperimentConfig(), ExperimentConfig(augment=2, augment_kinds=("noise",))
    assert not {"augment", "augment_kinds"} & set(settings_that_decide(plain, "student"))
    assert settings_that_decide(augmented, "student")["augment"] == 2
    assert settings_that_decide(augmented, "teacher") == settings_that_decide(plain, "teacher")
    assert {"augment", "augment_kinds"} <= unused_fields("baseline")
    for flags in ("--pipeline student_only --kd_alpha 0 --augment 1", "--augment 1 --kd_alpha 0 --kd_method hidden"):
        assert parse_arguments(["--demo", *flags.split()]).config.augment == 1


def test_unlabelled_path_takes_several_tables_and_reads_the_text_of_older_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("main", "a", "b"):
        (tmp_path / f"{name}.csv").write_text("text,spam\n", encoding="utf-8")
    flags = ["--dataset_path", "main.csv", "--unlabelled_path"]
    one, two = (parse_arguments([*flags, *paths]).config for paths in (["a.csv"], ["a.csv", "b.csv"]))
    assert saved_settings(one)["unlabelled_path"] == "a.csv"
    assert saved_settings(two)["unlabelled_path"] == ["a.csv", "b.csv"]
    for config in (one, two):
        path = write_config(tmp_path, saved_settings(config))
        assert parse_arguments(["--config", str(path)]).config == config
    assert list(table_paths(two)) == ["main", "unlabelled", "unlabelled_2"]
    for paths, problem in ((["a.csv", "a.csv"], "'a.csv' is given twice"), (["a.csv", "c.csv"], "no such file: 'c.csv'")):
        with pytest.raises(FlagErrors, match=problem):
            parse_arguments([*flags, *paths])
    with pytest.raises(FlagErrors, match="--unlabelled_path: names no table; leave it out"):
        parse_arguments([*flags[:2], "--config", write_config(tmp_path, {"unlabelled_path": []})])


@pytest.mark.parametrize("name", ["output_dir", "cache_dir", "student_path"])
def test_path_that_no_model_can_be_written_to_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,spam\n", encoding="utf-8")
    with pytest.raises(FlagErrors) as caught:
        parse_arguments(["--dataset_path", str(tmp_path / "a.csv"), f"--{name}", os.fsdecode(b"\xff")])
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(f"--{name}: '\\udcff' holds bytes that are no UTF-8")


# Fuzz


def outcome_of(argv: list[str]) -> ExperimentConfig | FlagErrors | HelpAsked:
    try:
        return parse_arguments(argv).config
    except (FlagErrors, HelpAsked) as error:
        return error


def check_outcome(argv: list[str]) -> None:
    """Assert that the arguments give a config that can be saved, the help, or problems of one line each."""
    outcome = outcome_of(argv)
    if isinstance(outcome, FlagErrors):
        assert outcome.problems
        assert all(len(problem.splitlines()) == 1 for problem in outcome.problems), outcome.problems
    elif not isinstance(outcome, HelpAsked):
        assert json.loads(json.dumps(saved_settings(outcome), allow_nan=False)) == saved_settings(outcome)


@FUZZ
@given(st.lists(ARGUMENTS, max_size=8))
@example(["--config", "data/comments.csv"])
@example(["--output_dir", "\0"])
@example(["--dataset_path", "\ud800"])
@example(["--config", "a\nb"])
@example(["--xyz\nabc"])
def test_no_arguments_end_in_a_traceback(argv: list[str]) -> None:
    check_outcome(argv)


@FUZZ
@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=6), JSON_VALUES, max_size=6))
def test_no_config_object_ends_in_a_traceback(content: dict[str, Any]) -> None:
    Path("fuzz.json").write_text(json.dumps(content), encoding="utf-8")
    check_outcome(["--config", "fuzz.json"])


@FUZZ
@given(st.binary(max_size=40))
@example(b'{"\\n": 1}')
@example(b"\xef\xbb\xbf")
def test_no_config_bytes_end_in_a_traceback(content: bytes) -> None:
    Path("fuzz.json").write_bytes(content)
    check_outcome(["--config", "fuzz.json"])
