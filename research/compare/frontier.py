"""What a smaller model costs in quality: scores of a comparison's models against their size and their latency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import numpy as np

from research.compare.rows import Member
from research.compare.scores import Comparison, Result
from research.names import METRIC_OF
from research.report.figures import STYLES, SeriesStyle, Target, figure_style, new_figure, save_figure
from research.runs.formats import dig
from research_config import unused_fields

TEACHER_STYLES = [SeriesStyle(color, "-", "*", "") for color in ("#000000", "#808080", "#c0c0c0")]
LOG_COST_RATIO = 10  # costs this many times apart leave the small models no room on a linear axis
LONGEST_NAME_OF_TWO_COLUMNS = 24
FAR_RIGHT = 10  # times the largest cost, beyond any axis


@dataclass(frozen=True)
class FrontierPoint:
    """One model's score and cost; without a name it is a small grey point, without an interval a bare one.

    Attributes:
        distilled: Whether it learned from a teacher.
    """

    name: str | None
    value: float
    interval: tuple[float, float] | None
    parameters: float
    latency_ms: float
    is_teacher: bool = False
    distilled: bool = True


def collect_frontier(comparison: Comparison) -> list[FrontierPoint]:
    """Return a point per row whose size and latency were measured, then one per distinct teacher, by its first row's name.

    Where several rows have a size in common, as in a sweep of losses, the one that is best on validation, of those that
    learned from a teacher and of those that did not, and the baseline carry names and the others become unnamed points:
    a frontier asks what a size can reach. Chosen by the score that is drawn, the best of many would owe its place to
    luck with the test rows.
    """
    rows: dict[tuple[float, bool], list[tuple[Result, FrontierPoint]]] = {}
    teachers: dict[tuple[float, float], FrontierPoint] = {}
    for result in comparison.results:
        costs = [cost for member in result.row.members if (cost := _read_costs(member.run, member.model)) is not None]
        if costs:
            interval = (result.estimate.low, result.estimate.high)
            parameters, latency_ms = np.mean(costs, axis=0).tolist()
            distilled = all(_learns_from_teacher(member) for member in result.row.members)
            point = FrontierPoint(result.row.name, result.estimate.value, interval, parameters, latency_ms, distilled=distilled)
            rows.setdefault((parameters, distilled), []).append((result, point))
    # Named by a row that learned from it rather than by its control.
    for result in sorted(comparison.results, key=lambda result: not all(map(_learns_from_teacher, result.row.members))):
        teacher = _teacher_point(result, comparison)
        if teacher is not None:
            # Runs of a sweep share a teacher but time it each anew: the first timing stands for all.
            teachers.setdefault((teacher.value, teacher.parameters), teacher)
    if len(teachers) == 1:
        teachers = {key: replace(teacher, name="teacher") for key, teacher in teachers.items()}
    points = []
    for group in rows.values():
        best = max(group, key=lambda entry: _validation_score(entry[0], comparison.metric))[0]
        for result, point in group:
            if result is best and len(group) > 2:
                point = replace(point, name=f"{point.name} (best of {len(group)} on validation)")
            elif result is not best and result.difference is not None:
                point = replace(point, name=None, interval=None)
            points.append(point)
    return [*points, *teachers.values()]


def _learns_from_teacher(member: Member) -> bool:
    """Whether a member's model is trained toward a teacher; unused fields of its pipeline say that it is not."""
    return member.model == "student" and "kd_alpha" not in unused_fields(str(member.run.config.get("pipeline")))


def _validation_score(result: Result, metric: str) -> float:
    """Return a row's mean score on validation, more being better; what has none is chosen last."""
    found = [dig(member.run.metrics, member.model, "validation", *METRIC_OF[metric].path) for member in result.row.members]
    if None in found:
        return -math.inf
    return float(np.mean(found)) * (-1 if METRIC_OF[metric].lower_is_better else 1)


def _teacher_point(result: Result, comparison: Comparison) -> FrontierPoint | None:
    """Return the point of the teacher a row learned from, by the scores in each metrics.json: of folds, by their mean."""
    members, path = result.row.members, METRIC_OF[comparison.metric].path
    values = [dig(member.run.metrics, "teacher", comparison.part, *path) for member in members]
    costs = [_read_costs(member.run, "teacher") for member in members]
    if members[0].model == "teacher" or None in values or None in costs:
        return None
    parameters, latency_ms = np.mean(np.array(costs, dtype=float), axis=0).tolist()
    return FrontierPoint(f"teacher of {result.row.name}", float(np.mean(values)), None, parameters, latency_ms, is_teacher=True)


