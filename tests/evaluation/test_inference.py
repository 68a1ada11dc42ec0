"""Intervals and p values over seeds and rows, against analysis of variance, scipy and plain simulation."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from research.evaluation.inference import (
    Scored,
    difference,
    estimate,
    holm,
    judge_keeping,
    mean_and_std,
    measure_spread,
)

Array = NDArray[np.float64]


def score_means(cells: Array, resamples: int = 4000, seed: int = 0) -> Scored:
    """Return the scores of seeds whose score is the mean over rows of `cells` (S, N), with their bootstrap."""
    num_rows = cells.shape[1]
    drawn = np.random.default_rng(seed).multinomial(num_rows, [1 / num_rows] * num_rows, size=resamples)
    return Scored(cells.mean(axis=1), cells @ drawn.T / num_rows)


def draw_cells(rng: np.random.Generator, seeds: int, rows: int, of_seed: float, of_row: float, of_both: float) -> Array:
    """Draw the model's cells: standard deviations of seed, row and both together."""
    noise = of_seed * rng.standard_normal((seeds, 1)) + of_row * rng.standard_normal((1, rows))
    return np.asarray(noise + of_both * rng.standard_normal((seeds, rows)))


def test_the_variance_is_that_of_two_way_analysis_of_variance() -> None:
    cells = draw_cells(np.random.default_rng(1), 4, 300, 0.3, 1.0, 1.0)
    seeds, rows = cells.shape
    centred = cells - cells.mean(axis=1, keepdims=True) - cells.mean(axis=0) + cells.mean()
    of_seed = rows * cells.mean(axis=1).var(ddof=1)  # mean squares
    of_row = seeds * cells.mean(axis=0).var(ddof=1)
    of_both = (centred**2).sum() / ((seeds - 1) * (rows - 1))
    expected = (of_seed + of_row - of_both) / (seeds * rows)
    spread = measure_spread([score_means(cells, 20_000)], rows)
    assert spread.whole == pytest.approx(expected, rel=0.03)
    assert spread.of_texts == pytest.approx(of_row / (seeds * rows), rel=0.03)
    df = expected**2 / ((of_row / (seeds * rows)) ** 2 / (rows - 1) + (of_seed / (seeds * rows)) ** 2 / (seeds - 1))
    assert spread.df == pytest.approx(df, rel=0.05)


def test_without_rows_that_differ_it_is_the_t_test_over_seeds() -> None:
    plain = np.array([0.02, 0.035, 0.01, 0.018])
    found = difference([Scored(plain, np.repeat(plain[:, None], 50, axis=1))], 1000)
    expected = stats.ttest_1samp(plain, 0)
    interval = expected.confidence_interval(0.95)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.over_seeds


def test_independent_seeds_are_compared_as_welch_does() -> None:
    first, second = np.array([0.71, 0.73, 0.70]), np.array([0.65, 0.69, 0.68, 0.66])
    sides = [Scored(sign * plain, sign * np.repeat(plain[:, None], 50, axis=1)) for sign, plain in ((1, first), (-1, second))]
    assert difference(sides, 1000).p_value == pytest.approx(stats.ttest_ind(first, second, equal_var=False).pvalue)


def test_one_seed_speaks_for_rows_only() -> None:
    cells = np.random.default_rng(0).standard_normal((1, 200))
    found = difference([score_means(cells, 20_000)], 200)
    assert not found.over_seeds
    assert found.p_value == pytest.approx(stats.ttest_1samp(cells[0], 0).pvalue, rel=0.05)


def test_a_side_of_one_seed_leaves_the_other_side_s_seeds_out() -> None:
    rng = np.random.default_rng(0)
    three, one = score_means(draw_cells(rng, 3, 200, 5.0, 1.0, 1.0)), score_means(draw_cells(rng, 1, 200, 0.0, 1.0, 1.0))
    found, rows_only = difference([three, -1 * one], 200), difference([three.pooled, -1 * one], 200)
    assert found == rows_only
    assert not found.over_seeds


def test_seeds_that_agree_beyond_the_luck_of_rows_do_not_narrow_the_interval() -> None:
    cells = draw_cells(np.random.default_rng(3), 5, 300, 0.0, 1.0, 0.5)
    cells += 1 - cells.mean(axis=1, keepdims=True)  # every seed's score is 1
    spread = measure_spread([score_means(cells)], 300)
    assert spread.whole == spread.of_texts > 0
    assert spread.df == pytest.approx(299)


