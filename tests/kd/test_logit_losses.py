"""The rank loss, annealing and undone class weights against NumPy in float64, values and gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from research.errors import FlagErrors
from research.evaluation.calibration import sigmoid
from research.kd.layers import LayerOutputs
from research.kd.losses import SMALLEST_SPREAD, MultiLabelDistillationLoss, rank_loss
from research.kd.objective import DistillationObjective
from research.kd.targets import Targets
from research.models.classifiers import ModelShape
from research_config import ExperimentConfig, parse_arguments

Array = NDArray[np.float64]
GENERATOR = np.random.default_rng(3)
BATCH, LABELS = 7, 4
STUDENT, TEACHER = GENERATOR.normal(0, 2, (2, BATCH, LABELS))
TRUTH = GENERATOR.integers(0, 2, (BATCH, LABELS)).astype(np.float64)
UNKNOWN = np.where(GENERATOR.random((BATCH, LABELS)) < 0.3, np.nan, TRUTH)
WEIGHTS = GENERATOR.uniform(0.5, 4, LABELS)
SHAPE = ModelShape(2, 16, 2, 50)


def tensor(array: Array) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float32)


def pearson_numpy(student: Array, teacher: Array = TEACHER) -> float:
    told = teacher.std(axis=0) > SMALLEST_SPREAD
    return float(np.mean([1 - np.corrcoef(student[:, c], teacher[:, c])[0, 1] for c in np.flatnonzero(told)]))


def pairwise_numpy(student: Array, teacher: Array = TEACHER) -> float:
    """The formula of its docstring, pair by pair."""
    probs, of_labels = 1 / (1 + np.exp(-teacher)), []
    for c in np.flatnonzero(teacher.std(axis=0) > SMALLEST_SPREAD):
        total = weight = 0.0
        for i in range(len(student)):
            for j in range(i):
                gap = probs[i, c] - probs[j, c]
                total += abs(gap) * np.log1p(np.exp(-np.sign(gap) * (student[i, c] - student[j, c])))
                weight += abs(gap)
        of_labels.append(total / weight)
    return float(np.mean(of_labels))


def annealed_numpy(student: Array, share: float, alpha: float, temperature: float) -> float:
    def cross_entropy(target: Array, logits: Array) -> Array:
        return np.logaddexp(0, logits) - target * logits

    known = ~np.isnan(UNKNOWN)
    truth = np.nan_to_num(UNKNOWN)
    hard = np.where(truth == 1, WEIGHTS, 1.0) * cross_entropy(truth, student)
    soft = temperature**2 * cross_entropy(sigmoid(TEACHER / temperature), student / temperature)
    taught = np.where(known, (1 - share) * soft + share * hard, soft)
    return float(alpha * taught.mean() + (1 - alpha) * hard[known].mean())


def check_gradient(loss: Callable[[torch.Tensor], torch.Tensor], reference: Callable[[Array], float]) -> None:
    """Compare a loss and its gradient at STUDENT with a reference and the reference's central differences."""
    student = tensor(STUDENT).requires_grad_()
    value = loss(student)
    value.backward()
    assert value.item() == pytest.approx(reference(STUDENT), rel=1e-5)
    numeric = np.zeros_like(STUDENT)
    for cell in np.ndindex(*STUDENT.shape):
        step = np.zeros_like(STUDENT)
        step[cell] = 1e-5
        numeric[cell] = (reference(STUDENT + step) - reference(STUDENT - step)) / 2e-5
    assert student.grad is not None and np.abs(numeric).max() > 0.01
    np.testing.assert_allclose(student.grad.numpy(), numeric, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("objective", "reference"), [("pearson", pearson_numpy), ("pairwise", pairwise_numpy)])
def test_rank_loss_and_its_gradient_equal_numpy(objective: str, reference: Callable[[Array], float]) -> None:
    check_gradient(lambda student: rank_loss(student, tensor(TEACHER), objective), reference)


