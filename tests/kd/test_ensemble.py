"""Several teachers answer with the mean of their softened probabilities, and cells without a teacher with the labels alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from research.kd.ensemble import LEAST_PROBABILITY, Ensemble, average_logits, logits_of_probs
from research.kd.losses import MultiLabelDistillationLoss, soft_bce_loss
from research.kd.objective import DistillationObjective
from research.kd.targets import KeptTeacher, Targets
from research.kd.teacher import Teacher
from research.models.classifiers import NO_LAYERS, ModelShape
from research_config import ExperimentConfig


def sigmoid(logits: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(logits, dtype=np.float64)))


def random_logits(teachers: int = 2, rows: int = 7, labels: int = 3, scale: float = 3.0) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [(scale * generator.standard_normal((rows, labels))).astype(np.float32) for _ in range(teachers)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("teachers", [2, 5])
def test_softened_ensemble_is_the_mean_of_the_softened_teachers(teachers: int, temperature: float) -> None:
    logits = random_logits(teachers)
    target = sigmoid(average_logits(logits, temperature) / temperature)
    np.testing.assert_allclose(target, np.mean([sigmoid(entry / temperature) for entry in logits], axis=0), atol=1e-6)


def test_two_teachers_by_hand() -> None:
    # sigmoid(2 / 2) = 0.731059 and sigmoid(-6 / 2) = 0.047426; their mean is 0.389242, its logit -0.450499, times 2.
    found = average_logits([np.array([[2.0]], np.float32), np.array([[-6.0]], np.float32)], 2.0)
    assert found[0, 0] == pytest.approx(-0.900997, abs=1e-6)


def test_mean_at_one_temperature_is_not_that_at_another() -> None:
    logits = random_logits()
    assert np.abs(average_logits(logits, 4.0) - average_logits(logits, 1.0)).max() > 0.1


def test_what_is_taken_off_the_mean_is_taken_off_each_teacher() -> None:
    logits, shift = random_logits(), np.log(np.array([1.0, 3.0, 9.0]))
    target = sigmoid((average_logits(logits, 4.0, shift) - shift) / 4)
    np.testing.assert_allclose(target, np.mean([sigmoid((entry - shift) / 4) for entry in logits], axis=0), atol=1e-6)
    assert np.abs(average_logits(logits, 4.0, shift) - average_logits(logits, 4.0)).max() > 0.01


def test_one_teacher_is_itself_to_the_bit() -> None:
    (logits,) = random_logits(1)
    assert average_logits([logits], 3.0).tobytes() == logits.tobytes()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_extreme_logits_stay_finite_and_keep_their_side(temperature: float) -> None:
    extreme = np.array([[1e4, -1e4, 1e30, -1e30, 1e4]], np.float32)
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        same = average_logits([extreme, extreme], temperature)
        mixed = average_logits([extreme, -extreme], temperature)
    np.testing.assert_allclose(same, extreme, rtol=1e-6)
    # One is certain and the other denies it: the mean is one half, however large the logits are.
    np.testing.assert_allclose(mixed, 0.0, atol=1e-3)


def test_silent_teacher_leaves_the_others_and_nobody_is_nan() -> None:
    first, second = random_logits(2)
    first[0], second[1] = np.nan, np.nan
    first[2], second[2] = np.nan, np.nan
    found = average_logits([first, second], 4.0)
    assert found[0].tobytes() == second[0].tobytes()
    assert found[1].tobytes() == first[1].tobytes()
    assert np.isnan(found[2]).all() and np.isfinite(found[3:]).all()


def test_rows_in_pieces_are_the_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(3, rows=10)
    whole = average_logits(logits, 2.0)
    monkeypatch.setattr("research.kd.ensemble.CHUNK_ROWS", 3)
    assert average_logits(logits, 2.0).tobytes() == whole.tobytes()


def test_probabilities_become_logits_that_stay_off_the_edge() -> None:
    probs = np.array([[0.0, 1.0, 0.25, np.nan]])
    found = logits_of_probs(probs)
    edge = np.log(LEAST_PROBABILITY / (1 - LEAST_PROBABILITY))
    np.testing.assert_allclose(found, [[edge, -edge, np.log(1 / 3), np.nan]], rtol=1e-6)


def build_teacher(name: str) -> Teacher:
    return Teacher({"files": name}, ModelShape(3, 16, 2, 50), lambda: pytest.fail("not loaded"), lambda _: None, {}, 10)


def test_identity_of_one_is_its_own_and_that_of_several_changes_with_each() -> None:
    one, two = build_teacher("a"), build_teacher("b")
    assert Ensemble({"teacher": one}).identity == one.identity
    logits = np.array([[0.5, np.nan]], np.float32)
    found = [
        Ensemble({"teacher": one}).identity,
        Ensemble({"teacher": one, "teacher_2": two}).identity,
        Ensemble({"teacher": two, "teacher_2": one}).identity,
        Ensemble({"teacher": one}, {"table": logits}).identity,
        Ensemble({"teacher": one}, {"ngrams": logits}).identity,
        Ensemble({"teacher": one}, {"table": logits, "ngrams": logits}).identity,
        Ensemble({"teacher": one}, {"table": np.array([[0.25, np.nan]], np.float32)}).identity,
        Ensemble({}, {"table": logits}).identity,
    ]
    assert len({str(identity) for identity in found}) == len(found)
    assert Ensemble({"teacher": one, "teacher_2": two}).num_parameters == 20


# Cells without a teacher


LABELS = np.array([[1, 0, 1], [0, np.nan, 1], [1, 1, 0], [np.nan, 0, 0]], dtype=np.float64)
TAUGHT = np.array([[1, 1, 1], [0, 0, 0], [1, 0, 1], [0, 1, 0]], dtype=np.float64)
WEIGHTS = np.array([1.0, 2.0, 3.0])
ALPHA, TEMPERATURE = np.array([0.9, 0.5, 0.2]), 3.0


def loss_by_hand(student: np.ndarray, teacher: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each cell's part of the total loss and its gradient, (B, C), by the formula."""
    target, softened = sigmoid(teacher / TEMPERATURE), sigmoid(student / TEMPERATURE)
    soft = -(target * np.log(softened) + (1 - target) * np.log(1 - softened)) * TEMPERATURE**2
    known, truth = ~np.isnan(LABELS), np.nan_to_num(LABELS)
    probs = sigmoid(student)
    hard = -(WEIGHTS * truth * np.log(probs) + (1 - truth) * np.log(1 - probs)) * known
    slope = (WEIGHTS * truth * (probs - 1) + (1 - truth) * probs) * known
    alpha = ALPHA * TAUGHT
    total = alpha * soft / soft.size + (1 - alpha) * hard / known.sum()
    return total, alpha * (softened - target) * TEMPERATURE / soft.size + (1 - alpha) * slope / known.sum()


