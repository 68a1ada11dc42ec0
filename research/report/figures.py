"""One function per figure: data in, a PNG out.

matplotlib is imported when a figure is drawn and its global state is left alone: no pyplot, and the
style lasts for one figure. The same data give the same bytes. Figures are one paper column wide; models
differ in colour (Okabe and Ito, "Color Universal Design", 2008) and in line, marker or hatch, so that
a black-and-white print still tells them apart. A target is a path or an open binary file.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from research.components import LOSS_COMPONENTS
from research.names import HEADLINE_METRIC, METRIC_OF, SCORES_PER_EPOCH
from research.report.fonts import find_fonts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FloatArray = npt.NDArray[np.floating[Any]]
Target = Path | BinaryIO
COLUMN_WIDTH_IN = 3.4
MAX_HEIGHT_IN = 200.0  # Agg draws at most 2**16 pixels
MAX_PANELS = 24
DRAWN_CELLS = 1000  # what a panel can tell apart along an axis
SPARSE_BIN = 10
MAX_LABEL_LENGTH = 28
RC_PARAMS: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.5,
    "hatch.linewidth": 0.6,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "savefig.dpi": 300,
    "text.parse_math": False,  # a label may hold a dollar sign
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
}


class SeriesStyle(NamedTuple):
    """How one model or one curve looks in every figure."""

    color: str
    linestyle: Any
    marker: str
    hatch: str


# Okabe and Ito's palette without its yellow, which vanishes on white.
STYLES = (
    SeriesStyle("#0072B2", "-", "o", ""),
    SeriesStyle("#D55E00", "--", "s", "////"),
    SeriesStyle("#009E73", "-.", "^", "...."),
    SeriesStyle("#CC79A7", ":", "D", "xxxx"),
    SeriesStyle("#56B4E9", (0, (5, 1, 1, 1, 1, 1)), "v", "\\\\\\\\"),
    SeriesStyle("#E69F00", (0, (1, 1)), "P", "++++"),
    SeriesStyle("#000000", (0, (7, 2)), "x", "oooo"),
)
MODEL_STYLES = {"teacher": STYLES[0], "student": STYLES[1], "control": STYLES[2]}
LOSS_CURVES = {component.name: component.label for component in LOSS_COMPONENTS}
SCORE_CURVES = {f"val_{name}": METRIC_OF[name].short for name in SCORES_PER_EPOCH}
HEADLINE_CURVE = f"val_{HEADLINE_METRIC.name}"


class Reliability(Protocol):
    """Bins of a reliability diagram, as `research.evaluation.calibration.compute_calibration` returns them."""

    @property
    def mean_prob(self) -> npt.NDArray[np.float64]:
        """The mean probability in each bin, NaN in an empty one."""

    @property
    def observed_rate(self) -> npt.NDArray[np.float64]:
        """The share of positives in each bin, NaN in an empty one."""

    @property
    def count(self) -> npt.NDArray[np.int64]:
        """The number of cells in each bin."""


def plot_training(
    history: Sequence[Mapping[str, float | None]],
    target: Target,
    best_epoch: int | None = None,
    control: Sequence[Mapping[str, float | None]] = (),
) -> None:
    """Draw the loss components and the validation scores per epoch, one panel above the other.

    `history` holds the rows of history.csv. A component that was never computed is left out; so is the
    panel of losses when there are none. `best_epoch` is marked by a vertical line, and named when it is the last one,
    since the model then had not stopped improving. Of the `control`, the rows
    of its own history, only macro-F1 is drawn: its losses are sums of other terms.
    """
    with figure_style():
        losses, scores = _present_curves(history, LOSS_CURVES), _present_curves(history, SCORE_CURVES)
        figure = new_figure(4.2)
        loss_axes, score_axes = figure.subplots(2, 1, sharex=True)
        _draw_curves(loss_axes, history, losses)
        _draw_curves(score_axes, history, scores)
        if control:
            style = MODEL_STYLES["control"]
            _draw_curve(
                score_axes, control, HEADLINE_CURVE, f"{HEADLINE_METRIC.short}, control", style._replace(color="0.45", marker="x")
            )
        loss_axes.set_ylabel("loss")
        score_axes.set_ylabel("validation score (0 to 1)")
        score_axes.set_xlabel("epoch")
        score_axes.xaxis.get_major_locator().set_params(integer=True)
        if _spans_decades(history, losses):
            _use_log_scale(loss_axes)
            loss_axes.set_ylabel("loss (log scale)")
        if best_epoch is not None:
            for axes in (loss_axes, score_axes):
                axes.axvline(best_epoch, color="0.5", linewidth=0.8, linestyle=":", zorder=0)
            is_last = bool(history) and best_epoch == history[-1].get("epoch")
            name = "best epoch: the last" if is_last else "best epoch"
            score_axes.plot([], [], color="0.5", linewidth=0.8, linestyle=":", label=name)
        for axes in (loss_axes, score_axes):
            if axes.get_legend_handles_labels()[0]:
                axes.legend(
                    loc="lower center",
                    bbox_to_anchor=(0.45, 1.0),
                    ncols=_legend_columns(len(axes.get_legend_handles_labels()[0])),
                    handlelength=2.2,
                    handletextpad=0.4,
                    columnspacing=0.8,
                )
        save_figure(figure, target)


def plot_label_f1(
    scores: Mapping[str, Mapping[str, float | None]],
    target: Target,
    intervals: Mapping[str, Mapping[str, tuple[float, float] | None]] = MappingProxyType({}),
) -> None:
    """Draw each label's F1 as bars grouped by model, with a line from one end of its interval to the other.

    `scores` is {model: {label: F1}}, in the order to draw; None leaves a gap. `intervals` holds both ends of each.
    Bars lie flat so that long label names stay readable.
    """
    labels = list(dict.fromkeys(label for of_model in scores.values() for label in of_model))
    with figure_style(labels):
        figure = new_figure(0.8 + len(labels) * (0.14 * len(scores) + 0.1))
        axes = figure.subplots()
        thickness = 0.8 / max(1, len(scores))
        for number, (model, of_model) in enumerate(scores.items()):
            places = np.arange(len(labels)) + (number - (len(scores) - 1) / 2) * thickness
            values = np.array([_to_float(of_model.get(label)) for label in labels])
            ends = [intervals.get(model, {}).get(label) or (math.nan, math.nan) for label in labels]
            _draw_bars(axes, model, number, places, thickness * 0.92, values, np.array(ends).reshape(-1, 2))
        axes.set_yticks(np.arange(len(labels)), [_shorten(label) for label in labels])
        axes.set_ylim(len(labels) - 0.45, -0.55)
        axes.set_xlim(0, 1.12)
        axes.set_xticks(np.linspace(0, 1, 6))
        drawn = any(end for of_model in intervals.values() for end in of_model.values())
        axes.set_xlabel("F1 on the test part" + (" and its 95 % interval" if drawn else " (0 to 1)"))
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        if scores:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
        save_figure(figure, target)


def _draw_bars(
    axes: Axes, model: str, number: int, places: FloatArray, thickness: float, values: FloatArray, ends: FloatArray
) -> None:
    """Draw one model's bars (C,), the lines between both ends (C, 2) of their intervals, and their values."""
    style = _model_style(model, number)
    look: dict[str, Any] = {"color": style.color, "hatch": style.hatch, "edgecolor": "white", "linewidth": 0}
    axes.barh(places, np.nan_to_num(values), thickness, label=model, **look)
    known = ~np.isnan(ends).any(axis=1)
    # A light line around the dark one keeps both visible on a bar.
    axes.hlines(places[known], ends[known, 0], ends[known, 1], color="white", linewidth=1.8)
    axes.hlines(places[known], ends[known, 0], ends[known, 1], color="black", linewidth=1.0)
    for place, value, end in zip(places, values, np.fmax(values, ends[:, 1]), strict=True):
        text = "undefined" if math.isnan(value) else f"{value:.2f}"
        axes.text(np.nan_to_num(end) + 0.01, place, text, va="center", fontsize=6)


