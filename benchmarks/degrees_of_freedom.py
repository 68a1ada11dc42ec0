"""Compare rules for the degrees of freedom of a difference over seeds and rows, where the truth is known.

    python benchmarks/degrees_of_freedom.py                   # about half a minute on one thread
    python benchmarks/degrees_of_freedom.py --simulations 50

Cells are normal: d_si = a_s + b_i + c_si, 150 rows, true difference 0. All rules have the variance of
`research.evaluation.inference.measure_spread`, V_m + max(0, s^2 - I) / S, and differ in what s^2 adds to its degrees of
freedom: always (the suite's), only where s^2 is over I, or by the delta method, the chance of being over I times.
benchmarks/coverage.py measures the suite's rule on real predictions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import common  # noqa: F401  # puts the project on the path
import numpy as np
from scipy.special import chdtrc, stdtrit

from research.evaluation.inference import Scored, measure_spread

ROWS, RESAMPLES = 150, 100
SETTINGS = ((0.0, 1.0, 1.0), (0.05, 0.3, 1.0), (0.1, 0.3, 1.0), (0.3, 0.3, 1.0), (0.1, 1.0, 0.3))
RULES = ("always", "over", "delta")


def draw_scored(rng: np.random.Generator, seeds: int, of_seed: float, of_row: float, of_both: float) -> Scored:
    """Draw cells by the standard deviations of their parts; the score of a seed is its mean over the rows."""
    cells = of_seed * rng.standard_normal((seeds, 1)) + of_row * rng.standard_normal((1, ROWS))
    cells = cells + of_both * rng.standard_normal((seeds, ROWS))
    drawn = rng.multinomial(ROWS, [1 / ROWS] * ROWS, size=RESAMPLES)
    return Scored(cells.mean(axis=1), cells @ drawn.T / ROWS)


def judge(scored: Scored) -> dict[str, bool]:
    """Say by rule whether the 95 % interval holds 0."""
    seeds, spread = len(scored.plain), measure_spread([scored], ROWS)
    of_seeds = scored.plain.var(ddof=1)
    of_each = scored.resampled.var(axis=1, ddof=1).mean()
    of_both = max(0.0, (of_each - spread.of_texts) * seeds / (seeds - 1))
    expected = max(of_seeds, of_both)
    over = chdtrc(seeds - 1, (seeds - 1) * of_both / expected)
    terms = {"always": of_seeds, "over": of_seeds if of_seeds > of_both else 0.0, "delta": over * expected}
    held = {}
    for rule, term in terms.items():
        df = spread.whole**2 / (spread.of_texts**2 / (ROWS - 1) + (term / seeds) ** 2 / (seeds - 1))
        held[rule] = abs(scored.mean) <= stdtrit(df, 0.975) * np.sqrt(spread.whole)
    return held


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=2000, help="simulations of each setting (default: 2000)")
    simulations = parser.parse_args(argv).simulations
    print(f"| S | seed, row, both | {' | '.join(RULES)} |\n| ---: | --- | ---: | ---: | ---: |")
    for seeds in (3, 5, 10):
        for parts in SETTINGS:
            rng = np.random.default_rng(seeds)
            held = [judge(draw_scored(rng, seeds, *parts)) for _ in range(simulations)]
            shares = [f"{100 * np.mean([found[rule] for found in held]):.1f}" for rule in RULES]
            print(f"| {seeds} | {', '.join(map(str, parts))} | {' | '.join(shares)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