def _read_costs(run: Any, model: str) -> tuple[float, float] | None:
    if not run.has("efficiency.json"):
        return None
    measured = "student" if model == "control" else model  # the control is the same student, trained otherwise
    costs = tuple(dig(run.efficiency, measured, name) for name in ("parameters_total", "latency_ms_batch1"))
    return None if None in costs else (float(costs[0]), float(costs[1]))


def find_front(places: Sequence[float], values: Sequence[float], *, lower_is_better: bool = False) -> list[int]:
    """Return the points that no other beats, the cheapest first: none is at most as costly and better, or cheaper and as good."""
    sign = -1 if lower_is_better else 1
    front: list[int] = []
    for number in sorted(range(len(places)), key=lambda point: (places[point], -sign * values[point])):
        if not front or sign * values[number] > sign * values[front[-1]]:
            front.append(number)
    return front


def plot_frontier(points: Sequence[FrontierPoint], metric: str, target: Target, *, lower_is_better: bool = False) -> None:
    """Draw the score against parameters and against latency, with the Pareto front of the named points.

    Up (down where less is better) and to the left is better. Error bars are 95 % intervals; the teacher's score has
    none. Hollow markers are models that learned from the labels alone.
    """
    named = [point for point in points if point.name is not None]
    names = [str(point.name) for point in named]
    columns = 2 if max(map(len, names)) < LONGEST_NAME_OF_TWO_COLUMNS else 1
    with figure_style(names):
        figure = new_figure(2.2 + 0.15 * -(-(len(names) + 1) // columns))
        size_axes, latency_axes = figure.subplots(1, 2, sharey=True)
        for axes, cost in ((size_axes, lambda point: point.parameters / 1e6), (latency_axes, lambda point: point.latency_ms)):
            places = [cost(point) for point in named]
            front = find_front(places, [point.value for point in named], lower_is_better=lower_is_better)
            axes.step(
                [*(places[number] for number in front), FAR_RIGHT * max(places)],
                [*(named[number].value for number in front), named[front[-1]].value],
                where="post",
                color="0.7",
                linewidth=1,
                zorder=0,
                label="Pareto front",
            )
            for point in points:
                if point.name is None:
                    axes.scatter([cost(point)], [point.value], s=7, color="0.6", linewidth=0, zorder=1)
            styles, stars = (_style_of(number) for number in range(len(named))), cycle(TEACHER_STYLES)
            for place, point in zip(places, named, strict=True):
                _draw_point(axes, place, point, next(stars if point.is_teacher else styles))
            _set_cost_axis(axes, [cost(point) for point in points])
        size_axes.set_ylabel(metric)
        size_axes.set_xlabel("parameters (million)")
        latency_axes.set_xlabel("latency of one text (ms)")
        handles, labels = size_axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=columns, columnspacing=1.0)
        save_figure(figure, target)


def _style_of(number: int) -> SeriesStyle:
    """Return a look of its own for each of 49 points: after the seventh, colours meet other markers."""
    return STYLES[number % len(STYLES)]._replace(marker=STYLES[(number + number // len(STYLES)) % len(STYLES)].marker)


def _set_cost_axis(axes: Any, costs: Sequence[float]) -> None:
    """Show costs in decades where they lie far apart, else from zero."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    if min(costs) <= 0 or max(costs) < LOG_COST_RATIO * min(costs):
        axes.set_xlim(0, 1.12 * max(costs))
        return
    axes.set_xscale("log")
    axes.set_xlim(min(costs) / 1.6, max(costs) * 1.6)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_point(axes: Any, place: float, point: FrontierPoint, style: SeriesStyle) -> None:
    low, high = point.interval or (point.value, point.value)
    axes.errorbar(
        [place],
        [point.value],
        yerr=None if point.interval is None else np.clip([[point.value - low], [high - point.value]], 0, None),
        color=style.color,
        marker=style.marker,
        markersize=8 if point.is_teacher else 5,
        # Without a face and on top, so that the same model trained otherwise stays visible at the same cost.
        markerfacecolor=style.color if point.distilled else "none",
        zorder=2 if point.distilled else 3,
        linestyle="none",
        elinewidth=0.8,
        capsize=2,
        label=point.name,
    )
