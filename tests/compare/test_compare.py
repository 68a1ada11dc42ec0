import csv
import io
import json
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score
from support.comparison_runs import LABELS, make_truth, write_run

import research_compare
from research.compare import figures as plots
from research.compare.frontier import collect_frontier, find_front
from research.compare.rows import gather_rows
from research.compare.scores import compare_runs
from research.evaluation.bootstrap import COMPARED_METRICS
from research.evaluation.gain import GAIN_METRICS
from research.evaluation.inference import holm
from research.flags import format_value
from research.runs.folds import aggregate_folds, pool_folds
from research.runs.run import load_run

METRICS = ("average_precision_macro", "f1_macro", "hamming_loss")
EFFICIENCY = {
    "teacher": {"parameters_total": 110_000_000, "latency_ms_batch1": 40.0},
    "student": {"parameters_total": 30_000_000, "latency_ms_batch1": 9.0},
}


@pytest.fixture
def run_compare(capsys):
    """Call the command line; returns exit status, stdout and stderr."""

    def call(*arguments):
        metric = () if "--metric" in arguments else ("--metric", "f1_macro")
        status = research_compare.main(["--resamples", "200", *metric, *map(str, arguments)])
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


def write_older_run(path, *missing, **settings):
    """Write a run of a version that did not have some flags."""
    write_run(path, **settings)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({name: value for name, value in config.items() if name not in missing}))
    return path


def test_a_flag_that_an_older_version_did_not_have_is_at_its_default(tmp_path):
    runs = [
        write_older_run(tmp_path / "seed_1", "ema_decay", "search", "control_labels", seed=1, noise_seed=1),
        write_run(tmp_path / "seed_2", seed=2, noise_seed=2),
        write_run(tmp_path / "averaged", seed=1, noise_seed=3, ema_decay=0.999),
    ]
    comparison = compare_runs(runs, group_by="seed", resamples=100)
    assert comparison.flags == ("ema_decay",)
    assert [list(result.row.seeds) for result in comparison.results] == [[1, 2], [1]]


def test_the_control_of_an_older_version_is_found(tmp_path):
    write_older_run(tmp_path / "labels", "ema_decay", "search", pipeline="student_only", seed=1)
    run = write_run(tmp_path / "kd", seed=1, noise_seed=2)
    assert compare_runs([run], resamples=100).results[0].row.name == "labels"


def test_a_row_per_run_with_the_interval_around_its_score(tmp_path, run_compare):
    runs = [write_run(tmp_path / name, skill, kd_alpha=skill / 10) for name, skill in (("weak", 1.0), ("strong", 4.0))]
    status, out, err = run_compare(*runs, "--format", "csv")
    weak, strong = read_table(out)
    assert status == 0
    assert [weak["run"], strong["run"]] == ["weak", "strong"]
    for row in (weak, strong):
        assert float(row["score_low"]) < float(row["score"]) < float(row["score_high"])
    assert float(strong["difference"]) == pytest.approx(float(strong["score"]) - float(weak["score"]), abs=1e-5)
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
    difference = compare_runs(runs, metrics=[metric], resamples=200).results[1].difference
    assert difference is not None
    assert difference.p_value < 0.01
    assert (difference.value < 0) == (metric == "hamming_loss")


