"""The small form of each benchmark; the suite's runs stay in this process where time matters more than memory."""

import contextlib
import importlib
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.builders import QUICK_EXTRAS, ROOT, build_model_folder, make_table, make_texts
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import research_main
from research_config import parse_arguments

sys.path.insert(0, str(ROOT / "benchmarks"))
NAMES = "common evidence fold_coverage labelling memory peers predicting profile_step quality reference_loop scale step"
common, evidence, fold_coverage, labelling, memory, peers, predicting, profile_step, quality, reference_loop, scale, step = map(
    importlib.import_module, NAMES.split()
)


@pytest.fixture(autouse=True)
def _threads_as_before(monkeypatch):
    """Give the environment and torch the numbers of threads back that a benchmark sets."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return the flags that name a small table and a tiny encoder."""
    folder = tmp_path_factory.mktemp("benchmarks")
    model = build_model_folder("bert", "unigram", folder / "model", make_texts(80), layers=4)
    table = make_table(folder / "comments.csv", rows=80)
    return ["--dataset", str(table), "--model", str(model), "--threads", "1", "--repeats", "1"]


@pytest.fixture
def in_process(monkeypatch):
    """Run the suite and the reference loop here instead of in processes of their own."""

    def run_here(command, log, threads):
        mains = {"research_main.py": research_main, "reference_loop.py": reference_loop, "quality.py": quality}
        main = mains[Path(command[1]).name].main
        stdout = io.StringIO()
        with contextlib.redirect_stdout(stdout):
            timing = common.timed(lambda: statuses.append(main(command[2:])))
        assert statuses.pop() == 0
        return common.Finished(timing, 1.0, stdout.getvalue())

    statuses: list[int] = []
    monkeypatch.setattr(common, "run_process", run_here)


def read_result(capsys):
    """Return the only line on stdout as JSON, after what every benchmark's line must hold."""
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    result = json.loads(lines[0])
    assert {"cpu", "cores", "threads", "load_at_start", "torch"} <= set(result["machine"])
    assert ("warning" in result["machine"]) == (result["machine"]["load_at_start"] > common.QUIET_LOAD)
    return result


def test_step_times_every_method_against_plain_fine_tuning(inputs, capsys):
    step.main([*inputs, "--steps", "2", "--student_layers", "2", "--evaluation_rows", "16"])
    result = read_result(capsys)
    timed = result["steps"]["2_layers"]
    methods = {"logit_cached", "hidden_cached", "attention_cached", "multi_level_cached", "logit_live", "multi_level_live"}
    methods |= {f"logit_{name}" for name in ("pearson", "pairwise", "annealed", "undone", "averaged")}
    for plain, other in (("plain", "plain_whole"), ("plain_whole", "plain")):
        ratios = timed[f"over_{plain}"]
        assert set(ratios) == methods | {other}
        for name, ratio in ratios.items():
            expected = timed["sides"][name]["median_wall_s"] / timed["sides"][plain]["median_wall_s"]
            assert ratio["wall"] == pytest.approx(expected, rel=0.01)
    padding = result["padded_over_real_tokens"]
    assert 1 <= padding["suite"] < padding["padded_to_max_length"]
    assert set(result["evaluation"]["over_suite"]) == {"padded_fused", "padded_eager"}
    assert result["tokenising"]["bytes"]["padded_int64"] == 80 * 128 * 16


def test_predicting_is_killed_and_leaves_the_same_bytes(inputs, capsys, tmp_path):
    encoder = inputs[inputs.index("--model") + 1]
    labels = {
        "problem_type": "multi_label_classification",
        "id2label": {0: "bully", 1: "spam"},
        "label2id": {"bully": 0, "spam": 1},
    }
    for part in (AutoModelForSequenceClassification.from_pretrained(encoder, **labels), AutoTokenizer.from_pretrained(encoder)):
        part.save_pretrained(tmp_path)
    assert predicting.main([*inputs, "--model_dir", str(tmp_path), "--rows", "300", "--kills", "2"]) == 0
    result = read_result(capsys)
    assert result["same_bytes"] and result["litter"] == [] and 0 < result["peak_mb_early"] <= result["peak_mb"]


def test_labelling_of_shards_that_is_killed_leaves_the_same_cache(inputs, capsys):
    assert labelling.main([*inputs, "--rows", "200", "--shards", "3", "--format", "csv", "--kills", "1"]) == 0
    result = read_result(capsys)
    assert result["same_bytes"] and result["cache_bytes_per_row"] > 0 and 0 < result["peak_mb_early"] <= result["peak_mb"]
    assert 0 < result["anonymous_mb_early"] <= result["anonymous_mb"] < result["peak_mb"]