def test_training_rows_that_folds_share_add_to_the_variance() -> None:
    plain = np.array([0.02, 0.035, 0.01, 0.018])
    scored = Scored(plain, np.repeat(plain[:, None], 50, axis=1))
    expected = plain.var(ddof=1) * (1 / 4 + 0.25)  # Nadeau and Bengio
    assert measure_spread([scored], 1000, overlap=0.25).whole == pytest.approx(expected)
    assert difference([scored], 1000, 0.25).p_value > difference([scored], 1000).p_value


def score_folds(cells: Array, of_fold: Array, resamples: int = 4000) -> Scored:
    """Return the scores of seeds over all rows and in each fold, whose models are better by `of_fold` (K,)."""
    parts = np.array_split(np.arange(cells.shape[1]), len(of_fold))
    better = np.repeat(of_fold, [len(part) for part in parts])
    drawn = np.random.default_rng(0).multinomial(cells.shape[1], [1 / cells.shape[1]] * cells.shape[1], size=resamples)
    scored = []
    for part in (np.arange(cells.shape[1]), *parts):
        values, weights = (cells + better)[:, part], drawn[:, part]
        scored.append(Scored(values.mean(axis=1), values @ weights.T / weights.sum(axis=1)))
    return Scored(scored[0].plain, scored[0].resampled, tuple(scored[1:]))


def test_what_the_folds_rows_explain_adds_nothing_and_what_their_models_do_adds_its_share() -> None:
    cells = draw_cells(np.random.default_rng(2), 3, 500, 0.0, 1.0, 0.5)
    alike = score_folds(cells, -np.array([part.mean() for part in np.array_split(cells, 5, axis=1)]))  # every fold scores 0
    assert measure_spread([alike], 500, 0.25).whole == pytest.approx(
        measure_spread([dataclasses.replace(alike, folds=())], 500).whole
    )

    apart = score_folds(cells, np.array([-2.0, -1.0, 0.0, 1.0, 2.0]))
    without = measure_spread([dataclasses.replace(apart, folds=())], 500)
    of_folds = np.var([fold.mean for fold in apart.folds], ddof=1)
    of_rows = np.mean([fold.resampled.mean(axis=0).var(ddof=1) for fold in apart.folds])
    spread = measure_spread([apart], 500, 0.25)
    assert spread.whole == pytest.approx(without.whole + (of_folds - of_rows) * (1 / 5 + 1 / 4))
    assert spread.df < 10 < without.df


def test_one_seed_of_several_folds_speaks_for_other_trainings_and_one_beside_three_does_not() -> None:
    one, three = (
        score_folds(draw_cells(np.random.default_rng(4), seeds, 300, 0.1, 1.0, 1.0), np.zeros(5), 500) for seeds in (1, 3)
    )
    assert difference([one], 300, 0.25).over_seeds
    assert not difference([three, -1 * one], 300, 0.25).over_seeds


@pytest.mark.parametrize(("of_seed", "of_row", "of_both"), [(0.0, 1.0, 1.0), (0.05, 1.0, 1.0), (0.1, 0.3, 1.0)])
@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_hold_the_truth_in_simulation(seeds: int, of_seed: float, of_row: float, of_both: float) -> None:
    # Seeded, so the figure never moves; 95 % of 600 has a standard error of 0.9 %. On real predictions: coverage.py.
    rng = np.random.default_rng(seeds)
    held = []
    for number in range(600):
        cells = draw_cells(rng, seeds, 150, of_seed, of_row, of_both)
        found = difference([score_means(cells, 100, number)], 150)
        held.append(found.low <= 0 <= found.high)
    assert 0.93 <= np.mean(held) <= 0.99


@given(st.floats(-5, 5), st.integers(2, 6))
def test_interval_excludes_zero_exactly_when_p_is_below_one_minus_level(shift: float, seeds: int) -> None:
    cells = draw_cells(np.random.default_rng(seeds), seeds, 30, 0.5, 1.0, 1.0) + shift
    found = difference([score_means(cells, 50)], 30)
    assert (found.low > 0 or found.high < 0) == (found.p_value < 0.05)