def plot_precision_recall(
    label_names: Sequence[str], labels: FloatArray, probs: Mapping[str, FloatArray], target: Target
) -> None:
    """Draw a precision-recall panel per label with a curve per model.

    `labels` is (N, C) with nan where unknown, `probs` is {model: (N, C)}. A dotted line marks the share of
    positives, which is the precision of guessing. At most MAX_PANELS labels are drawn, the first ones.
    """
    shown = list(label_names)[:MAX_PANELS]
    with figure_style(shown):
        num_columns = min(2, len(shown))
        num_rows = math.ceil(len(shown) / num_columns)
        figure = new_figure(0.7 + 1.45 * num_rows)
        grid = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False).ravel()
        for column, label in enumerate(shown):
            axes = grid[column]
            axes.set_title(_shorten(label, 22), pad=3, fontsize=7)
            known = ~np.isnan(labels[:, column])
            truth = labels[known, column] == 1
            if not truth.any():
                axes.text(0.5, 0.5, "no positives", ha="center", va="center", fontsize=7, color="0.4")
                continue
            _draw_precision_recall(axes, truth, {model: values[known, column] for model, values in probs.items()})
        for axes in grid[len(shown) :]:
            axes.remove()
        grid[0].set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.05), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        if len(shown) % 2 and len(shown) > 1:
            grid[len(shown) - 2].tick_params(labelbottom=True)  # nothing below it carries the axis
        figure.supxlabel("recall", fontsize=8)
        figure.supylabel("precision", fontsize=8)
        handles = [_legend_line(model, number) for number, model in enumerate(probs)]
        handles.append(_line(color="0.5", linestyle=":", linewidth=0.8, label="share of positives"))
        figure.legend(handles=handles, loc="outside upper center", ncols=_legend_columns(len(handles)), columnspacing=1.0)
        if len(label_names) > len(shown):
            figure.suptitle(f"first {len(shown)} of {len(label_names)} labels", fontsize=8)
        save_figure(figure, target)


