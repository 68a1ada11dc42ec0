"""What distillation gained: the figures, the sentence that says so, and the control a run trains beside its student."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from support.builders import QUICK_EXTRAS, build_model_folder, make_table, make_texts
from support.comparison_runs import LABELS, make_probs, make_truth

import research_main
from research.compare.rows import gather_rows
from research.errors import FlagErrors, InputError
from research.evaluation.bootstrap import bootstrap, build_metric
from research.evaluation.gain import (
    KEPT_SHARE,
    AnsweredPart,
    describe_gain,
    describe_keeping,
    measure_gain,
    measure_keeping,
    resample_models,
)
from research.evaluation.metrics import count_confusions, most_disagreeing
from research.experiment import student_stage
from research.experiment.saving import fetch_texts
from research.kd.loop import EpochLoop
from research.logs import PhaseProgress
from research.report.run_page import write_report
from research.runs.directory import RunDirectory
from research.runs.folds import aggregate_folds
from research.runs.run import load_run
from research_config import parse_arguments

THRESHOLDS = {model: [0.5] * len(LABELS) for model in ("teacher", "control", "student")}
QUICK = (
    "--teacher_path models/teacher --student_path models/student --lr 1e-3 --teacher_epochs 1 --epochs 2 --batch 16 "
    "--max_length 32 --student_hidden_size 8 --allow_weak_teacher --num_threads 1"
)


def make_gains(*moves: int) -> dict[str, dict[str, float]]:
    """Return gains that rose (1), fell (-1) or stayed (0), in the order of GAIN_METRICS."""
    intervals = {1: (0.01, 0.03), 0: (-0.01, 0.02), -1: (-0.03, -0.01)}
    metrics = ("f1_macro", "f1_macro_tuned", "average_precision_macro")
    return {metric: dict(zip(("low", "high"), intervals[move], strict=True)) for metric, move in zip(metrics, moves, strict=True)}


def gains_of(truth: Any, probs: Any, thresholds: Any, resamples: int = 2000) -> dict[str, dict[str, float | None]]:
    rows = np.arange(len(truth))
    return measure_gain(resample_models([AnsweredPart(truth, probs, thresholds, rows)], resamples), len(truth))


def test_gain_is_the_paired_difference_of_the_statistics_room() -> None:
    truth = make_truth()
    probs = {model: make_probs(truth, skill, seed=1) for model, skill in (("teacher", 4.0), ("control", 2.0), ("student", 3.0))}
    gain: Any = gains_of(truth, probs, THRESHOLDS)["average_precision_macro"]
    metrics = [build_metric("average_precision_macro", truth, probs[model]) for model in ("student", "control")]
    student, control = bootstrap(metrics, len(truth))
    value = float(np.ptp([metric(np.ones((len(truth), 1)))[0] for metric in metrics]))
    assert gain["gain"] == pytest.approx(value) == gain["student"] - gain["control"]
    reach = 1.98 * (student - control).std(ddof=1)  # Student's t of 119 degrees of freedom
    assert (gain["low"], gain["high"]) == pytest.approx((value - reach, value + reach), rel=1e-3)
    assert gain["gap_closed"] == pytest.approx(value / (gain["teacher"] - gain["control"]))
    assert 0 < gain["gap_closed"] < 1


def test_what_is_kept_of_the_teacher_is_tested_for_every_measure() -> None:
    truth = make_truth(600)
    probs = {model: make_probs(truth, skill, seed=1) for model, skill in (("teacher", 2.0), ("student", 3.0))}
    scores = resample_models([AnsweredPart(truth, probs, THRESHOLDS, np.arange(600))], 500)
    kept = measure_keeping(scores, 600, 600)
    assert kept.pop("share") == KEPT_SHARE
    assert set(kept) == {"f1_macro", "f1_macro_tuned", "average_precision_macro"}
    assert all(found["kept"] and found["bound"] > 0 for found in kept.values())
    reverse = measure_keeping(
        {metric: {"student": of["teacher"], "teacher": of["student"]} for metric, of in scores.items()}, 600, 600
    )
    assert not any(found["kept"] for name, found in reverse.items() if name != "share")


def test_the_report_s_sentence_on_what_is_kept_names_measures_bounds_and_rows() -> None:
    tests = {
        "f1_macro": (True, 0.0012, 2150),
        "f1_macro_tuned": (False, -0.01, 9000),
        "average_precision_macro": (False, None, None),
    }
    kept = {name: {"kept": kept, "bound": bound, "rows_needed": rows} for name, (kept, bound, rows) in tests.items()}
    sentence = describe_keeping({"share": 0.99, **kept})
    assert "At least 99 %".lower() in sentence and "for macro-F1 at 0.5 (" in sentence
    assert "macro-F1 at 0.5 +0.0012, macro-F1 at tuned thresholds -0.0100, mean average precision unknown" in sentence
    rows = "2,150 (macro-F1 at 0.5), 9,000 (macro-F1 at tuned thresholds), no number (mean average precision)"
    assert rows in sentence


def test_equal_students_are_rarely_called_different() -> None:
    """The answers of two students are swapped text by text, by a coin, so over all texts neither is better."""
    rng = np.random.default_rng(0)
    claims = []
    for _ in range(300):
        truth = make_truth(300, int(rng.integers(2**31)))
        answers = [make_probs(truth, 2.0, int(rng.integers(2**31))) for _ in range(2)]
        heads = rng.random((300, 1)) < 0.5
        probs = {"student": np.where(heads, *answers), "control": np.where(heads, *reversed(answers)), "teacher": answers[0]}
        sentence = describe_gain(gains_of(truth, probs, THRESHOLDS, 150))
        claims.append("no measurable difference" not in sentence)
    assert np.mean(claims) <= 0.075  # 5 % of 300 has a standard error of 1.3 %


def test_a_teacher_below_the_control_leaves_no_gap() -> None:
    truth = make_truth()
    probs = {model: make_probs(truth, skill, seed=1) for model, skill in (("teacher", 1.0), ("control", 3.0), ("student", 3.0))}
    assert {gain["gap_closed"] for gain in gains_of(truth, probs, THRESHOLDS).values()} == {None}


def test_a_shift_of_scores_gains_at_half_and_nowhere_else() -> None:
    """The case the three measures are for: the control ranks as well as the student but is off 0.5."""
    truth = make_truth(600)
    student = make_probs(truth, 3.0, seed=1)
    control = student**6  # the same ranking
    tuned = {"teacher": [0.5] * 3, "student": [0.5] * 3, "control": [0.5**6] * 3}
    gains = gains_of(truth, {"teacher": student, "student": student, "control": control}, tuned)
    assert gains["f1_macro"]["low"] > 0  # type: ignore[operator]
    assert gains["f1_macro_tuned"]["gain"] == pytest.approx(0)
    assert gains["average_precision_macro"]["gain"] == pytest.approx(0, abs=1e-3)
    sentence = describe_gain(gains)
    assert "macro-F1 at 0.5 rose but macro-F1 at tuned thresholds and mean average precision did not" in sentence
    assert "a matter of thresholds" in sentence


@pytest.mark.parametrize(
    ("moves", "words"),
    [
        ((1, 1, 1), "All three rose: with this seed, the distilled student is the better one"),
        ((-1, -1, -1), "the distilled student is the worse one"),
        ((0, 0, 0), "no measurable difference"),
        ((1, 1, 0), "tuned thresholds rose but mean average precision did not change measurably: the decisions improved"),
        ((0, 0, 1), "mean average precision rose but macro-F1 at 0.5 and macro-F1 at tuned thresholds did not"),
        ((1, 0, -1), "macro-F1 at 0.5 rose, mean average precision fell but macro-F1 at tuned thresholds did not"),
        ((-1, 0, 0), "the loss at 0.5 is a matter of thresholds"),
    ],
)
def test_the_verdict_names_every_disagreement(moves: tuple[int, ...], words: str) -> None:
    assert words in describe_gain(make_gains(*moves))


def test_confusions_leave_unknown_cells_out() -> None:
    labels = np.array([[1, 0], [1, np.nan], [0, 1], [0, 0]], dtype=float)
    probs = np.array([[0.9, 0.9], [0.4, 0.9], [0.6, 0.2], [0.1, 0.1]])
    assert count_confusions(labels, probs, np.array([0.5, 0.3])).tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]


def test_rows_that_disagree_most_come_first() -> None:
    teacher, student = np.array([[0.1, 0.1], [0.9, 0.9], [0.5, 0.5]]), np.array([[0.1, 0.2], [0.1, 0.1], [0.5, 0.6]])
    assert most_disagreeing(teacher, student, 2).tolist() == [1, 0]


def test_with_control_needs_a_student_that_is_distilled() -> None:
    with pytest.raises(FlagErrors, match="--with_control: needs --pipeline kd_only"):
        parse_arguments(["--with_control", "--pipeline", "student_only", "--demo"])


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a table, two tiny models and a shared cache, in which commands are run."""
    folder = tmp_path_factory.mktemp("control")
    texts = make_texts(80)
    make_table(folder / "data" / "comments.csv", rows=80)
    build_model_folder("electra", "wordpiece", folder / "models" / "teacher", texts, layers=2, width=24, seed=1)
    build_model_folder("distilbert", "unigram", folder / "models" / "student", texts, layers=2, width=16, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def controlled(lab: Path) -> Path:
    """A finished kd_only run with its control."""
    assert research_main.main(f"{QUICK} --with_control --output_dir results/with".split(), QUICK_EXTRAS) == 0
    return lab / "results" / "with"


def test_the_control_is_the_student_only_run(lab: Path, controlled: Path) -> None:
    assert research_main.main(f"{QUICK} --pipeline student_only --output_dir results/alone".split(), QUICK_EXTRAS) == 0
    run, alone = load_run(controlled), load_run(lab / "results" / "alone")
    np.testing.assert_array_equal(run.predictions.probs["control"], alone.predictions.probs["student"])
    assert run.metrics["control"]["test"]["tuned"] == alone.metrics["student"]["test"]["tuned"]
    assert (controlled / "history_control.csv").read_bytes() == (alone.path / "history.csv").read_bytes()


def test_the_control_leaves_the_student_as_it_is(lab: Path, controlled: Path) -> None:
    assert research_main.main(f"{QUICK} --output_dir results/without".split(), QUICK_EXTRAS) == 0
    without = load_run(lab / "results" / "without")
    np.testing.assert_array_equal(load_run(controlled).predictions.probs["student"], without.predictions.probs["student"])
    assert "kd_gain" not in without.metrics and "control" not in without.metrics
    assert "--with_control" in (without.path / "report.md").read_text(encoding="utf-8")


def test_metrics_hold_gain_calibration_and_soft_excess(controlled: Path) -> None:
    metrics = json.loads((controlled / "metrics.json").read_text(encoding="utf-8"))
    assert set(metrics["kd_gain"]) == {"f1_macro", "f1_macro_tuned", "average_precision_macro"}
    for model in ("teacher", "control", "student"):
        for part in ("validation", "test"):
            assert metrics[model][part]["calibration"]["temperature"] > 0
    for model in ("control", "student"):
        assert 0 < metrics[model]["test"]["soft_excess"] < metrics[model]["test"]["soft_loss"]
    assert "soft_loss" not in metrics["teacher"]["test"]
    assert set(metrics["kept"]) == {"share", "f1_macro", "f1_macro_tuned", "average_precision_macro"}
    assert metrics["kd_gain"]["f1_macro"]["student"] == pytest.approx(metrics["student"]["test"]["at_0.5"]["f1_macro"], abs=1e-6)


def test_report_opens_with_the_scores_and_the_gain(controlled: Path) -> None:
    for name in ("report.md", "report.html"):
        text = (controlled / name).read_text(encoding="utf-8").replace("\u00a0", " ")  # "99 %" is kept on one line
        places = ("Macro-F1 of the student", "Student minus control", "Distillation (logit) changed macro-F1", "KD gain")
        opening = [text.index(words) for words in places]
        assert opening == sorted(opening)
        assert "That at least 99 % of the teacher" in text
    assert not (controlled / "checkpoint_control").exists()


@pytest.mark.parametrize(
    ("student", "words"),
    [
        (0.75, "50 % in macro-F1 at tuned thresholds, 50 % in mean average precision of the gap to the teacher"),
        (0.65, "it widened the gap to the teacher by 50 % in macro-F1 at 0.5"),
    ],
)
def test_report_of_folds_has_means_and_no_interval(tmp_path: Path, student: float, words: str) -> None:
    metrics: dict[str, Any] = {"labels": list(LABELS), "rows": {"test": 10}}
    metrics["headline"] = {"model": "student", "part": "test", "metric": "f1_macro", "value": student}
    gain = {"teacher": 0.8, "control": 0.7, "student": student, "gain": student - 0.7, "low": -1.0, "high": 1.0, "p_holm": 0.5}
    metrics["kd_gain"] = {metric: gain | {"gap_closed": 0.5} for metric in make_gains(0, 0, 0)}
    with RunDirectory(tmp_path / "run") as run:
        run.claim({"pipeline": "kd_only", "kd_method": "logit", "num_folds": 2})
        for number in (1, 2):
            with RunDirectory(run.path / f"fold_{number}") as fold:
                fold.claim({"pipeline": "kd_only"})
                fold.write_metrics(metrics)
        write_report(run.path, aggregate_folds([metrics, metrics]))
    report = (run.path / "report.md").read_text(encoding="utf-8")
    assert words in report and "± 0.0000" in report
    assert "95 % interval" not in report and "measurable" not in report and "-0.0000" not in report


def test_page_holds_the_texts_that_the_models_disagree_on(lab: Path, controlled: Path) -> None:
    page = (controlled / "report.html").read_text(encoding="utf-8")
    lines = (lab / "data" / "comments.csv").read_text(encoding="utf-8-sig").splitlines()[1:]
    shown = [part.split("</p>")[0] for part in page.split('<p dir="auto">')[1:]]
    assert len(shown) == len(load_run(controlled).predictions.index)
    assert all(any(text in line for line in lines) for text in shown)
    assert shown[0] not in (controlled / "report.md").read_text(encoding="utf-8")


def test_a_table_that_changed_meanwhile_costs_the_texts_alone(caplog: pytest.LogCaptureFixture) -> None:
    def changed(_rows: Any) -> Any:
        raise InputError("data/comments.csv no longer holds what it held")

    comments = SimpleNamespace(find_source_rows=lambda rows: rows, read_texts=changed)
    inputs: Any = SimpleNamespace(split=SimpleNamespace(test=np.array([0, 2])), comments=comments)
    assert fetch_texts([2], inputs) == {}
    assert "report.html goes without texts: data/comments.csv" in caplog.text


@pytest.mark.parametrize("epochs_before", [1, 3])
def test_a_run_stopped_in_either_training_resumes_both(
    lab: Path, controlled: Path, monkeypatch: pytest.MonkeyPatch, epochs_before: int
) -> None:
    """Of the four epochs, two are the student's and two the control's; none is trained twice."""
    command = f"{QUICK} --with_control --output_dir results/stopped_{epochs_before}".split()
    train_epoch = EpochLoop._train_epoch
    epochs = iter(range(1, 100))
    trained = []

    def train_or_stop(loop: EpochLoop, steps: PhaseProgress) -> None:
        if next(epochs) == epochs_before + 1:
            raise KeyboardInterrupt
        train_epoch(loop, steps)
        trained.append(loop)

    monkeypatch.setattr(EpochLoop, "_train_epoch", train_or_stop)
    assert research_main.main(command, QUICK_EXTRAS) == 130
    assert research_main.main(command, QUICK_EXTRAS) == 0
    assert len(trained) == 4
    for name in ("metrics.json", "predictions.csv", "history.csv", "history_control.csv"):
        assert (lab / "results" / f"stopped_{epochs_before}" / name).read_bytes() == (controlled / name).read_bytes(), name


@pytest.mark.parametrize(
    ("flags", "words"),
    [("", "set --with_control too"), ("--with_control", "set --unlabelled_path too")],
)
def test_pseudo_labels_need_a_control_and_rows_to_label(flags: str, words: str) -> None:
    with pytest.raises(FlagErrors, match=f"--control_labels: .*; {words}"):
        parse_arguments(["--control_labels", "pseudo", "--demo", *flags.split()])


def test_pseudo_labels_are_the_teachers_decisions_at_its_tuned_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rows 0 to 3 are validation, 4 and 5 training, 6 and 7 unlabelled; the best cut for F1 lies between -1 and -2.
    labels = np.array([[1], [1], [0], [0], [1], [0], [np.nan], [np.nan]], dtype=np.float32)
    logits = np.array([[2], [-1], [-2], [-3], [0], [0], [-1.2], [-1.9]], dtype=np.float32)
    monkeypatch.setattr(student_stage, "ask_teachers", lambda _teachers, rows, _context: {"teacher": logits[rows]})
    split = SimpleNamespace(train=np.array([4, 5]), validation=np.arange(4), unlabelled=np.array([6, 7]))
    context: Any = SimpleNamespace(inputs=SimpleNamespace(comments=SimpleNamespace(labels=labels), split=split))
    found = student_stage.pseudo_label(cast(Any, None), np.array([4, 5, 6, 7]), context)
    assert found[:, 0].tolist() == [1, 1, 0, 0, 1, 0, 1, 0]
    assert np.isnan(labels[6:]).all()


def test_a_control_with_pseudo_labels_takes_as_many_steps_as_the_student(lab: Path) -> None:
    make_table(lab / "data" / "more.csv", rows=30, seed=5)
    texts = (lab / "data" / "more.csv").read_text(encoding="utf-8").splitlines()
    (lab / "data" / "more.csv").write_text("\n".join(line.split(",")[0] for line in texts) + "\n", encoding="utf-8")
    command = f"{QUICK} --with_control --unlabelled_path data/more.csv --output_dir results/"
    assert research_main.main(f"{command}gold".split(), QUICK_EXTRAS) == 0
    assert research_main.main(f"{command}pseudo --control_labels pseudo".split(), QUICK_EXTRAS) == 0
    gold, pseudo = (load_run(lab / "results" / name) for name in ("gold", "pseudo"))
    steps: list[Any] = [history[-1]["global_step"] for history in (gold.control_history, pseudo.control_history, pseudo.history)]
    assert steps[0] < steps[1] == steps[2]
    np.testing.assert_array_equal(gold.predictions.probs["student"], pseudo.predictions.probs["student"])
    assert not np.array_equal(gold.predictions.probs["control"], pseudo.predictions.probs["control"])
    assert "the teacher's decisions on unlabelled rows" in (pseudo.path / "report.md").read_text(encoding="utf-8")
    names = [row.name for row in gather_rows([gold.path, pseudo.path], None, "test", None, "seed")[0]]
    assert "gold (control)" in names and "pseudo (control, pseudo-labels)" in names
