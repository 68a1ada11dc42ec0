import csv
import io
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from support.comparison_runs import LABELS, make_truth, write_run

import research_compare
from research.compare import figures as plots
from research.compare.scores import compare_runs
from research.evaluation.bootstrap import COMPARED_METRICS
from research.flags import format_value

EFFICIENCY = {
    "teacher": {"parameters_total": 110_000_000, "latency_ms_batch1": 40.0},
    "student": {"parameters_total": 30_000_000, "latency_ms_batch1": 9.0},
}


@pytest.fixture
def run_compare(capsys):
    """Call the command line; returns exit status, stdout and stderr."""

    def call(*arguments):
        status = research_compare.main(["--resamples", "200", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def read_table(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_columns_are_exactly_the_flags_that_differ(tmp_path):
    runs = [write_run(tmp_path / f"a{a}", kd_alpha=a, kd_method="hidden", seed=7, t_squared=a > 0.4) for a in (0.3, 0.5)]
    assert compare_runs(runs, resamples=200).flags == ("kd_alpha", "t_squared")


def test_flags_that_a_control_never_reads_make_no_column(tmp_path):
    control = write_run(tmp_path / "control", pipeline="student_only", kd_alpha=0.1, teacher_epochs=3)
    run = write_run(tmp_path / "kd", kd_alpha=0.7)
    assert compare_runs([control, run], resamples=200).flags == ("pipeline",)


def test_a_row_per_run_with_the_interval_around_its_score(tmp_path, run_compare):
    runs = [write_run(tmp_path / name, skill, kd_alpha=skill / 10) for name, skill in (("weak", 1.0), ("strong", 4.0))]
    status, out, err = run_compare(*runs, "--format", "csv")
    weak, strong = read_table(out)
    assert status == 0
    assert [weak["run"], strong["run"]] == ["weak", "strong"]
    for row in (weak, strong):
        assert float(row["f1_macro_low"]) < float(row["f1_macro"]) < float(row["f1_macro_high"])
    assert float(strong["difference"]) == pytest.approx(float(strong["f1_macro"]) - float(weak["f1_macro"]), abs=1e-5)
    assert float(strong["difference_low"]) > 0
    assert float(strong["p_holm"]) < 0.01
    assert "baseline: weak" in err
    assert "first row" in err


def test_identical_predictions_differ_by_zero_with_p_one(tmp_path):
    runs = [write_run(tmp_path / f"a{a}", kd_alpha=a) for a in (0.3, 0.5)]
    difference = compare_runs(runs, resamples=200).results[1].difference
    assert difference is not None
    assert (difference.value, difference.low, difference.high, difference.p_value) == (0, 0, 0, 1)


@pytest.mark.parametrize("metric", COMPARED_METRICS)
def test_every_metric_is_compared(tmp_path, metric):
    runs = [write_run(tmp_path / f"s{skill}", skill, lr=skill) for skill in (1.0, 5.0)]
    difference = compare_runs(runs, metric=metric, resamples=200).results[1].difference
    assert difference is not None
    assert difference.p_value < 0.01
    assert (difference.value < 0) == (metric == "hamming_loss")


def test_tuned_thresholds_come_from_metrics_json(tmp_path):
    run = write_run(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["thresholds"]["student"] = dict.fromkeys(LABELS, 1.1)
    (run / "metrics.json").write_text(json.dumps(metrics))
    (result,) = compare_runs([run], metric="f1_macro_tuned", resamples=200).results
    assert result.estimate.value == 0.0


def test_lacking_thresholds_are_named(tmp_path, run_compare):
    run = write_run(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    del metrics["thresholds"]
    (run / "metrics.json").write_text(json.dumps(metrics))
    status, _, err = run_compare(run, "--metric", "f1_macro_tuned")
    assert status == 2
    assert "no tuned thresholds of the student" in err


@pytest.mark.parametrize("change", ["hash", "index", "labels", "columns"])
def test_runs_with_other_test_parts_are_refused_by_name(tmp_path, run_compare, change):
    write_run(tmp_path / "first")
    write_run(tmp_path / "same", kd_alpha=0.5)
    truth = make_truth()
    others: dict[str, dict[str, Any]] = {
        "hash": {"test_sha256": "b" * 64},
        "index": {"index": np.arange(len(truth)) + 1},
        "labels": {"truth": 1 - truth},
        "columns": {},
    }
    odd = write_run(tmp_path / "odd", kd_alpha=0.9, **others[change])
    if change == "columns":
        predictions = odd / "predictions.csv"
        predictions.write_text(predictions.read_text().replace("spam", "religious"))
    status, out, err = run_compare(tmp_path / "first", tmp_path / "same", odd)
    assert status == 2
    assert out == ""
    assert str(odd) in err
    assert str(tmp_path / "same") not in err
    assert "Traceback" not in err
    assert err.count("\n") == 1


def test_unfinished_runs_are_listed_apart(tmp_path, run_compare):
    write_run(tmp_path / "done")
    begun = write_run(tmp_path / "begun", kd_alpha=0.5, finished=False)
    status, out, err = run_compare(tmp_path, "--format", "csv")
    assert status == 0
    assert [row["run"] for row in read_table(out)] == ["done"]
    assert f"unfinished, left out: {begun}" in err
    status, out, _ = run_compare(tmp_path, "--format", "json")
    assert json.loads(out)["unfinished"] == [str(begun)]


def test_only_unfinished_runs_are_an_error(tmp_path, run_compare):
    begun = write_run(tmp_path / "begun", finished=False)
    status, _, err = run_compare(begun)
    assert status == 2
    assert "unfinished" in err


@pytest.mark.parametrize("made", [False, True])
def test_directories_that_are_no_runs_are_named(tmp_path, run_compare, made):
    if made:
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "config.json").write_text('{"model_type": "bert"}')
    status, _, err = run_compare(tmp_path / "notes")
    assert status == 2
    assert str(tmp_path / "notes") in err
    assert "Traceback" not in err


def test_a_cut_short_file_is_named(tmp_path, run_compare):
    run = write_run(tmp_path / "run")
    text = (run / "predictions.csv").read_text()
    (run / "predictions.csv").write_text(text[: len(text) // 2])
    status, _, err = run_compare(run)
    assert status == 2
    assert "predictions.csv" in err


def test_a_folder_of_runs_is_searched_in_natural_order(tmp_path):
    for temperature in (10.0, 2.0):
        write_run(tmp_path / "grid" / f"temp_{temperature:g}", kd_temperature=temperature)
    names = [result.row.name for result in compare_runs([tmp_path], resamples=200).results]
    assert names == ["temp_2", "temp_10"]


def test_a_run_given_twice_counts_once(tmp_path):
    run = write_run(tmp_path / "run")
    assert len(compare_runs([run, tmp_path, f"{run}/"], resamples=200).results) == 1


def test_matching_control_beside_the_runs_is_the_baseline(tmp_path, run_compare):
    write_run(tmp_path / "control", pipeline="student_only", kd_alpha=0.1)
    write_run(tmp_path / "other_seed", pipeline="student_only", seed=1)
    write_run(tmp_path / "other_student", pipeline="student_only", student_hidden_size=64)
    write_run(tmp_path / "unfinished", pipeline="student_only", finished=False)
    run = write_run(tmp_path / "kd", kd_alpha=0.5)
    status, out, err = run_compare(run, "--format", "json")
    comparison = json.loads(out)
    assert status == 0
    assert [row["run"] for row in comparison["rows"]] == ["control", "kd"]
    assert comparison["baseline"] == "control"
    assert "found beside the runs" in err


def test_given_control_is_the_baseline_and_comes_first(tmp_path):
    run = write_run(tmp_path / "kd")
    control = write_run(tmp_path / "elsewhere" / "control", pipeline="student_only")
    comparison = compare_runs([run, control], resamples=200)
    assert comparison.baseline.row.name == "control"
    assert comparison.results[0] is comparison.baseline


def test_baseline_flag_adds_a_run_that_was_not_given(tmp_path):
    runs = [write_run(tmp_path / f"a{a}", kd_alpha=a) for a in (0.3, 0.5, 0.9)]
    comparison = compare_runs(runs[:2], baseline=str(runs[2]), resamples=200)
    assert [result.row.name for result in comparison.results] == ["a0.9", "a0.3", "a0.5"]
    assert comparison.results[0].difference is None


def test_baseline_must_be_one_finished_row(tmp_path, run_compare):
    for a in (0.3, 0.5):
        write_run(tmp_path / "grid" / f"a{a}", kd_alpha=a)
    begun = write_run(tmp_path / "begun", finished=False)
    run = write_run(tmp_path / "kd")
    assert run_compare(run, "--baseline", tmp_path / "grid")[0] == 2
    status, _, err = run_compare(run, "--baseline", begun)
    assert status == 2
    assert str(begun) in err


def write_seeds(folder, alphas=(0.3, 0.9), seeds=(1, 2, 3), **settings):
    for alpha in alphas:
        for seed in seeds:
            noise = round(100 * alpha) + seed
            write_run(folder / f"alpha_{alpha}_seed{seed}", 2 + alpha, kd_alpha=alpha, seed=seed, noise_seed=noise, **settings)


def test_runs_that_differ_only_by_seed_become_one_row(tmp_path):
    write_seeds(tmp_path)
    comparison = compare_runs([tmp_path], group_by="seed", resamples=200)
    assert [result.row.name for result in comparison.results] == ["alpha_0.3", "alpha_0.9"]
    assert comparison.flags == ("kd_alpha",)
    for result in comparison.results:
        assert len(result.values) == 3
        assert result.estimate.value == pytest.approx(np.mean(result.values))
        assert result.std == pytest.approx(np.std(result.values, ddof=1))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("seed_1_kd_method_logit", "seed_2_kd_method_logit"), "kd_method_logit"),
        (("kd_alpha_0.3_seed_1", "kd_alpha_0.3_seed_2"), "kd_alpha_0.3"),
        (("class_s1", "class_s2"), "class"),
        (("seed_1", "seed_2"), "runs"),
        (("run_1", "run_2"), "run"),
        (("left", "right"), "left and 1 more"),
    ],
)
def test_a_row_of_seeds_is_named_without_them(tmp_path, names, expected):
    for seed, name in enumerate(names, 1):
        write_run(tmp_path / "runs" / name, seed=seed)
    (result,) = compare_runs([tmp_path / "runs"], group_by="seed", resamples=100).results
    assert result.row.name == expected


def test_difference_over_seeds_pairs_runs_of_the_same_seed(tmp_path):
    write_seeds(tmp_path)
    (tmp_path / "alpha_0.9_seed3" / "metrics.json").unlink()
    first, second = compare_runs([tmp_path], group_by="seed", resamples=200).results
    expected = np.mean(np.subtract(second.values, first.values[:2]))
    assert second.difference is not None
    assert second.difference.value == pytest.approx(expected)
    assert 0 < second.p_members <= 1


def test_seeds_that_split_the_data_anew_are_compared_seed_by_seed(tmp_path, run_compare):
    truth = make_truth(200)
    for seed in (1, 2):
        rows = np.sort(np.random.default_rng(seed).choice(200, 80, replace=False))
        for alpha in (0.3, 0.9):
            write_run(
                tmp_path / f"a{alpha}_{seed}", 2 + alpha, truth[rows], rows, seed=seed, kd_alpha=alpha, test_sha256=str(seed)
            )
    status, _, err = run_compare(tmp_path)
    assert status == 2
    assert "--group_by seed" in err
    status, out, _ = run_compare(tmp_path, "--group_by", "seed", "--format", "csv")
    assert status == 0
    assert [row["runs"] for row in read_table(out)] == ["2", "2"]


def test_ungrouped_seeds_are_pointed_to_group_by(tmp_path, run_compare):
    write_seeds(tmp_path, alphas=(0.3,))
    assert "--group_by seed pairs equal seeds" in run_compare(tmp_path)[2]
    assert "--group_by seed" not in run_compare(tmp_path, "--group_by", "seed")[2]


def test_two_runs_of_one_seed_in_a_group_are_refused(tmp_path, run_compare):
    for name in ("run", "copy"):
        write_run(tmp_path / name)
    status, _, err = run_compare(tmp_path, "--group_by", "seed")
    assert status == 2
    assert "same seed" in err


def write_folds(folder, skill, **flags):
    """Write a cross-validated run of two folds."""
    truth = make_truth(200)
    for fold in (1, 2):
        rows = np.arange(fold - 1, 200, 2)
        write_run(folder / f"fold_{fold}", skill, truth[rows], rows, test_sha256=str(fold), num_folds=2, **flags)
        config = json.loads((folder / f"fold_{fold}" / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config))
        (folder / f"fold_{fold}" / "config.json").write_text(json.dumps({**config, "fold": fold}))
    headline = {"model": "student", "part": "test", "metric": "f1_macro", "value": 0.7}
    metrics = {"folds": 2, "labels": list(LABELS), "mean": {}, "std": {}, "headline": headline}
    (folder / "metrics.json").write_text(json.dumps(metrics))


@pytest.mark.parametrize("given", ["whole", "folds"])
def test_folds_become_one_row(tmp_path, given):
    for skill in (1.0, 4.0):
        write_folds(tmp_path / f"skill_{skill}", skill, lr=skill)
    paths = sorted(tmp_path.glob("*/fold_*" if given == "folds" else "*"))
    weak, strong = compare_runs(paths, group_by="fold", resamples=200).results
    assert [len(weak.values), len(strong.values)] == [2, 2]
    assert (weak.row.name, strong.row.name) == ("skill_1.0", "skill_4.0")
    assert strong.difference is not None
    assert strong.difference.p_value < 0.01


def test_cross_validated_control_beside_the_runs_is_found(tmp_path):
    write_folds(tmp_path / "control", 1.0, pipeline="student_only")
    write_folds(tmp_path / "kd", 4.0)
    comparison = compare_runs([tmp_path / "kd"], resamples=200)
    assert comparison.baseline.row.name == "control"
    assert comparison.flags == ("pipeline",)


def test_folds_of_several_seeds_become_one_row(tmp_path):
    for seed in (1, 2):
        write_folds(tmp_path / f"run_seed{seed}", 2.0, seed=seed)
    (result,) = compare_runs([tmp_path], group_by="seed", resamples=200).results
    assert len(result.values) == 4


def test_group_by_fold_without_folds_is_refused(tmp_path, run_compare):
    status, _, err = run_compare(write_run(tmp_path / "run"), "--group_by", "fold")
    assert status == 2
    assert "none of the runs has folds" in err


def test_model_and_part_choose_the_predictions(tmp_path, run_compare):
    run = write_run(tmp_path / "kd", 1.0, models=("teacher", "student"))
    student, teacher = (compare_runs([run], model=model, resamples=200).results[0] for model in ("student", "teacher"))
    assert teacher.estimate.value > student.estimate.value
    validation = run / "validation_predictions.csv"
    validation.write_text("".join(validation.read_text().splitlines(keepends=True)[:50]))
    _, out, _ = run_compare(run, "--part", "validation", "--format", "json")
    assert json.loads(out)["part"] == "validation"
    status, _, err = run_compare(write_run(tmp_path / "alone"), "--model", "teacher")
    assert status == 2
    assert "no predictions of the teacher" in err


def test_teacher_only_run_is_compared_by_its_teacher(tmp_path):
    baseline = write_run(tmp_path / "teacher", pipeline="baseline", models=("teacher",))
    student = write_run(tmp_path / "student", pipeline="student_only")
    models = {result.row.name: result.row.members[0].model for result in compare_runs([baseline, student], resamples=200).results}
    assert models == {"teacher": "teacher", "student": "student"}


def test_markdown_and_latex_escape_names(tmp_path, run_compare):
    run = write_run(tmp_path / "50%_a|b&c")
    write_run(tmp_path / "x", student_path="org/model_{1}#2")
    _, markdown, _ = run_compare(run, tmp_path / "x", "--format", "markdown")
    _, latex, _ = run_compare(run, tmp_path / "x", "--format", "latex")
    assert r"50%\_a\|b&amp;c" in markdown
    assert r"50\%\_a\textbar{}b\&c" in latex
    assert r"org/model\_\{1\}\#2" in latex
    columns = {line.replace(r"\|", "").count("|") for line in markdown.splitlines() if line.startswith("|")}
    assert len(columns) == 1


def test_csv_quotes_commas_and_quotes(tmp_path, run_compare):
    run = write_run(tmp_path / 'a,"b"')
    _, out, _ = run_compare(run, "--format", "csv")
    assert '"a,""b"""' in out
    assert out.endswith("\r\n")
    assert read_table(out)[0]["run"] == 'a,"b"'


def test_output_folder_gets_tables_and_figures(tmp_path, run_compare):
    for alpha in (0.3, 0.9):
        for temperature in (2.0, 4.0):
            write_run(
                tmp_path / "grid" / f"a{alpha}_t{temperature}",
                2 + alpha,
                kd_alpha=alpha,
                kd_temperature=temperature,
                models=("teacher", "student"),
                efficiency=EFFICIENCY,
            )
    write_run(tmp_path / "grid" / "control", pipeline="student_only")
    status, _, _ = run_compare(tmp_path / "grid", "--output", tmp_path / "out")
    assert status == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "comparison.json",
        "differences.png",
        "frontier.png",
        "heatmap_kd_alpha_kd_temperature.png",
        "report.html",
        "sweep_kd_alpha.png",
        "sweep_kd_temperature.png",
        "table.csv",
        "table.md",
        "table.tex",
    ]
    for path in (tmp_path / "out").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_output_that_cannot_be_written_is_named(tmp_path, run_compare):
    run = write_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    status, _, err = run_compare(run, "--output", tmp_path / "file")
    assert status == 2
    assert str(tmp_path / "file") in err


@pytest.mark.parametrize("finished", [True, False])
def test_run_directory_is_refused_as_output(tmp_path, run_compare, finished):
    run = write_run(tmp_path / "run")
    (run / "report.html").write_text("the run's own")
    if not finished:
        (run / "metrics.json").unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    status, out, err = run_compare(run, "--output", run)
    assert (status, out) == (2, "")
    assert err.splitlines() == [
        f"research_compare.py: --output {run} holds a run, whose report.html would be overwritten. Give another folder."
    ]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_seed_is_no_swept_flag(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / f"run_{seed}", seed=seed, lr=seed * 1e-5)
    comparison = compare_runs([tmp_path], resamples=200)
    assert plots.swept_flags(comparison) == ["lr"]


def test_flags_are_written_as_they_are_typed():
    assert [format_value(value) for value in (2.0, 0.5, 5e-05, 3, True, None, ["a", "b"], "model-1.0")] == [
        "2", "0.5", "5e-05", "3", "on", "", "a b", "model-1.0",
    ]  # fmt: skip


def test_frontier_names_the_best_row_of_a_size_and_the_teacher(tmp_path):
    for alpha in (0.3, 0.6, 0.9):
        write_run(tmp_path / f"a{alpha}", 1 + 3 * alpha, kd_alpha=alpha, models=("teacher", "student"), efficiency=EFFICIENCY)
    points = plots.collect_frontier(compare_runs([tmp_path], resamples=200))
    assert [point.name for point in points] == ["a0.3", None, "a0.9 (best of 3)", "teacher"]


def test_a_control_within_a_run_is_the_baseline(tmp_path, run_compare):
    for seed in (1, 2):
        models = ("teacher", "control", "student") if seed == 1 else ("student",)
        write_run(tmp_path / f"seed_{seed}", 3.0, seed=seed, with_control=seed == 1, models=models)
    status, out, err = run_compare(tmp_path, "--format", "csv")
    assert status == 0
    assert [row["run"] for row in read_table(out)] == ["seed_1 (control)", "seed_1", "seed_2"]
    assert "trained by --with_control" in err
    assert "with_control" not in read_table(out)[0]


def test_a_control_within_a_run_scores_as_the_student_only_run_does(tmp_path):
    truth = make_truth()
    run = write_run(tmp_path / "kd", 3.0, truth, with_control=True, models=("control", "student"))
    alone = write_run(tmp_path / "elsewhere" / "alone", 3.0, truth, pipeline="student_only")
    within, found = (compare_runs(paths, resamples=200) for paths in ([run], [run, alone]))
    assert within.baseline.row.members[0].model == "control"
    assert found.baseline.row.name == "alone"
    assert within.baseline.estimate == found.baseline.estimate


def test_the_frontier_has_a_control_at_its_student_size(tmp_path):
    run = write_run(tmp_path / "kd", models=("teacher", "control", "student"), efficiency=EFFICIENCY)
    points = plots.collect_frontier(compare_runs([run], resamples=200))
    assert [point.parameters for point in points] == [3e7, 3e7, 1.1e8]
    assert (points[0].name or "").startswith("kd (control)")


def test_page_of_a_comparison_holds_its_table_and_figures(tmp_path, run_compare):
    for alpha in (0.3, 0.9):
        write_run(tmp_path / "grid" / f"a<{alpha}>", 2 + alpha, kd_alpha=alpha)
    write_run(tmp_path / "grid" / "late", kd_alpha=0.1, finished=False)
    status, _, _ = run_compare(tmp_path / "grid", "--output", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert status == 0
    assert "a&lt;0.3&gt;" in page and "a<0.3>" not in page
    assert page.count('src="data:image/png;base64,') == 2  # the sweep and the differences
    assert "Unfinished, left out" in page and "grid/late" in page


def test_same_comparison_prints_the_same_bytes(tmp_path, run_compare):
    for alpha in (0.3, 0.9):
        write_run(tmp_path / f"a{alpha}", 2 + alpha, kd_alpha=alpha)
    assert run_compare(tmp_path, "--format", "json") == run_compare(tmp_path, "--format", "json")


def test_command_line_imports_neither_torch_nor_sklearn(tmp_path):
    write_run(tmp_path / "run")
    code = (
        "import sys, research_compare\n"
        f"assert research_compare.main([{str(tmp_path)!r}, '--output', {str(tmp_path / 'out')!r}]) == 0\n"
        "assert not {'torch', 'sklearn', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_bad_flags_exit_with_two(tmp_path):
    with pytest.raises(SystemExit) as caught:
        research_compare.main([str(tmp_path), "--resamples", "5"])
    assert caught.value.code == 2


@pytest.mark.parametrize(("cell", "shown"), [("1e9", "1e+09"), ("inf", "inf"), ("-5", "-5")])
def test_run_with_probabilities_that_are_none_is_one_line(tmp_path, run_compare, cell, shown):
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    lines = (runs[1] / "predictions.csv").read_text(encoding="utf-8").splitlines()
    lines[3] = ",".join([*lines[3].split(",")[:-1], cell])
    (runs[1] / "predictions.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    status, out, err = run_compare(*runs)
    assert (status, out) == (2, "")
    complaint = f"data row 3: student_<label> must be a probability from 0 to 1, got {shown}. Repeat the run with --overwrite."
    assert err == f"research_compare.py: {runs[1] / 'predictions.csv'}, {complaint}\n"


def test_tilde_in_a_flag_is_the_home_and_a_line_break_in_a_path_is_escaped(tmp_path, run_compare, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", skill=3.0)
    assert run_compare("~/a", "~/b", "--baseline=~/a", "--output=~/out")[0] == 0
    assert (tmp_path / "out" / "report.html").is_file()
    status, _, err = run_compare("no\nwhere")
    assert status == 2 and err.startswith("research_compare.py: no\\nwhere: no such") and err.count("\n") == 1


def test_full_and_closed_stdout_are_no_traceback(tmp_path):
    runs = [str(write_run(tmp_path / name)) for name in ("a", "b")]
    command = [sys.executable, research_compare.__file__, *runs, "--resamples", "100"]
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 1 and ended.stderr.endswith("error: stdout cannot be written: No space left on device\n")
    first = subprocess.run(f"{' '.join(command)} | true", shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in first.stderr and "BrokenPipe" not in first.stderr