@pytest.mark.parametrize(("objective", "reference"), [("pearson", pearson_numpy), ("pairwise", pairwise_numpy)])
def test_label_of_which_the_teacher_says_one_thing_is_left_out(
    objective: str, reference: Callable[[Array, Array], float]
) -> None:
    teacher = TEACHER.copy()
    teacher[:, 1] = 0.7 + GENERATOR.normal(0, SMALLEST_SPREAD / 10, BATCH)
    student = tensor(STUDENT).requires_grad_()
    loss = rank_loss(student, tensor(teacher), objective)
    loss.backward()
    assert loss.item() == pytest.approx(reference(STUDENT, teacher), rel=1e-5)
    assert student.grad is not None
    assert not student.grad[:, 1].any() and student.grad[:, 0].any()


@pytest.mark.parametrize("objective", ["pearson", "pairwise"])
def test_one_text_or_a_student_without_an_order_gives_finite_gradients(objective: str) -> None:
    alone = tensor(STUDENT[:1]).requires_grad_()
    loss = rank_loss(alone, tensor(TEACHER[:1]), objective)
    loss.backward()
    assert loss.item() == 0 and alone.grad is not None and not alone.grad.any()
    constant = torch.zeros(BATCH, LABELS, requires_grad=True)
    rank_loss(constant, tensor(TEACHER), objective).backward()
    assert constant.grad is not None and torch.isfinite(constant.grad).all() and constant.grad.any()


def test_correlation_ignores_shift_and_scale_and_pairs_ignore_the_shift() -> None:
    teacher = tensor(TEACHER)
    assert rank_loss(0.1 * teacher - 3, teacher, "pearson").item() == pytest.approx(0, abs=1e-6)
    assert rank_loss(-teacher, teacher, "pearson").item() == pytest.approx(2, rel=1e-6)
    student = tensor(STUDENT)
    assert rank_loss(student + 3, teacher, "pairwise").item() == pytest.approx(rank_loss(student, teacher, "pairwise").item())


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("alpha", "temperature"), [(0.7, 4.0), (1.0, 1.0)])
def test_annealed_loss_and_its_gradient_equal_numpy(share: float, alpha: float, temperature: float) -> None:
    criterion = MultiLabelDistillationLoss(alpha, temperature)
    check_gradient(
        lambda student: criterion(student, tensor(TEACHER), tensor(UNKNOWN), tensor(WEIGHTS), share)["total_loss"],
        lambda student: annealed_numpy(student, share, alpha, temperature),
    )


def test_annealing_at_alpha_one_is_the_cross_entropy_with_the_mixed_target() -> None:
    """The form of its source; where the label is unknown the target is the teacher's probability."""
    share = 0.4
    losses = MultiLabelDistillationLoss(1.0, 1.0)(tensor(STUDENT), tensor(TEACHER), tensor(UNKNOWN), None, share)
    probs = sigmoid(TEACHER)
    target = np.where(np.isnan(UNKNOWN), probs, share * UNKNOWN + (1 - share) * probs)
    expected = (np.logaddexp(0, STUDENT) - target * STUDENT).mean()
    assert losses["total_loss"].item() == pytest.approx(expected, rel=1e-6)


def test_annealing_moves_the_total_and_neither_part() -> None:
    criterion = MultiLabelDistillationLoss(0.7)
    plain, annealed = (criterion(tensor(STUDENT), tensor(TEACHER), tensor(TRUTH), None, share) for share in (0.0, 0.5))
    assert annealed["total_loss"] != plain["total_loss"]
    assert all(torch.equal(annealed[name], plain[name]) for name in ("soft_loss", "hard_loss"))


def losses_of(config: ExperimentConfig, progress: float = 0.0, truth: Array = TRUTH) -> dict[str, torch.Tensor]:
    objective = DistillationObjective(config, SHAPE, SHAPE)
    objective.progress = progress
    batch: Any = {"labels": tensor(truth)}
    return objective(tensor(STUDENT), LayerOutputs(), Targets(tensor(TEACHER)), batch, tensor(WEIGHTS))