def plot_reliability(tables: Mapping[str, Reliability], target: Target) -> None:
    """Draw predicted probability against the observed share of positives per model, and below it how many cells each bin holds.

    A model on the diagonal is calibrated, one below it overconfident. Empty bins are skipped, and those of
    under SPARSE_BIN cells, whose share is mostly chance, are hollow and off the line.
    """
    with figure_style():
        figure = new_figure(3.9)
        axes, count_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        axes.plot([0, 1], [0, 1], color="0.5", linestyle=":", linewidth=0.8, label="calibrated")
        for number, (model, table) in enumerate(tables.items()):
            style = _model_style(model, number)
            filled = table.count >= SPARSE_BIN
            sparse = (table.count > 0) & ~filled
            line = {"color": style.color, "linestyle": style.linestyle, "label": model}
            axes.plot(table.mean_prob[filled], table.observed_rate[filled], marker=style.marker, **line)
            hollow = {"facecolor": "white", "edgecolor": style.color, "linewidth": 0.6}
            axes.scatter(table.mean_prob[sparse], table.observed_rate[sparse], s=9, marker=style.marker, zorder=1.5, **hollow)
            edges = np.linspace(0, 1, len(table.count) + 1)
            count_axes.stairs(table.count, edges, baseline=None, linewidth=1.2, **line)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="observed share of positives")
        count_axes.set(xlabel="predicted probability", ylabel="label cells")
        if sum(int(table.count.sum()) for table in tables.values()):
            _use_log_scale(count_axes)  # most cells of a rare label lie near zero
            count_axes.set_ylim(bottom=0.7)
        axes.legend(loc="upper left")
        figure.align_ylabels()
        save_figure(figure, target)


def thin_points(points: FloatArray) -> FloatArray:
    """Leave out points (K, 2) of the unit square that would be drawn on the one before them; the last one stays."""
    cells = np.round(points * DRAWN_CELLS)
    kept = np.append(True, (cells[1:] != cells[:-1]).any(axis=1))
    kept[-1] = True
    return points[kept]