def test_profile_names_what_a_step_spends_its_time_on(inputs, capsys):
    profile_step.main([*inputs, "--steps", "2", "--student_layers", "2", "--threads", "1"])
    *table, line = capsys.readouterr().out.splitlines()
    spent = json.loads(line)["milliseconds"]
    for of_dtype in spent.values():
        assert all(of_dtype[kind] > 0 for kind in ("matrix products", "optimizer", "norm of the gradient", "casts and copies"))
    assert len(table) == 2 + len(profile_step.KINDS) + 1 and table[0] == "| milliseconds of a step | float32 | bfloat16 |"


def test_every_side_of_step_trains_on_the_same_batches(inputs, tmp_path):
    arguments = common.parse_flags(common.build_parser(None, rows=80, repeats=1), inputs)
    arguments.steps = 2
    bench = step.Bench(arguments, tmp_path)
    plain, again = bench.build_training_loader(), bench.build_training_loader()
    for left, right in zip(plain, again, strict=True):
        assert torch.equal(left["row"], right["row"])
    assert bench.count_timed_rows() == sum(len(batch["row"]) for batch in list(plain)[1:])
    assert bench.planned_rows().tolist() == sorted({int(row) for batch in plain for row in batch["row"]})


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("method", ["logit", "multi_level"])
def test_reference_loop_compares_whole_runs(inputs, capsys, method):
    reference_loop.main([*inputs, "--rows", "60", "--student_layers", "2", "--kd_method", method])
    result = read_result(capsys)
    assert not result["extrapolated"]
    assert set(result["ratios_over_suite"]) == {"reference"}
    scores = result["test_macro_f1"]
    assert scores["suite_minus_reference_points"] == pytest.approx(100 * (scores["suite"] - scores["reference"]), abs=0.01)


@pytest.mark.usefixtures("in_process")
def test_a_fraction_of_the_reference_is_reported_as_extrapolated(inputs, capsys):
    reference_loop.main([*inputs, "--rows", "60", "--student_layers", "2", "--epochs", "2", "--reference_fraction", "0.5"])
    result = read_result(capsys)
    assert result["extrapolated"]
    assert result["sides"]["reference"]["extrapolated"]
    taken, total = result["sides"]["reference"]["measured"]["steps"]
    assert taken < total
    assert result["test_macro_f1"]["reference"] is None


@pytest.mark.usefixtures("in_process")
def test_a_sweep_counts_every_run_of_the_grid(inputs, tmp_path, monkeypatch):
    arguments = common.parse_flags(common.build_parser(None, rows=60, repeats=1), inputs)
    settings = {
        "reference_fraction": 0.5, "teacher_checkpoint": tmp_path, "alphas": [0.3, 0.5], "temperatures": [2.0, 4.0],
        "student_layers": 2, "kd_method": "logit", "lr": 1e-4, "reference_dtype": "float32",
        "pooling": "cls", "data_fraction": 1.0,
    }  # fmt: skip
    for name, value in settings.items():
        setattr(arguments, name, value)
    comparison = reference_loop.Comparison(arguments, tmp_path)
    outcome = reference_loop.Outcome(common.Timing(3.0, 2.0), None, {})
    monkeypatch.setattr(comparison, "run_reference", lambda flags, threads: outcome)
    assert comparison.reference_in_turn() == common.Timing(4 * 3.0, 4 * 2.0)
    arguments.threads = 2
    assert comparison.reference_side_by_side() == common.Timing(2 * 3.0, 4 * 2.0)


@pytest.fixture
def reference_config(inputs, tmp_path):
    """Return the flags of a short run of the reference, every step of which can be repeated: no dropout."""
    table, model = Path(inputs[1]), Path(inputs[3])
    teacher = common.save_teacher(model, common.read_labels(table), tmp_path / "teacher")
    flags = ["--dataset_path", table, "--teacher_checkpoint", teacher, "--student_path", model, "--student_layers", 2]
    flags += ["--epochs", 2, "--batch", 20, "--lr", 1e-3, "--no-amp", "--device", "cpu", "--seed", 3]
    return parse_arguments([str(flag) for flag in flags]).config


