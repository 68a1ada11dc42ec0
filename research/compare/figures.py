"""Figures of a comparison: a score against a swept flag, over two of them, and the difference to the baseline.

Drawn in the style of research.report.figures: one paper column wide, told apart by colour, line and marker.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from research.compare.frontier import collect_frontier, plot_frontier
from research.compare.rows import MACHINE_FLAGS
from research.compare.scores import Comparison, Result
from research.evaluation.inference import Estimate
from research.flags import format_value
from research.names import METRIC_OF
from research.report.figures import STYLES, SeriesStyle, Target, figure_style, new_figure, save_figure
from research.storage.files import write_atomic

LOG_AXIS_RATIO = 50  # a sweep whose largest value is that many times its smallest reads better in decades


@dataclass(frozen=True)
class SweepPoint:
    """One setting's score; `members` are the scores of its seeds or folds."""

    setting: float
    estimate: Estimate
    members: tuple[float, ...]


def plot_comparison(comparison: Comparison, folder: Path) -> dict[Path, str]:
    """Draw every figure the comparison has data for; returns the files written, each with what it shows."""
    metric = METRIC_OF[comparison.metric].axis_label
    swept = swept_flags(comparison)
    figures: dict[str, BytesIO] = {}
    captions: dict[str, str] = {}
    for flag in swept:
        captions[f"sweep_{flag}"] = f"{metric} against {flag}, with 95 % intervals"
        reference = None if flag in comparison.baseline.row.settings else comparison.baseline.estimate
        plot_sweep(flag, collect_series(comparison, flag), metric, figures.setdefault(f"sweep_{flag}", BytesIO()), reference)
    differing = [result for result in comparison.results if result.difference is not None]
    if differing:
        baseline = comparison.baseline.row.name
        captions["differences"] = (
            f"{metric}: difference to {baseline} with its 95 % interval; filled: over seeds and rows, p under 0.05 after Holm"
        )
        plot_differences(differing, baseline, metric, figures.setdefault("differences", BytesIO()))
    if len(swept) == 2:
        for name, grid in collect_grids(comparison, swept[0], swept[1]).items():
            captions[name] = f"{metric} over {swept[0]} and {swept[1]}"
            plot_heat_map(swept[0], swept[1], grid, metric, figures.setdefault(name, BytesIO()))
    points = collect_frontier(comparison)
    if len(points) > 1:
        captions["frontier"] = (
            f"{metric} against size and latency, each as its own run measured it: what a smaller model costs in quality; hollow: "
            "trained on the labels alone; grey line: nothing drawn is both smaller (faster) and better"
        )
        plot_frontier(
            points,
            metric,
            figures.setdefault("frontier", BytesIO()),
            lower_is_better=METRIC_OF[comparison.metric].lower_is_better,
        )
    written = {}
    for name, image in figures.items():
        path = folder / f"{re.sub(r'[^A-Za-z0-9_.=-]', '_', name)}.png"
        write_atomic(path, image.getvalue())
        written[path] = captions[name]
    return written


def swept_flags(comparison: Comparison) -> list[str]:
    """Return the differing flags whose values are numbers, the seed and those of the machine left out."""
    return [
        name
        for name in comparison.flags
        if name not in MACHINE_FLAGS | {"seed"} and len(_sweep_values(comparison, name)) > 1 and _is_numeric(comparison, name)
    ]


def _is_numeric(comparison: Comparison, flag: str) -> bool:
    values = [result.row.settings[flag] for result in comparison.results if flag in result.row.settings]
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _sweep_values(comparison: Comparison, flag: str) -> set[str]:
    return {json.dumps(result.row.settings[flag]) for result in comparison.results if flag in result.row.settings}


def _name_series(result: Result, comparison: Comparison, swept: Sequence[str]) -> str:
    """Name what else sets a row apart, as in "kd_method=hidden": rows of one name belong on one line."""
    settings = result.row.settings
    names = [name for name in comparison.flags if name not in swept and name != "pipeline" and name in settings]
    return ", ".join(f"{name}={format_value(settings[name])}" for name in names)


def collect_series(comparison: Comparison, flag: str) -> dict[str, list[SweepPoint]]:
    """Return the points of every line of a sweep, by what else sets the line apart."""
    series: dict[str, list[SweepPoint]] = {}
    for result in comparison.results:
        if flag in result.row.settings:
            point = SweepPoint(float(result.row.settings[flag]), result.estimate, result.values)
            series.setdefault(_name_series(result, comparison, [flag]), []).append(point)
    return {name: sorted(points, key=lambda point: point.setting) for name, points in series.items()}


def collect_grids(comparison: Comparison, across: str, down: str) -> dict[str, dict[tuple[float, float], float]]:
    """Return {figure name: {(across, down): score}}, a grid for each combination of the remaining flags."""
    grids: dict[str, dict[tuple[float, float], float]] = {}
    for result in comparison.results:
        settings = result.row.settings
        if across in settings and down in settings:
            others = _name_series(result, comparison, [across, down])
            name = f"heatmap_{across}_{down}" + (f"_{others}" if others else "")
            grids.setdefault(name, {})[float(settings[across]), float(settings[down])] = result.estimate.value
    return {name: grid for name, grid in grids.items() if min(map(len, map(set, zip(*grid, strict=True)))) > 1}