@contextmanager
def figure_style(texts: Iterable[str] = ()) -> Iterator[None]:
    """Set the style of one figure, with fonts for `texts`; a user's matplotlibrc changes nothing in it."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .*missing from font")  # said once, by find_fonts
        matplotlib.rcdefaults()
        parameters: Any = matplotlib.rcParams
        parameters.update(RC_PARAMS, **{"font.family": find_fonts("".join(texts))})
        yield


def new_figure(height_in: float) -> Figure:
    """Return an empty figure, one paper column wide."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(COLUMN_WIDTH_IN, min(height_in, MAX_HEIGHT_IN)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, target: Target) -> None:
    """Write a PNG without matplotlib's version in it, so that the same data give the same bytes."""
    figure.savefig(target, format="png", metadata={"Software": None})


def _model_style(model: str, number: int) -> SeriesStyle:
    return MODEL_STYLES.get(model, STYLES[number % len(STYLES)])


def _line(**settings: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **settings)


def _legend_columns(entries: int) -> int:
    """Return columns that fill a legend's rows evenly: one row of up to three entries, else two."""
    return entries if entries <= 3 else -(-entries // 2)


def _legend_line(model: str, number: int) -> Any:
    style = _model_style(model, number)
    return _line(color=style.color, linestyle=style.linestyle, label=model)


def _present_curves(history: Sequence[Mapping[str, float | None]], curves: Mapping[str, str]) -> dict[str, str]:
    return {name: text for name, text in curves.items() if any(row.get(name) is not None for row in history)}


def _draw_curves(axes: Axes, history: Sequence[Mapping[str, float | None]], curves: Mapping[str, str]) -> None:
    for number, (name, text) in enumerate(curves.items()):
        _draw_curve(axes, history, name, text, STYLES[number % len(STYLES)])


def _draw_curve(axes: Axes, history: Sequence[Mapping[str, float | None]], name: str, text: str, style: SeriesStyle) -> None:
    epochs = [_to_float(row.get("epoch")) for row in history]
    values = [_to_float(row.get(name)) for row in history]
    axes.plot(epochs, values, color=style.color, linestyle=style.linestyle, marker=style.marker, label=text)


def _spans_decades(history: Sequence[Mapping[str, float | None]], curves: Iterable[str]) -> bool:
    """Say whether a linear axis would flatten the smaller curves; a log axis needs every value above 0."""
    values = [value for row in history for name in curves if (value := row.get(name)) is not None]
    return bool(values) and min(values) > 0 and max(values) > 20 * min(values)


def _use_log_scale(axes: Axes) -> None:
    """Scale y by decades, with plain numbers as ticks since powers of ten need the mathtext that is off."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_precision_recall(axes: Axes, truth: npt.NDArray[np.bool_], probs: Mapping[str, FloatArray]) -> None:
    from sklearn.metrics import average_precision_score, precision_recall_curve

    for number, (model, values) in enumerate(probs.items()):
        style = _model_style(model, number)
        precision, recall, _ = precision_recall_curve(truth, values)
        precision[-1] = precision[-2]  # the curve ends at precision 1 by convention, which would draw a spike
        points = thin_points(np.stack([recall, precision], axis=1)[::-1])
        line = {"color": style.color, "linestyle": style.linestyle}
        axes.step(points[:, 0], points[:, 1], where="pre", linewidth=1.0, **line)
        area = f"AP {model} {average_precision_score(truth, values):.2f}"
        height = 0.06 + 0.12 * (len(probs) - 1 - number)
        backing = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5}  # keeps it readable on a curve
        axes.text(0.05, height, area, transform=axes.transAxes, color=style.color, fontsize=6, bbox=backing)
    axes.axhline(truth.mean(), color="0.5", linestyle=":", linewidth=0.8)


def _shorten(label: str, length: int = MAX_LABEL_LENGTH) -> str:
    label = " ".join(label.split())
    return label if len(label) <= length else label[: length - 1] + "…"


def _to_float(value: float | None) -> float:
    return math.nan if value is None else float(value)