def test_the_frugal_reference_ends_with_the_weights_of_the_reference(reference_config):
    scores, weights = [], []
    for side in (reference_loop.ReferenceLoop, quality.FrugalReference):
        loop = side(reference_config)
        for module in loop.student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        start = {name: tensor.clone() for name, tensor in loop.student.state_dict().items()}
        scores.append([loop.run()[name] for name in quality.SCORES.values()])
        weights.append({name: tensor - start[name] for name, tensor in loop.student.state_dict().items()})
    assert scores[0] == scores[1]
    largest_change = max(change.abs().max() for change in weights[0].values())
    assert largest_change > 1e-3
    for name, change in weights[0].items():
        torch.testing.assert_close(weights[1][name], change, rtol=0, atol=0.01 * float(largest_change), msg=name)


@pytest.mark.usefixtures("in_process")
def test_quality_pairs_both_sides_by_seed_and_keeps_what_is_done(inputs, capsys, tmp_path, monkeypatch):
    flags = [*inputs, "--seeds", "2", "--teacher_epochs", "1", "--student_layers", "2", "--keep", str(tmp_path)]
    quality.main(flags)
    result = read_result(capsys)
    for name in ("macro_f1", "average_precision_macro"):
        of_score = result["test_scores_at_0.5"][name]
        means = [sum(of_score["points"][side]) / 2 for side in ("suite", "reference")]
        assert of_score["suite_minus_reference"] == pytest.approx(means[0] - means[1], abs=0.01)
        low, high = of_score["interval_95"]
        assert low <= of_score["suite_minus_reference"] <= high
    monkeypatch.setattr(quality, "run_as_reference", lambda argv: pytest.fail("a finished seed was run again"))
    quality.main(flags)
    assert read_result(capsys)["test_scores_at_0.5"] == result["test_scores_at_0.5"]


def test_the_interval_of_paired_differences_is_that_of_students_t():
    compared = quality.compare_scores([0.5, 0.52, 0.54], [0.5, 0.51, 0.52])
    # Differences of 0, 1 and 2 points: mean 1, standard error 1 / sqrt(3), 4.3027 the 97.5 % point for 2 degrees.
    assert compared["suite_minus_reference"] == 1.0
    assert compared["interval_95"] == pytest.approx([1 - 4.3027 / 3**0.5, 1 + 4.3027 / 3**0.5], abs=0.01)


def test_extrapolation_scales_steps_and_evaluation_but_not_the_start():
    report = {
        "steps": [10, 100], "evaluation_rows": [5, 50],
        "training": {"wall_s": 2.0, "cpu_s": 4.0}, "evaluation": {"wall_s": 1.0, "cpu_s": 1.0},
    }  # fmt: skip
    whole = reference_loop.complete(common.Timing(8.0, 10.0), report)
    assert whole == common.Timing(5.0 + 20.0 + 10.0, 5.0 + 40.0 + 10.0)
    assert reference_loop.complete(common.Timing(8.0, 10.0), {"macro_f1": 0.5}) == common.Timing(8.0, 10.0)


def test_memory_reports_the_peak_of_a_process_of_its_own(inputs, capsys):
    memory.main([*inputs, "--sizes", "60", "--train_rows", "40"])
    result = read_result(capsys)
    assert result["runs"][0]["peak_rss_mb"] > 50
    assert result["peak_ratio"] == 1.0


@pytest.mark.usefixtures("in_process")
def test_scale_fits_an_exponent_to_each_series(inputs, capsys):
    flags = ["--row_counts", "40", "80", "--lengths", "--layer_counts", "--base_layers", "1", "--base_length", "16"]
    scale.main([*inputs, *flags])
    series = read_result(capsys)["rows"]
    assert series["sizes"] == [40, 80]
    expected = scale.growth_exponent([40, 80], series["whole_run_s"])
    assert series["whole_run_exponent"] == pytest.approx(expected, abs=0.01)


def test_quadratic_growth_has_exponent_two():
    assert scale.growth_exponent([1, 2, 4], [0.5, 2.0, 8.0]) == 2.0


@pytest.mark.skipif(
    not (peers.DEFAULT_ENVIRONMENT / "bin" / "python").is_file(),
    reason="the peers are not installed: python benchmarks/peers.py --install cache/peers",
)
def test_peers_take_as_many_steps_as_the_suite(inputs, capfd):
    assert peers.main([*inputs, "--steps", "2", "--student_layers", "2"]) == 0
    result = read_result(capfd)
    assert set(result["over_suite"]) == {
        "textbrewer_live/suite_live", "textbrewer_cached/suite_cached", "trainer_live/suite_live",
    }  # fmt: skip