@pytest.mark.parametrize(("objective", "reference"), [("pearson", pearson_numpy), ("pairwise", pairwise_numpy)])
def test_rank_loss_joins_the_total_with_its_weight(objective: str, reference: Callable[[Array], float]) -> None:
    plain = losses_of(ExperimentConfig())
    ranked = losses_of(ExperimentConfig(rank_loss_weight=0.4, rank_objective=objective))
    assert "rank_loss" not in plain
    assert ranked["rank_loss"].item() == pytest.approx(reference(STUDENT), rel=1e-5)
    assert ranked["total_loss"].item() == pytest.approx(plain["total_loss"].item() + 0.4 * ranked["rank_loss"].item(), rel=1e-6)


def test_rank_loss_does_not_see_the_labels() -> None:
    config = ExperimentConfig(rank_loss_weight=0.4)
    assert torch.equal(losses_of(config)["rank_loss"], losses_of(config, truth=np.full_like(TRUTH, np.nan))["rank_loss"])


def test_progress_anneals_only_where_it_is_asked_for() -> None:
    plain = losses_of(ExperimentConfig())["total_loss"]
    assert torch.equal(losses_of(ExperimentConfig(), progress=0.5)["total_loss"], plain)
    assert torch.equal(losses_of(ExperimentConfig(anneal_labels=True))["total_loss"], plain)
    done = losses_of(ExperimentConfig(anneal_labels=True), progress=1.0)
    assert done["total_loss"].item() == pytest.approx(done["hard_loss"].item(), rel=1e-6)


def test_undone_class_weights_are_taken_off_the_teacher_s_logits() -> None:
    config = ExperimentConfig(kd_temperature=2.0, rank_loss_weight=0.4, rank_objective="pairwise")
    undone = losses_of(dataclasses.replace(config, undo_class_weights=True))
    target = sigmoid((TEACHER - np.log(WEIGHTS)) / 2)
    soft = 4 * (np.logaddexp(0, STUDENT / 2) - target * STUDENT / 2)
    entropy = -4 * (target * np.log(target) + (1 - target) * np.log(1 - target))
    assert undone["soft_loss"].item() == pytest.approx(soft.mean(), rel=1e-6)
    assert undone["soft_excess"].item() == pytest.approx((soft - entropy).mean(), rel=1e-4)
    assert undone["rank_loss"].item() == pytest.approx(pairwise_numpy(STUDENT, TEACHER - np.log(WEIGHTS)), rel=1e-5)
    assert torch.equal(undone["hard_loss"], losses_of(config)["hard_loss"])


def test_log_of_the_weight_is_what_weighted_training_adds() -> None:
    """The logit with the least weighted cross entropy over a label whose positives make up a share p."""
    share, weight = 0.2, 4.0
    logits = np.linspace(-5, 5, 100_001)
    loss = share * weight * np.logaddexp(0, -logits) + (1 - share) * np.logaddexp(0, logits)
    assert logits[loss.argmin()] == pytest.approx(np.log(share / (1 - share)) + np.log(weight), abs=1e-3)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--rank_loss_weight 0.1 --batch 1", "--rank_loss_weight: orders the texts of a batch, so --batch must be at least 2"),
        ("--rank_loss_weight -1", "--rank_loss_weight: must be at least 0"),
        ("--rank_objective spearman", "--rank_objective: must be one of pearson, pairwise"),
        ("--anneal_labels --kd_alpha 0", "--anneal_labels: hands alpha's share to the labels, and --kd_alpha is 0"),
        ("--undo_class_weights --no-class_weights", "--undo_class_weights: takes back what --class_weights does"),
        (
            "--undo_class_weights --teacher_checkpoint some/teacher",
            "--undo_class_weights: needs teachers fine-tuned by this run",
        ),
        ("--ema_decay 1", "--ema_decay: must be at least 0 and at most 0.99999"),
    ],
)
def test_losses_that_cannot_be_are_refused(flags: str, problem: str) -> None:
    with pytest.raises(FlagErrors, match=problem):
        parse_arguments(["--demo", *flags.split()])


def test_annealing_of_single_labels_needs_no_common_alpha() -> None:
    parse_arguments(["--demo", "--anneal_labels", "--kd_alpha", "0", "--label_alphas", "threat=0.5"])
