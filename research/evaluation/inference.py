"""What scores on resampled texts, of several seeds, say about other texts and other seeds (no torch).

S seeds, R resamples, G texts. A recipe's score with seed s on the texts at hand is taken as

    d_si = mu + a_s + b_i + c_si

with a of the seed, b of the text and c of both together. A difference of two recipes whose seeds are the same is one
such score; of recipes with other seeds, one a side. Intervals over texts alone leave a out, and cover 84 to 91 % at
three seeds where they say 95 %; a t test over seeds alone leaves b out (63 to 93 %): benchmarks/coverage.py.

Sources:
    Fieller, Some problems in interval estimation, JRSS B 16, 1954.
    Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6, 1979.
    Satterthwaite, An approximate distribution of estimates of variance components, Biometrics Bulletin 2, 1946.
    Nadeau & Bengio, Inference for the generalization error, Machine Learning 52, 2003.
    Bengio & Grandvalet, No unbiased estimator of the variance of k-fold cross-validation, JMLR 5, 2004.
    Sellam et al., The MultiBERTs: BERT reproductions for robustness analysis, ICLR 2022 (the multi-bootstrap).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating[Any]]
LEVEL = 0.95
POWER = 0.8
BISECTIONS = 24  # of an interval within 0 and 1 or so: seven digits
MANY = 1e6  # degrees of freedom from which t is the normal distribution


@dataclass(frozen=True)
class Estimate:
    """A score and its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A score minus the baseline's, its confidence interval, and the two-sided p value of no difference.

    `over_seeds` tells whether they speak for other seeds too (of one seed with folds: for other trainings), or for
    other rows only.
    """

    value: float
    low: float
    high: float
    p_value: float
    over_seeds: bool = False


@dataclass(frozen=True)
class Keeping:
    """Whether a student keeps a share of its teacher's score: a non-inferiority test.

    `bound` is the lower one-sided 95 % bound of student - share * teacher; above 0 the claim holds. `kept_share` is student
    / teacher, and `kept_share_low` its lower one-sided 95 % bound: the largest share that would pass the test (Fieller 1954).
    `rows_needed` is how many test rows show the claim with 80 % power for a student that is truly as good as its teacher, with as
    many seeds as there are; infinite when no number of rows would do.
    """

    share: float
    bound: float
    kept_share: float
    kept_share_low: float
    rows_needed: float
    over_seeds: bool = False

    @property
    def kept(self) -> bool:
        """Whether the claim holds."""
        return self.bound > 0


@dataclass(frozen=True)
class Scored:
    """One score of S seeds: plain (S,), and on R resamples of the texts (S, R); of K folds also each fold's own.

    In a difference of S seeds and one score, the one is set against each of them.
    """

    plain: FloatArray
    resampled: FloatArray
    folds: tuple[Scored, ...] = ()

    def __sub__(self, other: Scored) -> Scored:
        folds = tuple(ours - theirs for ours, theirs in zip(self.folds, other.folds, strict=True))
        return Scored(self.plain - other.plain, self.resampled - other.resampled, folds)

    def __rmul__(self, factor: float) -> Scored:
        return Scored(factor * self.plain, factor * self.resampled, tuple(factor * fold for fold in self.folds))

    @property
    def mean(self) -> float:
        """The score averaged over the seeds."""
        return float(self.plain.mean())

    @property
    def pooled(self) -> Scored:
        """The seeds' mean as one score, whose resamples say nothing of other seeds."""
        folds = tuple(fold.pooled for fold in self.folds)
        return Scored(self.plain.mean(keepdims=True), self.resampled.mean(axis=0, keepdims=True), folds)


@dataclass(frozen=True)
class Spread:
    """The variance of a mean: the part that more texts would lessen, the whole, and its degrees of freedom."""

    of_texts: float
    whole: float
    df: float