def plot_sweep(
    flag: str, series: Mapping[str, Sequence[SweepPoint]], metric: str, target: Target, baseline: Estimate | None = None
) -> None:
    """Draw the score against a swept flag with 95 % intervals, a line per entry of `series`.

    Small dots are single seeds or folds. `baseline` is drawn across as a dashed line with its interval.
    """
    settings = sorted({point.setting for points in series.values() for point in points})
    log_axis = settings[0] > 0 and settings[-1] / settings[0] >= LOG_AXIS_RATIO
    with figure_style([flag, *series]):
        figure = new_figure(2.5 + 0.13 * len(series))
        axes = figure.subplots()
        if log_axis:
            axes.set_xscale("log")
        if baseline is not None:
            axes.axhspan(baseline.low, baseline.high, color="0.9", linewidth=0, zorder=0)
            axes.axhline(baseline.value, color="0.35", linestyle=(0, (4, 2)), linewidth=1, label="baseline")
        for number, (name, points) in enumerate(series.items()):
            places = _dodge([point.setting for point in points], number, len(series), settings, log_axis)
            _draw_series(axes, places, points, STYLES[number % len(STYLES)], name or metric)
        axes.set_xticks(settings, [f"{setting:g}" for setting in settings])
        axes.minorticks_off()
        axes.set_xlabel(flag)
        axes.set_ylabel(metric)
        axes.grid(visible=False, axis="x")
        if len(series) > 1 or baseline is not None:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2 if len(series) < 3 or _are_short(series) else 1)
        save_figure(figure, target)


def _are_short(series: Mapping[str, Any]) -> bool:
    return max(map(len, series)) < 20


def _dodge(
    places: Sequence[float], number: int, count: int, settings: Sequence[float], log_axis: bool
) -> npt.NDArray[np.float64]:
    """Move each line a little sideways, so that error bars at one setting do not cover each other."""
    axis = np.log(settings) if log_axis else np.asarray(settings)
    gap = float(np.diff(axis).min()) if len(axis) > 1 else 1.0
    shift = (number - (count - 1) / 2) * min(0.08, 0.5 / count) * gap
    return np.exp(np.log(places) + shift) if log_axis else np.asarray(places) + shift


def _draw_series(axes: Any, places: npt.NDArray[np.float64], points: Sequence[SweepPoint], style: SeriesStyle, name: str) -> None:
    values = np.array([point.estimate.value for point in points])
    reach = [
        values - [point.estimate.low for point in points],
        np.array([point.estimate.high for point in points]) - values,
    ]
    axes.errorbar(
        places,
        values,
        yerr=np.clip(reach, 0, None),
        color=style.color,
        linestyle=style.linestyle,
        marker=style.marker,
        capsize=2,
        elinewidth=0.8,
        label=name,
    )
    for place, point in zip(places, points, strict=True):
        if len(point.members) > 1:
            axes.scatter([place] * len(point.members), point.members, s=6, color=style.color, alpha=0.45, linewidth=0, zorder=3)


def plot_differences(results: Sequence[Result], baseline: str, metric: str, target: Target) -> None:
    """Draw each row's difference to the baseline with its paired 95 % interval, the first row on top.

    A score's own interval mostly says which test rows were drawn, which is the same for every run and cancels
    in a difference. A filled marker stands for a claim: a p value over seeds and rows under 0.05 after Holm's
    correction for all that the comparison tested.
    """
    names = [result.row.name for result in results]
    with figure_style([baseline, *names]):
        figure = new_figure(0.75 + 0.17 * len(results))
        axes = figure.subplots()
        axes.axvline(0, color="0.35", linestyle=(0, (4, 2)), linewidth=1)
        style = STYLES[0]
        for place, result in enumerate(results):
            difference = result.difference
            assert difference is not None
            reach = [[difference.value - difference.low], [difference.high - difference.value]]
            axes.errorbar(
                [difference.value],
                [place],
                xerr=np.clip(reach, 0, None),
                color=style.color,
                marker=style.marker,
                markerfacecolor=style.color if result.is_claim else "white",
                elinewidth=0.8,
                capsize=2,
            )
        axes.set_yticks(range(len(results)), names)
        axes.set_ylim(len(results) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", labelsize=7)
        axes.locator_params(axis="x", nbins=4)
        # Under the names too: the panel alone is too narrow for it.
        figure.supxlabel(f"{metric}, difference to {baseline}", fontsize=8)
        save_figure(figure, target)


def plot_heat_map(across: str, down: str, grid: Mapping[tuple[float, float], float], metric: str, target: Target) -> None:
    """Draw the score over two swept flags; the number stands in every cell, an empty cell was not run.

    The colours (cividis) differ in lightness, so they survive a black-and-white print.
    """
    columns, rows = (sorted(set(values)) for values in zip(*grid, strict=True))
    table = np.array([[grid.get((column, row), np.nan) for column in columns] for row in rows])
    with figure_style([across, down]):
        figure = new_figure(0.9 + 0.36 * len(rows))
        axes = figure.subplots()
        image = axes.imshow(table, cmap="cividis", aspect="auto", origin="lower")
        middle = (np.nanmin(table) + np.nanmax(table)) / 2
        for (row, column), value in np.ndenumerate(table):
            if not np.isnan(value):
                color = "white" if value < middle else "black"
                axes.text(column, row, f"{value:.3f}", ha="center", va="center", color=color, fontsize=7)
        axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
        axes.set_yticks(range(len(rows)), [f"{value:g}" for value in rows])
        axes.set_xlabel(across)
        axes.set_ylabel(down)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_title(metric)  # beside the bar it would be longer than a map of few rows is high
        figure.colorbar(image).outline.set_visible(False)
        save_figure(figure, target)