def test_cells_without_a_teacher_have_the_hard_loss_at_full_weight_and_its_gradient() -> None:
    student_logits, teacher_logits = random_logits(2, rows=4)
    student = torch.tensor(student_logits, dtype=torch.float32, requires_grad=True)
    taught = torch.tensor(TAUGHT, dtype=torch.float32)
    criterion = MultiLabelDistillationLoss(ALPHA.tolist(), TEMPERATURE)
    answers = torch.tensor(np.where(TAUGHT == 1, teacher_logits, 0.0), dtype=torch.float32)
    arguments = (answers, torch.tensor(LABELS), torch.tensor(WEIGHTS))
    losses = criterion(student, *arguments, taught=taught)
    losses["total_loss"].backward()
    total, gradient = loss_by_hand(student_logits.astype(np.float64), teacher_logits.astype(np.float64))
    assert losses["total_loss"].item() == pytest.approx(total.sum(), rel=1e-5)
    np.testing.assert_allclose(student.grad.numpy(), gradient, rtol=2e-4, atol=1e-7)  # type: ignore[union-attr]
    # Row 1 has no teacher at all: what it adds is what it adds at alpha 0, to the bit.
    cells = MultiLabelDistillationLoss(ALPHA.tolist(), TEMPERATURE, "none")(student, *arguments, taught=taught)["total_loss"]
    hard = MultiLabelDistillationLoss(0.0, TEMPERATURE, "none")(student, *arguments)["total_loss"]
    assert torch.equal(cells[1], hard[1])


def test_kept_table_says_which_cells_it_speaks_of() -> None:
    (logits,) = random_logits(1, rows=4)
    partial = np.where(TAUGHT == 1, logits, np.nan).astype(np.float32)
    found = KeptTeacher(NO_LAYERS, partial, partial=True).targets({"index": torch.tensor([3, 0])})
    assert found.taught is not None and found.taught.tolist() == TAUGHT[[3, 0]].tolist()
    assert torch.isfinite(found.logits).all()
    np.testing.assert_array_equal(found.logits.numpy()[1], logits[0])
    assert KeptTeacher(NO_LAYERS, logits).targets({"index": torch.tensor([0])}).taught is None


def test_soft_loss_and_its_floor_leave_silent_cells_out() -> None:
    student, teacher = (torch.tensor(entry) for entry in random_logits(2, rows=4))
    taught = torch.tensor(TAUGHT, dtype=torch.float32)
    objective = DistillationObjective(ExperimentConfig(kd_temperature=TEMPERATURE), NO_LAYERS, ModelShape(2, 8, 2, 50))
    batch = {"labels": torch.tensor(LABELS, dtype=torch.float32)}
    found = objective(student, None, Targets(teacher * taught, taught=taught), batch, None)
    excess = (soft_bce_loss(student, teacher, TEMPERATURE) - soft_bce_loss(teacher, teacher, TEMPERATURE)) * taught
    assert found["soft_loss"].item() == pytest.approx((soft_bce_loss(student, teacher, TEMPERATURE) * taught).mean().item())
    assert found["soft_excess"].item() == pytest.approx(excess.mean().item(), abs=1e-5)
