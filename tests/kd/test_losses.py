"""The losses against an independent computation in NumPy, float64."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from research.kd.losses import (
    MultiLabelDistillationLoss,
    attention_distance,
    compute_attention_loss,
    compute_hidden_state_loss,
    hidden_distance,
    relation_distance,
    soft_bce_loss,
    soft_loss_floor,
)
from research.models.mapping import attention_pairs, map_layers, pick_layers

GENERATOR = np.random.default_rng(0)
BATCH, LABELS, POSITIONS, WIDTH, HEADS = 6, 5, 7, 12, 3
STUDENT, TEACHER = GENERATOR.normal(0, 2, (2, BATCH, LABELS))
TRUTH = GENERATOR.integers(0, 2, (BATCH, LABELS)).astype(np.float64)
WEIGHTS = GENERATOR.uniform(0.5, 4, LABELS)
MASK = np.arange(POSITIONS) < np.array([7, 3, 5, 1, 2, 6])[:, None]

Array = NDArray[np.float64]


def tensor(array: Array) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float32)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    shifted = np.exp(x - x.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def soft_numpy(temperature: float) -> Array:
    target, guess = sigmoid(TEACHER / temperature), sigmoid(STUDENT / temperature)
    return -(temperature**2) * (target * np.log(guess) + (1 - target) * np.log(1 - guess))


def hard_numpy() -> Array:
    guess = sigmoid(STUDENT)
    return -(WEIGHTS * TRUTH * np.log(guess) + (1 - TRUTH) * np.log(1 - guess))


def random_maps() -> tuple[Array, Array]:
    """Return teacher and student maps (B, A, P, P) whose rows are distributions over real keys."""
    scores = GENERATOR.normal(0, 1, (2, BATCH, HEADS, POSITIONS, POSITIONS))
    maps = softmax(np.where(MASK[:, None, None, :], scores, -1e9))
    return maps[0], maps[1]


def pad(array: NDArray[Any], axes: tuple[int, ...], extra: int, value: float) -> NDArray[Any]:
    widths = [(0, extra if axis in axes else 0) for axis in range(array.ndim)]
    return np.pad(array, widths, constant_values=value)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 10.0])
def test_soft_loss_equals_numpy(temperature: float) -> None:
    loss = soft_bce_loss(tensor(STUDENT), tensor(TEACHER), temperature)
    np.testing.assert_allclose(loss.numpy(), soft_numpy(temperature), rtol=1e-5, atol=1e-6)
    plain = soft_bce_loss(tensor(STUDENT), tensor(TEACHER), temperature, t_squared=False)
    np.testing.assert_allclose(plain.numpy(), soft_numpy(temperature) / temperature**2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.3, [0.9, 0.1, 0.5, 0.0, 1.0]])
def test_total_soft_and_hard_equal_numpy(alpha: float | list[float]) -> None:
    losses = MultiLabelDistillationLoss(alpha, 4.0)(tensor(STUDENT), tensor(TEACHER), tensor(TRUTH), tensor(WEIGHTS))
    soft, hard = soft_numpy(4.0), hard_numpy()
    share = np.asarray(alpha)
    assert losses["soft_loss"].item() == pytest.approx(soft.mean(), rel=1e-6)
    assert losses["hard_loss"].item() == pytest.approx(hard.mean(), rel=1e-6)
    assert losses["total_loss"].item() == pytest.approx((share * soft + (1 - share) * hard).mean(), rel=1e-6)


@pytest.mark.parametrize(("reduction", "reduce"), [("sum", np.sum), ("none", lambda x: x)])
def test_other_reductions_equal_numpy(reduction: str, reduce: object) -> None:
    criterion = MultiLabelDistillationLoss(0.3, 4.0, reduction)
    total = criterion(tensor(STUDENT), tensor(TEACHER), tensor(TRUTH), tensor(WEIGHTS))["total_loss"]
    expected = 0.3 * soft_numpy(4.0) + 0.7 * hard_numpy()
    np.testing.assert_allclose(total.numpy(), reduce(expected), rtol=1e-5)  # type: ignore[operator]


def test_unknown_cells_leave_the_hard_loss_and_stay_in_the_soft_loss() -> None:
    truth = TRUTH.copy()
    truth[0, 1] = truth[3, :] = np.nan
    known = ~np.isnan(truth)
    losses = MultiLabelDistillationLoss(0.3)(tensor(STUDENT), tensor(TEACHER), tensor(truth), tensor(WEIGHTS))
    assert losses["hard_loss"].item() == pytest.approx(hard_numpy()[known].mean(), rel=1e-6)
    assert losses["soft_loss"].item() == pytest.approx(soft_numpy(4.0).mean(), rel=1e-6)


def test_label_alphas_weight_the_sum_over_all_and_the_sum_over_known_cells() -> None:
    truth = TRUTH.copy()
    truth[:4, 1] = np.nan
    alphas = np.linspace(0.1, 0.9, LABELS)
    losses = MultiLabelDistillationLoss(alphas.tolist())(tensor(STUDENT), tensor(TEACHER), tensor(truth), tensor(WEIGHTS))
    known = ~np.isnan(truth)
    soft, hard = soft_numpy(4.0), np.where(known, hard_numpy(), 0)
    expected = (alphas * soft).sum() / soft.size + ((1 - alphas) * hard).sum() / known.sum()
    assert losses["total_loss"].item() == pytest.approx(expected, rel=1e-6)


def test_batch_without_any_label_gives_no_hard_loss_and_finite_gradients() -> None:
    student = tensor(STUDENT).requires_grad_()
    losses = MultiLabelDistillationLoss()(student, tensor(TEACHER), torch.full((BATCH, LABELS), torch.nan))
    losses["total_loss"].backward()
    assert losses["hard_loss"].item() == 0
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_worked_example_of_the_reference() -> None:
    logits = np.array([2.0, 0.5, -1.0, 1.5, -2.0])
    expected = {1: [0.88, 0.62, 0.27, 0.82, 0.12], 4: [0.62, 0.53, 0.44, 0.59, 0.38], 10: [0.55, 0.51, 0.48, 0.54, 0.45]}
    for temperature, probs in expected.items():
        softened = torch.sigmoid(tensor(logits) / temperature)
        np.testing.assert_allclose(softened.numpy(), probs, atol=0.005)
        # At a student that repeats the teacher the loss is the entropy of exactly these probabilities.
        entropy = -(softened * softened.log() + (1 - softened) * (1 - softened).log())
        floor = soft_loss_floor(tensor(logits), temperature, t_squared=False)
        torch.testing.assert_close(floor, entropy)


def test_alpha_zero_equals_plain_bce() -> None:
    losses = MultiLabelDistillationLoss(0.0)(tensor(STUDENT), tensor(TEACHER), tensor(TRUTH), tensor(WEIGHTS))
    plain = torch.nn.functional.binary_cross_entropy_with_logits(tensor(STUDENT), tensor(TRUTH), pos_weight=tensor(WEIGHTS))
    torch.testing.assert_close(losses["total_loss"], plain)


def test_alpha_one_ignores_the_labels() -> None:
    totals = [
        MultiLabelDistillationLoss(1.0)(tensor(STUDENT), tensor(TEACHER), labels)["total_loss"]
        for labels in (tensor(TRUTH), tensor(1 - TRUTH))
    ]
    assert torch.equal(*totals)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 10.0])
def test_soft_gradient_equals_finite_differences(temperature: float) -> None:
    student = tensor(STUDENT).requires_grad_()
    soft_bce_loss(student, tensor(TEACHER), temperature).mean().backward()
    step = 1e-6
    target = sigmoid(TEACHER / temperature)

    def value(logits: Array) -> Array:
        guess = sigmoid(logits / temperature)
        return -(temperature**2) * (target * np.log(guess) + (1 - target) * np.log(1 - guess))

    numeric = (value(STUDENT + step) - value(STUDENT - step)) / (2 * step) / STUDENT.size
    assert student.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), numeric, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 10.0])
def test_soft_gradient_is_the_difference_of_the_softened_probabilities(temperature: float) -> None:
    student = tensor(STUDENT).requires_grad_()
    soft_bce_loss(student, tensor(TEACHER), temperature).mean().backward()
    assert student.grad is not None
    expected = temperature * (sigmoid(STUDENT / temperature) - sigmoid(TEACHER / temperature)) / STUDENT.size
    np.testing.assert_allclose(student.grad.numpy(), expected, rtol=0, atol=1e-6)


def test_unknown_cell_learns_from_the_teacher_only() -> None:
    truth = TRUTH.copy()
    truth[2, 3] = np.nan
    gradients = []
    for alpha in (0.3, 1.0):
        student = tensor(STUDENT).requires_grad_()
        MultiLabelDistillationLoss(alpha)(student, tensor(TEACHER), tensor(truth), tensor(WEIGHTS))["total_loss"].backward()
        assert student.grad is not None
        gradients.append(student.grad)
    assert gradients[0][2, 3].item() == pytest.approx(0.3 * gradients[1][2, 3].item(), rel=1e-6)


def test_changing_the_total_in_place_changes_no_component() -> None:
    for alpha in (0.0, 0.7, 1.0):
        for reduction in ("mean", "none"):
            criterion = MultiLabelDistillationLoss(alpha, reduction=reduction)
            losses = criterion(tensor(STUDENT), tensor(TEACHER), tensor(TRUTH))
            before = {name: loss.clone() for name, loss in losses.items()}
            losses["total_loss"] += 5.0
            assert all(torch.equal(losses[name], before[name]) for name in ("soft_loss", "hard_loss"))
            torch.testing.assert_close(losses["total_loss"], before["total_loss"] + 5.0)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 10.0])
def test_excess_over_the_floor_is_the_divergence_and_zero_for_a_perfect_student(temperature: float) -> None:
    excess = soft_bce_loss(tensor(STUDENT), tensor(TEACHER), temperature) - soft_loss_floor(tensor(TEACHER), temperature)
    target, guess = sigmoid(TEACHER / temperature), sigmoid(STUDENT / temperature)
    divergence = target * np.log(target / guess) + (1 - target) * np.log((1 - target) / (1 - guess))
    np.testing.assert_allclose(excess.numpy(), temperature**2 * divergence, rtol=1e-3, atol=1e-5)
    same = soft_bce_loss(tensor(TEACHER), tensor(TEACHER), temperature) - soft_loss_floor(tensor(TEACHER), temperature)
    assert torch.equal(same, torch.zeros_like(same))


@pytest.mark.parametrize(
    "faulty",
    [
        {"alpha": 1.5},
        {"alpha": -0.1},
        {"alpha": np.nan},
        {"alpha": [0.5, 2.0]},
        {"temperature": 0.0},
        {"temperature": np.nan},
        {"temperature": np.inf},
        {"reduction": "median"},
    ],
)
def test_impossible_settings_are_refused(faulty: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(faulty))):
        MultiLabelDistillationLoss(**faulty)  # type: ignore[arg-type]


def test_hidden_mse_and_cosine_equal_numpy() -> None:
    teacher, student = GENERATOR.normal(0, 1, (2, BATCH, POSITIONS, WIDTH))
    squared = ((student - teacher) ** 2).mean(axis=-1)
    cosine = (student * teacher).sum(axis=-1) / np.linalg.norm(student, axis=-1) / np.linalg.norm(teacher, axis=-1)
    mask = torch.tensor(MASK)
    for objective, values in (("mse", squared), ("cosine", 1 - cosine)):
        loss = hidden_distance(tensor(teacher), tensor(student), mask, objective)
        assert loss.item() == pytest.approx(values[MASK].mean(), rel=1e-5)


def test_attention_mse_and_kl_equal_numpy() -> None:
    teacher, student = (maps.mean(axis=1) for maps in random_maps())
    pairs = MASK[:, :, None] & MASK[:, None, :]
    squared = ((student - teacher) ** 2)[pairs].mean()
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(pairs, teacher * np.log(teacher / student), 0.0)
    divergence = terms.sum(axis=-1)[MASK].mean()
    mask = torch.tensor(MASK)
    assert attention_distance(tensor(teacher), tensor(student), mask).item() == pytest.approx(squared, rel=1e-5)
    assert attention_distance(tensor(teacher), tensor(student), mask, "kl").item() == pytest.approx(divergence, rel=1e-4)


def test_relation_loss_equals_numpy_for_unequal_widths() -> None:
    teacher = GENERATOR.normal(0, 1, (3, BATCH, POSITIONS, 12))
    student = GENERATOR.normal(0, 1, (3, BATCH, POSITIONS, 6))

    def relation(states: Array) -> Array:
        split = states.reshape(BATCH, POSITIONS, HEADS, -1).transpose(0, 2, 1, 3)
        scores = split @ split.swapaxes(-1, -2) / np.sqrt(split.shape[-1])
        return softmax(np.where(MASK[:, None, None, :], scores, -1e9))

    expected = 0.0
    for part in range(3):
        target, guess = relation(teacher[part]), relation(student[part])
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(target > 0, target * np.log(target / guess), 0.0)
        expected += terms.sum(axis=-1).mean(axis=1)[MASK].mean() / 3
    loss = relation_distance([tensor(x) for x in teacher], [tensor(x) for x in student], torch.tensor(MASK), HEADS)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    same = relation_distance([tensor(x) for x in teacher], [tensor(x) for x in teacher], torch.tensor(MASK), HEADS)
    assert same.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("objective", ["mse", "cosine"])
def test_more_padding_does_not_change_the_hidden_loss(objective: str) -> None:
    states = GENERATOR.normal(0, 1, (2, BATCH, POSITIONS, WIDTH))
    mask = torch.tensor(MASK)
    before = hidden_distance(tensor(states[0]), tensor(states[1]), mask, objective)
    wider = [tensor(pad(side, (1,), 5, 99.0)) for side in states]
    after = hidden_distance(wider[0], wider[1], torch.tensor(pad(MASK, (1,), 5, False)), objective)
    assert after.item() == pytest.approx(before.item(), abs=1e-6)


@pytest.mark.parametrize("objective", ["mse", "kl"])
def test_more_padding_does_not_change_the_attention_loss(objective: str) -> None:
    teacher, student = random_maps()
    before = compute_attention_loss([tensor(teacher)], [tensor(student)], attention_mask=torch.tensor(MASK), objective=objective)
    # Garbage in padded rows, as a real map has: a padded query still attends somewhere.
    wider = [tensor(pad(side, (2, 3), 4, 0.3)) for side in (teacher, student)]
    mask = torch.tensor(pad(MASK, (1,), 4, False))
    after = compute_attention_loss([wider[0]], [wider[1]], attention_mask=mask, objective=objective)
    assert after.item() == pytest.approx(before.item(), abs=1e-6)


def test_more_padding_does_not_change_the_relation_loss() -> None:
    teacher, student = GENERATOR.normal(0, 1, (2, 3, BATCH, POSITIONS, WIDTH))
    before = relation_distance([tensor(x) for x in teacher], [tensor(x) for x in student], torch.tensor(MASK), HEADS)
    wider = [[tensor(pad(part, (1,), 4, 7.0)) for part in side] for side in (teacher, student)]
    after = relation_distance(wider[0], wider[1], torch.tensor(pad(MASK, (1,), 4, False)), HEADS)
    assert after.item() == pytest.approx(before.item(), abs=1e-6)


def test_permuting_the_batch_changes_no_loss() -> None:
    states, maps = tensor(GENERATOR.normal(0, 1, (2, BATCH, POSITIONS, WIDTH))), [tensor(side) for side in random_maps()]
    truth = TRUTH.copy()
    truth[1, 2] = np.nan

    def every_loss(order: NDArray[np.int64]) -> list[float]:
        mask, teacher, student = torch.tensor(MASK[order]), states[0][order], states[1][order]
        logits = [tensor(array[order]) for array in (STUDENT, TEACHER, truth)]
        losses = list(MultiLabelDistillationLoss()(*logits, tensor(WEIGHTS)).values())
        losses += [hidden_distance(teacher, student, mask, objective) for objective in ("mse", "cosine")]
        losses += [attention_distance(maps[0][order].mean(1), maps[1][order].mean(1), mask, kind) for kind in ("mse", "kl")]
        losses.append(relation_distance([teacher], [student], mask, HEADS))
        return [loss.item() for loss in losses]

    before, after = every_loss(np.arange(BATCH)), every_loss(np.array([3, 0, 5, 1, 4, 2]))
    assert len(before) == 8
    assert after == pytest.approx(before, rel=1e-6, abs=1e-6)


def test_autocast_does_not_lower_the_precision_of_the_relation_loss() -> None:
    teacher, student = tensor(GENERATOR.normal(0, 1, (2, BATCH, POSITIONS, WIDTH)))
    plain = relation_distance([teacher], [student], torch.tensor(MASK), HEADS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(relation_distance([teacher], [student], torch.tensor(MASK), HEADS), plain)


def test_padded_positions_get_no_gradient() -> None:
    mask = torch.tensor(MASK)
    states = tensor(GENERATOR.normal(0, 1, (BATCH, POSITIONS, WIDTH))).requires_grad_()
    target = tensor(GENERATOR.normal(0, 1, (BATCH, POSITIONS, WIDTH)))
    for loss in (
        hidden_distance(target, states, mask),
        hidden_distance(target, states, mask, "cosine"),
        relation_distance([target], [states], mask, HEADS),
    ):
        (gradient,) = torch.autograd.grad(loss, states)
        assert (gradient[~mask] == 0).all()
        # A row of one position has a relation of 1 with itself whatever its state.
        assert (gradient[mask & (mask.sum(dim=1) > 1)[:, None]].abs().amax(dim=-1) > 0).all()


def test_default_mapping_is_the_references() -> None:
    assert dict(map_layers("uniform", 12, 6)) == {2: 1, 4: 2, 6: 3, 8: 4, 10: 5, 12: 6}
    hidden = [torch.full((1, 2, 3), float(layer)) for layer in range(13)]
    student = [torch.full((1, 2, 3), 2.0 * layer) for layer in range(7)]
    assert compute_hidden_state_loss(hidden, student).item() == 0


def test_map_of_layer_k_is_entry_k_minus_one() -> None:
    teacher = [torch.full((1, 2, 2, 2), float(layer)) for layer in range(1, 13)]
    student = [torch.full((1, 4, 2, 2), 2.0 * layer) for layer in range(1, 7)]
    assert compute_attention_loss(teacher, student).item() == 0
    assert compute_attention_loss(teacher, student, {12: 1}).item() == pytest.approx(100)


def test_layer_strategies() -> None:
    assert map_layers("last", 12, 3) == ((10, 1), (11, 2), (12, 3))
    assert map_layers("first", 12, 3) == ((1, 1), (2, 2), (3, 3))
    assert map_layers("uniform", 12, 3) == ((4, 1), (8, 2), (12, 3))
    assert map_layers("12:1, 0:0", 12, 3) == ((12, 1), (0, 0))
    assert map_layers("last", 3, 6) == ((1, 4), (2, 5), (3, 6))


def test_student_deeper_than_its_teacher_has_every_layer_paired() -> None:
    pairs = map_layers("uniform", 12, 24)
    assert [student for _, student in pairs] == list(range(1, 25))
    assert pairs[-1] == (12, 24)
    assert pick_layers(12, 24) == sorted(pick_layers(12, 24))
    assert min(pick_layers(12, 24)) == 1


@given(total=st.integers(1, 48), wanted=st.integers(1, 48))
def test_picked_layers_are_rounded_halves_up(total: int, wanted: int) -> None:
    exact = [Fraction(layer * total, wanted) for layer in range(1, wanted + 1)]
    assert pick_layers(total, wanted) == [max(1, math.floor(place + Fraction(1, 2))) for place in exact]
    assert pick_layers(total, wanted)[-1] == total


@pytest.mark.parametrize("mapping", ["13:1", "12:7"])
def test_pair_out_of_range_is_refused(mapping: str) -> None:
    with pytest.raises(ValueError, match=f"^{mapping} is out of range"):
        map_layers(mapping, 12, 6)


@pytest.mark.parametrize("mapping", [{13: 1}, {12: 7}, {-1: 1}])
def test_mapping_of_a_layer_that_is_not_there_is_refused(mapping: dict[int, int]) -> None:
    (pair,) = mapping.items()
    message = f"^{pair[0]}:{pair[1]} is out of range"
    with pytest.raises(ValueError, match=message):
        compute_hidden_state_loss([torch.zeros(1, 2, 3)] * 13, [torch.zeros(1, 2, 3)] * 7, mapping)
    with pytest.raises(ValueError, match=message):
        compute_attention_loss([torch.zeros(1, 2, 2)] * 12, [torch.zeros(1, 2, 2)] * 6, mapping)


def test_embeddings_have_states_but_no_map() -> None:
    states = [torch.zeros(1, 2, 3), torch.ones(1, 2, 3)]
    assert compute_hidden_state_loss(states, states[::-1], {0: 0}).item() == 1
    with pytest.raises(ValueError, match="0:0 is out of range; the teacher has layers 1 to 1"):
        compute_attention_loss([torch.zeros(1, 2, 2)], [torch.zeros(1, 2, 2)], {0: 0})
    assert attention_pairs(((0, 0), (2, 1))) == ((2, 1),)
    with pytest.raises(ValueError, match="^layer 0 is the embeddings"):
        attention_pairs(((0, 0),))


def test_mapping_without_a_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="names no layers"):
        compute_hidden_state_loss([torch.zeros(1, 2, 3)] * 2, [torch.zeros(1, 2, 3)] * 2, {})


@pytest.mark.parametrize("missing", [(), (None,)])
def test_missing_maps_are_an_error_not_a_silent_zero(missing: tuple[Any, ...]) -> None:
    maps = (torch.full((1, 2, 2), 0.5),)
    with pytest.raises(ValueError, match="teacher has no attention maps"):
        compute_attention_loss(missing, maps)
    with pytest.raises(ValueError, match="student has no attention maps"):
        compute_attention_loss(maps, missing)


def test_maps_of_other_shapes_are_refused() -> None:
    # The student's single position would otherwise be spread over the teacher's two.
    with pytest.raises(ValueError, match=r"teacher layer 1 \(1, 2, 2\) and student layer 1 \(1, 1, 1\) differ in shape"):
        compute_attention_loss([torch.zeros(1, 2, 2)], [torch.zeros(1, 1, 1)])


def test_states_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"teacher layer 1 \(1, 2, 3\) and student layer 1 \(1, 2, 4\) differ in shape"):
        compute_hidden_state_loss([torch.zeros(1, 2, 3)] * 2, [torch.zeros(1, 2, 4)] * 2)