def test_equal_scores_differ_by_nothing_with_p_one() -> None:
    same = Scored(np.zeros(3), np.zeros((3, 10)))
    found = difference([same], 100)
    assert (found.value, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_a_sure_difference_survives_fifty_comparisons() -> None:
    found = difference([score_means(np.random.default_rng(0).standard_normal((1, 400)) + 1)], 400)
    assert holm([found.p_value] + [0.9] * 49)[0] < 0.01


def test_interval_of_an_undefined_score_is_undefined() -> None:
    undefined = Scored(np.array([math.nan]), np.full((1, 20), math.nan))
    found, own = difference([undefined], 100), estimate(undefined, 100)
    assert all(map(math.isnan, (found.value, found.low, found.p_value, own.low)))


def test_the_interval_of_a_score_stays_between_0_and_1() -> None:
    scored = Scored(np.array([0.9, 0.99, 0.95]), np.full((3, 20), 0.95) + 0.01 * np.random.default_rng(0).random((3, 20)))
    found = estimate(scored, 100)
    assert found.low < found.value < found.high == 1.0


def test_what_is_kept_is_a_one_sided_bound() -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((1, 400)) + 5.0, rng.standard_normal((1, 400)) + 5.0
    found = judge_keeping(score_means(student), score_means(teacher), 0.9, 400, 500)
    gaps = (student - 0.9 * teacher)[0]
    expected = stats.ttest_1samp(gaps, 0, alternative="greater").confidence_interval(0.95).low
    assert found.bound == pytest.approx(expected, rel=0.02)
    assert found.kept == (expected > 0)


def test_the_rows_needed_give_eighty_percent_power() -> None:
    # A student as good as its teacher, with noise of its own: 500 rows stand for as many texts here.
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((1, 500))
    student, teacher = (0.8 + 0.1 * shared + 0.05 * rng.standard_normal((1, 500)) for _ in range(2))
    needed = judge_keeping(score_means(student), score_means(teacher), 0.99, 500, 500).rows_needed
    kept = []
    for number in range(400):
        shared = rng.standard_normal((1, int(needed)))
        sides = [0.8 + 0.1 * shared + 0.05 * rng.standard_normal(shared.shape) for _ in range(2)]
        first, second = (score_means(side, 200, number) for side in sides)
        kept.append(judge_keeping(first, second, 0.99, int(needed), int(needed)).kept)
    assert np.mean(kept) == pytest.approx(0.8, abs=0.08)


def test_no_number_of_rows_makes_up_for_seeds_that_differ_too_much() -> None:
    cells = draw_cells(np.random.default_rng(0), 3, 100, 0.5, 0.1, 0.1) + 0.8
    teacher = Scored(np.full(3, 0.8), np.full((3, 4000), 0.8))
    assert judge_keeping(score_means(cells), teacher, 0.99, 100, 100).rows_needed == math.inf


def test_holm_equals_a_hand_computation() -> None:
    # Sorted: 0.005*4 = 0.02, 0.01*3 = 0.03, 0.03*2 = 0.06, then 0.04*1 = 0.04 lifted to 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_leaves_out_comparisons_that_could_not_be_made() -> None:
    corrected = holm([math.nan, 0.02, 0.04])
    assert math.isnan(corrected[0])
    assert corrected[1:] == pytest.approx([0.04, 0.04])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_lies_between_the_plain_and_the_bonferroni_value(p_values: list[float]) -> None:
    for plain, corrected in zip(p_values, holm(p_values), strict=True):
        assert plain <= corrected <= max(plain, min(1.0, len(p_values) * plain))


def test_mean_and_std_of_one_seed_has_no_std() -> None:
    assert mean_and_std([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert math.isnan(mean_and_std([0.5])[1])


def test_the_lower_bound_of_the_kept_share_is_the_largest_share_that_passes() -> None:
    rng = np.random.default_rng(5)
    teacher = score_means(draw_cells(rng, 1, 400, 0.0, 0.1, 0.0) + 0.8)
    student = teacher - score_means(draw_cells(rng, 1, 400, 0.0, 0.0, 0.1) + 0.02)
    found = judge_keeping(student, teacher, 0.9, 400, 400)
    assert found.kept_share == pytest.approx(student.mean / teacher.mean)
    assert 0.9 < found.kept_share_low < found.kept_share
    for step, passes in ((-1e-4, True), (1e-4, False)):
        assert judge_keeping(student, teacher, found.kept_share_low + step, 400, 400).kept is passes
    # Fieller's bound in closed form, for the covariances of the bootstrap.
    both = np.cov(student.resampled[0], teacher.resampled[0])
    quantile = stats.t.ppf(0.95, 399)
    x, y = student.mean, teacher.mean
    a, b, c = y**2 - quantile**2 * both[1, 1], x * y - quantile**2 * both[0, 1], x**2 - quantile**2 * both[0, 0]
    assert found.kept_share_low == pytest.approx((b - math.sqrt(b**2 - a * c)) / a, abs=1e-6)