def test_tuned_thresholds_come_from_metrics_json(tmp_path):
    run = write_run(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["thresholds"]["student"] = dict.fromkeys(LABELS, 1.1)
    (run / "metrics.json").write_text(json.dumps(metrics))
    (result,) = compare_runs([run], metrics=["f1_macro_tuned"], resamples=200).results
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
    assert second.difference.over_seeds


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


def test_a_run_that_reads_no_seed_is_set_against_every_seed(tmp_path):
    write_seeds(tmp_path, alphas=(0.3,))
    single = write_run(tmp_path / "tfidf", 1.0, pipeline="tfidf", seed=7)
    comparison = compare_runs([tmp_path], group_by="seed", baseline=str(single), resamples=200)
    tfidf, seeds = comparison.results
    assert len(tfidf.values) == 1
    assert seeds.difference is not None
    assert seeds.difference.over_seeds
    assert seeds.difference.value == pytest.approx(np.mean(seeds.values) - tfidf.estimate.value)
    assert not {"seed", "max_length", "epochs"} & tfidf.row.settings.keys()


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
    folds = [load_run(folder / f"fold_{fold}") for fold in (1, 2)]
    metrics = aggregate_folds([fold.metrics for fold in folds]) | {"pooled": pool_folds(folds)}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


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
    assert len(result.values) == 2  # a score over all rows for each seed


def read_fold(folder):
    """Return a written fold's labels and the student's probabilities."""
    predictions = load_run(folder).predictions
    return predictions.labels, predictions.probs["student"]


def test_folds_are_scored_over_all_rows_at_the_thresholds_of_each(tmp_path):
    write_folds(tmp_path / "cv", 2.0)
    cuts = (0.3, 0.6)
    for fold, cut in enumerate(cuts, 1):
        path = tmp_path / "cv" / f"fold_{fold}" / "metrics.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "thresholds": {"student": dict.fromkeys(LABELS, cut)}}))
    folds = [read_fold(tmp_path / "cv" / f"fold_{fold}") for fold in (1, 2)]
    labels = np.concatenate([labels for labels, _ in folds])
    decided = np.concatenate([probs >= cut for (_, probs), cut in zip(folds, cuts, strict=True)])
    ranked = [average_precision_score(labels, probs, average="macro") for labels, probs in folds]
    comparison = compare_runs([tmp_path / "cv"], metrics=("f1_macro_tuned", "average_precision_macro"), resamples=200)
    tuned, ranking = (results[0].estimate.value for results in comparison.by_metric.values())
    assert tuned == pytest.approx(f1_score(labels, decided, average="macro"))
    assert ranking == pytest.approx(np.mean(ranked))


def test_metrics_of_folds_say_what_a_comparison_of_them_says(tmp_path):
    run = load_run(write_folds(tmp_path / "cv", 2.0, models=("teacher", "control", "student")))
    comparison = compare_runs([run.path], metrics=GAIN_METRICS, keeps=0.99)
    assert run.metrics["pooled"]["rows"] == 200
    for metric, (_, student) in comparison.by_metric.items():
        assert student.difference is not None
        assert student.keeping is not None
        pooled = run.metrics["pooled"]["scores"][metric]["student"]
        assert [pooled[end] for end in ("value", "low", "high")] == pytest.approx(list(vars(student.estimate).values()))
        gain = run.metrics["pooled"]["kd_gain"][metric]
        assert (gain["gain"], gain["low"], gain["p_value"]) == pytest.approx(
            (student.difference.value, student.difference.low, student.difference.p_value)
        )
        assert run.metrics["pooled"]["kept"][metric]["bound"] == pytest.approx(student.keeping.bound)


def test_folds_tell_apart_what_one_of_them_cannot(tmp_path):
    for skill in (2.0, 2.6):
        write_folds(tmp_path / f"skill_{skill}", skill, lr=skill)
    paths = sorted(tmp_path.iterdir())
    whole = compare_runs(paths).results[1].difference
    part = compare_runs([path / "fold_1" for path in paths]).results[1].difference
    assert whole is not None
    assert part is not None
    assert whole.high - whole.low < part.high - part.low
    assert (whole.over_seeds, part.over_seeds) == (True, False)


def test_seeds_and_folds_give_one_interval_and_keep_is_over_all_rows(tmp_path, run_compare):
    for skill in (2.0, 3.0):
        for seed in (1, 2, 3):
            write_folds(tmp_path / f"skill_{skill}_seed{seed}", skill, models=("teacher", "student"), seed=seed, lr=skill)
    command = (tmp_path, "--group_by", "seed", "--keeps", "0.9")
    status, out, _ = run_compare(*command, "--format", "csv")
    weak, strong = read_table(out)[:2]
    assert status == 0
    assert (strong["runs"], strong["over"]) == ("3", "seeds and rows")
    assert float(strong["score"]) > float(weak["score"])
    assert strong["kept"] == "on"
    assert "of 2 folds, all rows together" in run_compare(*command)[1]


@pytest.mark.parametrize("change", ["another split", "a row twice", "a fold less", "a single split"])
def test_folds_that_do_not_match_are_refused_by_name(tmp_path, run_compare, change):
    for name in ("a", "b"):
        write_folds(tmp_path / name, 2.0, lr=len(name) if name == "a" else 2.0)
    paths = [tmp_path / "a", tmp_path / "b"]
    if change == "another split":
        shutil.move(tmp_path / "b" / "fold_1", tmp_path / "b" / "fold_3")
        shutil.move(tmp_path / "b" / "fold_2", tmp_path / "b" / "fold_1")
        shutil.move(tmp_path / "b" / "fold_3", tmp_path / "b" / "fold_2")
    elif change == "a row twice":
        for name in ("a", "b"):
            shutil.copy(tmp_path / name / "fold_1" / "predictions.csv", tmp_path / name / "fold_2" / "predictions.csv")
    elif change == "a fold less":
        paths = [tmp_path / "a", tmp_path / "b" / "fold_1"]
    else:
        paths = [tmp_path / "a", write_run(tmp_path / "c", truth=make_truth(200))]
    status, _, err = run_compare(*paths, "--group_by", "fold")
    expected = {"another split": "another test part", "a row twice": "row 0 is in the test part of two folds"}
    assert status == 2
    assert expected.get(change, "other folds than") in err


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


def test_frontier_names_the_row_of_a_size_that_is_best_on_validation_and_the_teacher(tmp_path):
    for alpha, validation_score in ((0.3, 0.7), (0.6, 0.8), (0.9, 0.6)):  # 0.9 is the best by its test score
        write_run(
            tmp_path / f"a{alpha}",
            1 + 3 * alpha,
            kd_alpha=alpha,
            models=("teacher", "student"),
            efficiency=EFFICIENCY,
            validation_score=validation_score,
        )
    comparison = compare_runs([tmp_path], resamples=200)
    points = collect_frontier(comparison)
    assert [point.name for point in points] == ["a0.3", "a0.6 (best of 3 on validation)", None, "teacher"]
    assert points[1].value == comparison.results[1].estimate.value < points[2].value


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


def test_controls_of_seeds_are_named_as_their_students_are(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / "static" / f"seed_{seed}", 3.0, seed=seed, models=("control", "student"))
    comparison = compare_runs([tmp_path], group_by="seed", resamples=200)
    assert [result.row.name for result in comparison.results] == ["static (control)", "static"]


def test_the_frontier_names_the_best_of_a_size_with_and_without_a_teacher(tmp_path):
    for place, (pipeline, score) in enumerate([("kd_only", 0.6), ("kd_only", 0.7), ("student_only", 0.8), ("student_only", 0.9)]):
        write_run(tmp_path / f"run_{place}", pipeline=pipeline, dropout=place / 10, efficiency=EFFICIENCY, validation_score=score)
    points = collect_frontier(compare_runs([tmp_path], baseline=str(tmp_path / "run_3"), resamples=200))
    assert {point.name for point in points if not point.is_teacher} == {None, "run_1", "run_3"}


def test_the_frontier_has_a_control_at_its_student_size(tmp_path):
    run = write_run(tmp_path / "kd", models=("teacher", "control", "student"), efficiency=EFFICIENCY)
    points = collect_frontier(compare_runs([run], resamples=200))
    assert [point.parameters for point in points] == [3e7, 3e7, 1.1e8]
    assert (points[0].name or "").startswith("kd (control)")


def test_the_frontier_tells_who_learned_from_a_teacher(tmp_path):
    cheaper = {name: {**costs, "parameters_total": 20_000_000} for name, costs in EFFICIENCY.items()}
    distilled = write_run(tmp_path / "distilled", models=("teacher", "student"), efficiency=EFFICIENCY)
    alone = write_run(tmp_path / "alone", pipeline="student_only", efficiency=cheaper)
    points = collect_frontier(compare_runs([distilled, alone], resamples=200))
    assert [(point.name, point.distilled) for point in points] == [("alone", False), ("distilled", True), ("teacher", True)]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("seed", range(5))
def test_front_holds_the_points_that_no_other_beats(seed, sign):
    generator = np.random.default_rng(seed)
    costs, values = generator.integers(1, 9, 12).tolist(), (sign * generator.integers(1, 9, 12)).tolist()
    beaten = {
        one
        for one in range(12)
        for other in range(12)
        if costs[other] <= costs[one]
        and sign * values[other] >= sign * values[one]
        and (costs[other], values[other]) != (costs[one], values[one])
    }
    front = find_front(costs, values, lower_is_better=sign < 0)
    found = [(costs[point], values[point]) for point in front]
    assert set(found) == {(costs[point], values[point]) for point in range(12) if point not in beaten}
    assert found == sorted(found) and len(set(found)) == len(found)


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


@pytest.mark.parametrize(("cell", "shown"), [("1e99", "1e+99"), ("inf", "inf"), ("", "an empty cell")])
def test_run_with_logits_that_are_none_is_one_line(tmp_path, run_compare, cell, shown):
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    lines = (runs[1] / "predictions.csv").read_text(encoding="utf-8").splitlines()
    place = lines[0].split(",").index("logit_student_spam")
    lines[3] = ",".join([cell if column == place else text for column, text in enumerate(lines[3].split(","))])
    (runs[1] / "predictions.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    status, out, err = run_compare(*runs)
    assert (status, out) == (2, "")
    complaint = f"data row 3: logit_student_<label> must be a finite logit, got {shown}. Repeat the run with --overwrite."
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


def test_several_metrics_are_corrected_for_together(tmp_path, run_compare):
    write_seeds(tmp_path, alphas=(0.3, 0.6, 0.9))
    alone, both = (compare_runs([tmp_path], metrics=m, group_by="seed", resamples=200) for m in (["f1_macro"], METRICS))
    p_values = [r.difference.p_value for results in both.by_metric.values() for r in results if r.difference]
    corrected = [r.p_holm for results in both.by_metric.values() for r in results if r.difference]
    assert corrected == pytest.approx(holm(p_values))
    assert len(p_values) == 6
    assert [r.difference for r in alone.results] == [r.difference for r in both.by_metric["f1_macro"]]
    status, out, _ = run_compare(tmp_path, "--group_by", "seed", "--metric", ",".join(METRICS), "--format", "csv")
    assert status == 0
    assert [row["metric"] for row in read_table(out)] == [metric for metric in METRICS for _ in range(3)]


def test_the_default_metrics_are_ranking_and_both_thresholds(tmp_path):
    comparison = compare_runs([write_run(tmp_path / "run")], resamples=100)
    assert comparison.metrics == ("average_precision_macro", "f1_macro", "f1_macro_tuned")


def test_an_unknown_metric_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        research_compare.main([str(tmp_path), "--metric", "f1_macro,accuracy"])
    assert caught.value.code == 2
    assert "no metric 'accuracy'; choose from f1_macro, " in capsys.readouterr().err


def test_one_seed_is_said_to_speak_for_rows_only_and_is_never_marked(tmp_path, run_compare):
    write_seeds(tmp_path, alphas=(0.3,), seeds=(1, 2))
    write_run(tmp_path / "single", 6.0, kd_alpha=0.9, seed=1, noise_seed=7)
    _, out, _ = run_compare(tmp_path, "--group_by", "seed", "--format", "csv")
    grouped, single = read_table(out)
    assert (grouped["over"], single["over"]) == ("", "rows")
    assert float(single["p_holm"]) < 0.01
    _, text, _ = run_compare(tmp_path, "--group_by", "seed")
    assert "(rows)" in next(line for line in text.splitlines() if line.startswith("single"))
    assert "*" not in text
    assert "one seed only, so the interval says what other rows would give, not other seeds" in text


def test_a_difference_over_seeds_and_rows_is_marked_in_every_format(tmp_path, run_compare):
    for skill in (1.0, 6.0):
        for seed in (1, 2, 3):
            write_run(tmp_path / f"s{skill}_seed{seed}", skill, lr=skill, seed=seed, noise_seed=seed)
    _, out, _ = run_compare(tmp_path, "--group_by", "seed", "--format", "csv")
    row = read_table(out)[1]
    assert row["over"] == "seeds and rows"
    difference = f"+{float(row['difference']):.4f}"
    for form, marked in (("table", f"{difference}*"), ("markdown", f"**{difference}**"), ("latex", r"\textbf{\boldmath $+$0.")):
        assert marked in run_compare(tmp_path, "--group_by", "seed", "--format", form)[1], form


def test_seeds_that_disagree_widen_the_interval(tmp_path):
    truth = make_truth(400)
    for name, skills in (("alike", (3.0, 3.0, 3.0)), ("apart", (2.0, 3.0, 4.0))):
        for seed, skill in enumerate(skills):
            write_run(tmp_path / name / f"control_seed{seed}", 2.5, truth, pipeline="student_only", seed=seed, noise_seed=seed)
            write_run(tmp_path / name / f"kd_seed{seed}", skill, truth, seed=seed, noise_seed=seed)
    widths = []
    for name in ("alike", "apart"):
        difference = compare_runs([tmp_path / name], group_by="seed", resamples=300).results[1].difference
        assert difference is not None and difference.over_seeds
        widths.append(difference.high - difference.low)
    assert widths[1] > 3 * widths[0]


def test_runs_without_a_seed_in_common_are_compared_as_independent(tmp_path):
    for seed in (1, 2, 3, 4):
        write_run(tmp_path / f"{'a' if seed < 3 else 'b'}_seed{seed}", 2.0, lr=1e-4 * (1 + seed // 3), seed=seed, noise_seed=seed)
    difference = compare_runs([tmp_path], group_by="seed", resamples=200).results[1].difference
    assert difference is not None and difference.over_seeds
    assert difference.low < 0 < difference.high


def test_rows_of_one_text_are_resampled_together(tmp_path):
    truth = np.repeat(make_truth(100), 4, axis=0)
    for name, clusters in (("texts", np.repeat(np.arange(0, 400, 4), 4)), ("rows", None)):
        for skill in (2.0, 3.0):
            run = write_run(tmp_path / name / f"s{skill}", skill, truth, clusters=clusters, lr=skill)
            repeat_answers(run)
    widths = []
    for name in ("texts", "rows"):
        estimate = compare_runs([tmp_path / name], metrics=["f1_macro"], resamples=1000).results[0].estimate
        widths.append(estimate.high - estimate.low)
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.2)


def repeat_answers(run):
    """Give every four rows the answers of their first."""
    lines = (run / "predictions.csv").read_text().splitlines()
    first = lines[0].split(",").index("logit_student_bully")
    cells = [line.split(",") for line in lines[1:]]
    lines[1:] = [",".join([*line[:first], *cells[place // 4 * 4][first:]]) for place, line in enumerate(cells)]
    (run / "predictions.csv").write_text("\n".join(lines) + "\n")


def test_an_older_run_among_the_others_is_named_and_rows_are_resampled(tmp_path, run_compare):
    runs = [write_run(tmp_path / name, skill, lr=skill) for name, skill in (("old", 2.0), ("new", 3.0))]
    lines = [line.split(",") for line in (runs[0] / "predictions.csv").read_text().splitlines()]
    kept = [place for place, name in enumerate(lines[0]) if name != "text_cluster" and not name.startswith("logit_")]
    (runs[0] / "predictions.csv").write_text("".join(",".join(line[place] for place in kept) + "\n" for line in lines))
    status, _, err = run_compare(*runs)
    assert status == 0
    assert f"{runs[0]} is of version 0.1: its probabilities have six decimals, and rows are resampled, not texts" in err


def test_keeps_tests_each_student_against_its_teacher(tmp_path, run_compare):
    for name, skill in (("weak", 1.0), ("near", 2.9)):
        for seed in (1, 2, 3):
            flags: dict[str, Any] = {"lr": skill, "seed": seed, "noise_seed": seed}
            write_run(tmp_path / f"{name}_seed{seed}", skill, make_truth(600), models=("teacher", "student"), **flags)
    write_run(tmp_path / "alone_seed1", 1.0, make_truth(600), pipeline="student_only", seed=1, lr=3.0)
    _, out, _ = run_compare(tmp_path, "--group_by", "seed", "--keeps", "0.8", "--format", "csv")
    rows = {row["run"]: row for row in read_table(out)}
    assert [rows[name]["kept"] for name in ("weak", "near", "alone_seed1")] == ["off", "on", ""]
    assert float(rows["weak"]["kept_bound"]) < 0 < float(rows["near"]["kept_bound"])
    assert int(float(rows["near"]["kept_rows_needed"])) > 0
    _, text, _ = run_compare(tmp_path, "--group_by", "seed", "--keeps", "0.8")
    assert "keeps 80 %" in text and "yes, +" in text and "no, -" in text
    assert "kept" not in run_compare(tmp_path, "--group_by", "seed", "--format", "csv")[1]


def test_runs_of_one_name_are_told_apart_by_the_end_of_their_paths(tmp_path):
    runs = [write_run(tmp_path / parent / "seed_1", skill) for parent, skill in (("plain", 1.0), ("ngrams", 2.0))]
    assert [row.name for row in gather_rows(runs, None, "test", None, None)[0]] == ["plain/seed_1", "ngrams/seed_1"]


def test_several_teachers_of_a_frontier_are_told_apart_and_one_is_the_teacher(tmp_path):
    models = {"teacher": {"parameters_total": 9.0, "latency_ms_batch1": 9.0}}
    models["student"] = {"parameters_total": 1.0, "latency_ms_batch1": 1.0}
    runs = []
    for name, alpha, score in (("weak", 0.3, 0.7), ("strong", 0.5, 0.8)):
        run = write_run(tmp_path / name, models=("teacher", "student"), efficiency=models, kd_alpha=alpha)
        metrics = json.loads((run / "metrics.json").read_text())
        metrics.setdefault("teacher", {})["test"] = {"at_0.5": {"average_precision_macro": score}}
        (run / "metrics.json").write_text(json.dumps(metrics))
        runs.append(run)
    both, one = (
        [point.name for point in collect_frontier(compare_runs(chosen, resamples=100)) if point.is_teacher]
        for chosen in (runs, runs[:1])
    )
    assert both == ["teacher of weak", "teacher of strong"] and one == ["teacher"]


def test_teacher_of_folds_stands_at_the_mean_of_its_folds(tmp_path):
    costs = {"parameters_total": 9, "latency_ms_batch1": 9}
    folds = [tmp_path / "run" / f"fold_{fold}" for fold in (1, 2)]
    for number, (fold, score) in enumerate(zip(folds, (0.7, 0.9), strict=True)):
        rows = np.arange(120) + 120 * number
        write_run(fold, models=("teacher", "student"), index=rows, efficiency={"teacher": costs, "student": costs})
        metrics = json.loads((fold / "metrics.json").read_text())
        metrics["teacher"]["test"] = {"at_0.5": {"average_precision_macro": score}}
        (fold / "metrics.json").write_text(json.dumps(metrics))
    points = collect_frontier(compare_runs(folds, group_by="fold", resamples=100))
    assert [(point.name, pytest.approx(point.value)) for point in points if point.is_teacher] == [("teacher", 0.8)]