def measure_spread(sides: Sequence[Scored], num_texts: int, overlap: float = 0.0) -> Spread:
    """Return the variance of the sum of the sides' means over other texts and, where a side has several, other seeds.

    With V_m the bootstrap variance of the sum, and for a side of S seeds V_s the mean of its seeds' bootstrap
    variances, V_side that of its mean, and s^2 the variance over its seeds of the plain scores,

        I = max(0, (V_s - V_side) S / (S - 1))    the share of s^2 that the texts at hand gave each seed
        Var = V_m + sum over sides of max(0, (s^2 - I) / S)
        df = Var^2 / (V_m^2 / (G - 1) + sum over sides of (s^2 / S)^2 / (S - 1))

    The degrees of freedom are those of s^2 even where s^2 is no larger than I and Var is V_m alone: leaving them out
    there comes nearer to 95 % for three seeds that are truly alike (98 % with them), but lets 6 to 7 % of families of
    nine true nulls through Holm's correction, which looks far out into the tails.

    A side of K folds adds the term of `_spread_of_folds`.

    Args:
        sides: One for a score or a difference paired by seed; two, the second negated, where seeds differ.
        num_texts: G.
        overlap: Test rows / training rows of folds, and of seeds that split the data anew: their models share training
            rows, so their spread understates that of a new training set, and of the seeds overlap * s^2 is added
            (Nadeau & Bengio).
    """
    resampled = sum((side.resampled.mean(axis=0) for side in sides), np.zeros(sides[0].resampled.shape[1]))
    of_texts = _variance(resampled)
    whole, df_terms = of_texts, [of_texts**2 / max(1, num_texts - 1)]
    for side in sides:
        count = len(side.plain)
        if side.folds:
            of_folds = _spread_of_folds(side.folds, overlap)
            whole += of_folds
            df_terms.append(of_folds**2 / (len(side.folds) - 1))
        if count < 2:
            continue
        shared = 0.0 if side.folds else overlap
        of_seeds = _variance(side.plain)
        of_each = float(np.mean([_variance(row) for row in side.resampled]))
        of_both = max(0.0, (of_each - _variance(side.resampled.mean(axis=0))) * count / (count - 1))
        whole += max(0.0, (of_seeds - of_both) / count) + shared * of_seeds
        df_terms.append((of_seeds * (1 / count + shared)) ** 2 / (count - 1))
    return Spread(of_texts, whole, whole**2 / sum(df_terms) if sum(df_terms) > 0 else math.inf)


def _spread_of_folds(folds: Sequence[Scored], overlap: float) -> float:
    """Return what training K models on K training sets adds to the variance of a cross-validated score.

    The folds' scores, each averaged over its seeds, vary by s^2; their own texts explain I of it, the mean of their
    bootstrap variances; the rest is that of the models, and counts 1 / K + overlap times (Nadeau & Bengio), since the
    training sets of two folds have most of their rows in common.

        max(0, s^2 - I) (1 / K + overlap)

    Assumed is that the texts of a fold and the luck of its training set add up independently; no estimator is unbiased
    without an assumption of the kind (Bengio & Grandvalet 2004). benchmarks/fold_coverage.py measures how far it holds.
    """
    of_folds = _variance(np.array([fold.mean for fold in folds]))
    of_texts = float(np.mean([_variance(fold.resampled.mean(axis=0)) for fold in folds]))
    return max(0.0, of_folds - of_texts) * (1 / len(folds) + overlap)


def _variance(values: FloatArray) -> float:
    """Return the sample variance of what is defined; nan for fewer than two values."""
    defined = values[~np.isnan(values)]
    return float(defined.var(ddof=1)) if len(defined) > 1 else math.nan


def _t_quantile(level: float, df: float) -> float:
    from scipy.special import stdtrit

    return NormalDist().inv_cdf(level) if not df < MANY else float(stdtrit(df, level))


def _t_p_value(statistic: float, df: float) -> float:
    from scipy.special import stdtr

    return math.erfc(statistic / math.sqrt(2)) if not df < MANY else float(2 * stdtr(df, -statistic))


def estimate(scored: Scored, num_texts: int, overlap: float = 0.0) -> Estimate:
    """Give a score its interval: over texts of one seed, over seeds and texts of several.

    Of one seed it is the percentile interval (Efron & Tibshirani 1993, ch. 13), which stays within 0 and 1 and holds
    its level for macro-F1 of 250 to 1,000 rows; BCa (ch. 14) covered within a point of it.
    """
    if len(scored.plain) > 1 or scored.folds:
        spread = measure_spread([scored], num_texts, overlap)
        reach = _t_quantile((1 + LEVEL) / 2, spread.df) * math.sqrt(spread.whole)
        return Estimate(scored.mean, max(0.0, scored.mean - reach), min(1.0, scored.mean + reach))
    defined = scored.resampled[~np.isnan(scored.resampled)]
    if not len(defined):
        return Estimate(scored.mean, math.nan, math.nan)
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(scored.mean, float(low), float(high))