@pytest.mark.parametrize("module", [step, reference_loop, memory, scale], ids=lambda module: module.__name__)
@pytest.mark.parametrize(("flag", "missing"), [("--dataset", "no.csv"), ("--model", "no_model")])
def test_a_missing_input_is_one_line_and_status_two(inputs, capsys, module, flag, missing):
    with pytest.raises(SystemExit) as stopped:
        module.main([*inputs, flag, missing])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {flag}")
    assert message.count("\n") == 1


def test_a_repeated_row_has_a_text_of_its_own(tmp_path):
    table = make_table(tmp_path / "short.csv", rows=5)
    longer = common.write_table(table, tmp_path / "long.csv", 12)
    texts = [row[0] for _, row in zip(range(12), (cells for _, cells in common.cycle_rows(longer)), strict=False)]
    assert len(set(texts)) == 12


def test_texts_are_stretched_to_the_length_asked_for(tmp_path):
    table = make_table(tmp_path / "short.csv", rows=5)
    stretched = common.write_table(table, tmp_path / "long.csv", 5, tokens_at_least=40)
    rows = [row for _, (_, row) in zip(range(5), common.cycle_rows(stretched), strict=False)]
    assert all(len(row[0].split()) >= 40 for row in rows)


def test_sides_are_measured_in_turn():
    order: list[str] = []

    def build(name):
        def measure():
            order.append(name)
            return common.Timing(2.0 if name == "a" else 1.0, 1.0)

        return measure

    timings = common.interleave({"a": build("a"), "b": build("b")}, repeats=3)
    assert order == ["a", "b"] * 3
    assert common.compare(timings["a"], timings["b"])["wall"] == 2.0


def test_evidence_runs_every_recipe_over_seeds_and_folds_and_prints_them_again(inputs, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, table, _, model, *_ = inputs
    flags = (
        "--lr 1e-3 --teacher_epochs 1 --epochs 1 --max_length 32 --student_layers 2 --student_hidden_size 8 --pooling mean "
        "--num_threads 1 --num_folds 2 --with_control --allow_weak_teacher"
    )

    monkeypatch.setattr(evidence, "run_process", lambda command: research_main.main(command[2:], QUICK_EXTRAS))
    call = ["--dataset", table, "--text_column", "text", "--teacher", model, "--student", model, "--flags", flags]
    call += ["--output_dir", "out", "--cache_dir", "cache", "--seeds", "1,2", "--jobs", "1", "--resamples", "200"]
    assert evidence.main([*call, "--recipe", "hot", "--kd_temperature 8 --no-with_control"]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert list(result["commands"]) == ["tfidf", "distilled", "hot"]
    rows = {row["run"]: row for row in result["rows"] if row["metric"] == "f1_macro"}
    assert len(rows) == 4  # three recipes and the control
    assert {row["over"] for row in rows.values() if row["difference"] is not None} == {"seeds and rows"}
    table_lines = [line for line in lines if line.startswith("|")]
    assert sum(line.startswith("| teacher of ") for line in table_lines) == 1  # shared by both recipes
    assert evidence.main(["--from", "out", "--resamples", "200"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")] == table_lines


def test_evidence_of_nothing_finished_is_one_line(capsys, tmp_path):
    assert evidence.main(["--from", str(tmp_path)]) == 2
    assert "evidence.py: " in capsys.readouterr().err


def test_folds_are_simulated_with_a_twin_that_differs_by_nothing(tmp_path):
    rng = np.random.default_rng(0)
    features = np.hstack([rng.standard_normal((2400, fold_coverage.COMPONENTS)), np.ones((2400, 1))]).astype(np.float32)
    labels = (features[:, :3] + rng.standard_normal((2400, 3)) > 0).astype(float)
    scores = fold_coverage.simulate(fold_coverage.Table(features, labels), 2, 300, 3, 100, rng)
    for of_recipe in scores.values():
        truth = {recipe: true for recipe, (_, true) in of_recipe.items()}
        scored = of_recipe["distilled"][0]
        assert abs(truth["twin"] - truth["distilled"]) < 0.05
        assert (scored.plain.shape, scored.resampled.shape, len(scored.folds)) == ((2,), (2, 100), 3)
        gap = scored - of_recipe["twin"][0]
        found = fold_coverage.intervals(gap, 300, is_score=False)
        assert set(found) == set(fold_coverage.WAYS)
        assert all(low < gap.mean < high for low, high in found.values())