def difference(sides: Sequence[Scored], num_texts: int, overlap: float = 0.0) -> Difference:
    """Return a difference with its interval and p value, over texts and, where every side has several, over seeds.

    Of one seed whose K models come from K folds, it is over texts and the training of those.

    The interval is d -/+ t sqrt(Var) and the p value that of d / sqrt(Var); zero is outside the one exactly when the
    other is under 1 - LEVEL.

    Why not count resamples as Berg-Kirkpatrick et al. (2012) do: a counted p is never below 2 / (R + 1),
    which Holm's correction over 50 rows lifts above 0.05, so no difference however large would pass. Why not
    BCa: two students mostly agree, so few rows carry their difference, and there BCa is too narrow: side by
    side, with 99 % of the noise shared, it covered the difference 1.5 points less often.

    Args:
        sides: As for `measure_spread`.
    """
    value = sum(side.mean for side in sides)
    several = [len(side.plain) > 1 for side in sides]
    over_seeds = all(several) or (all(side.folds for side in sides) and not any(several))
    spread = measure_spread(sides if over_seeds else [side.pooled for side in sides], num_texts, overlap)
    if math.isnan(value) or math.isnan(spread.whole):
        return Difference(value, math.nan, math.nan, math.nan, over_seeds)
    error = math.sqrt(spread.whole)
    reach = _t_quantile((1 + LEVEL) / 2, spread.df) * error
    p_value = 1.0 if value == 0 else _t_p_value(abs(value) / error, spread.df) if error > 0 else 0.0
    return Difference(value, value - reach, value + reach, p_value, over_seeds)


def judge_keeping(student: Scored, teacher: Scored, share: float, num_texts: int, num_rows: int, overlap: float = 0.0) -> Keeping:
    """Test whether a student keeps `share` of its teacher's score.

    Both have the same seeds and folds. A teacher may be one model under all of them, which is then taken as it is.
    The rows needed are those where (1 - share) * teacher, the room that an equally good student has, is as large as
    the normal quantiles of level and power times the standard error. More rows lessen the texts' part of it alone.
    """

    def find_bound(asked: float) -> tuple[float, Spread]:
        gap = student - asked * teacher
        spread = measure_spread([gap], num_texts, overlap)
        reach = _t_quantile(LEVEL, spread.df) * math.sqrt(spread.whole) if spread.whole >= 0 else math.nan
        return gap.mean - reach, spread

    bound, spread = find_bound(share)
    quantiles = NormalDist().inv_cdf(LEVEL) + NormalDist().inv_cdf(POWER)
    room = ((1 - share) * teacher.mean / quantiles) ** 2 - (spread.whole - spread.of_texts)
    rows_needed = math.ceil(num_rows * spread.of_texts / room) if room > 0 else math.inf
    kept_share = student.mean / teacher.mean if teacher.mean > 0 else math.nan
    low = _find_root(lambda asked: find_bound(asked)[0], kept_share)
    return Keeping(share, bound, kept_share, low, rows_needed, len(student.plain) > 1 or bool(student.folds))


def _find_root(bound: Callable[[float], float], high: float) -> float:
    """Return where a falling bound crosses 0 between 0 and `high`, by bisection; 0 where it is nowhere above."""
    if math.isnan(high):
        return math.nan
    low = 0.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if bound(middle) > 0 else (low, middle)
    return low


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for being the best of several (Holm 1979), in the order given.

    The i-th smallest of m, i from 0, becomes the largest of (m - j) p_j over j <= i, at most 1. The chance of
    any false claim then stays below the level whatever the dependence, which is needed here: every row is
    compared with the same baseline. Nan, a comparison that could not be made, stays nan and does not count.
    """
    known = [index for index, value in enumerate(p_values) if not math.isnan(value)]
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(known, key=lambda index: p_values[index])):
        largest = max(largest, (len(known) - rank) * p_values[index])
        corrected[index] = min(1.0, largest)
    return corrected


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation (n - 1); the latter is nan for a single value."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else math.nan
