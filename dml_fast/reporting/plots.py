"""Curves of runs as one PNG: a line for each student of one run, or a line and a band per run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from math import isfinite, nan
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from dml_fast.foreign import shown
from dml_fast.runs.files import atomic_write
from dml_fast.runs.history import (
    EpochLine,
    History,
    best_epoch,
    ensemble_score,
    mean_score,
    of_pairs,
    score_of,
)

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow (too pale
# on white). Black is for the ensemble.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
_GRAY = "#555555"
_MARKED = 12  # up to that many epochs, each point gets a marker
_LOG_RANGE = 20  # a loss that spans more than this factor is drawn on a logarithmic axis
_ERROR_FLOOR = 0.01  # bounds the stretched axis of accuracies at 100 %
_ACCURACY_TICKS = (0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.94, 0.96, 0.98, 0.99, 1)


class _Panel(NamedTuple):
    title: str
    key: Literal["loss", "ce", "kl", "train_acc", "val_acc", "val_mAP", "val_error_px", "ensemble"]
    share: bool  # 0..1, drawn as a percentage

    def values(self, line: EpochLine) -> list[float | None]:
        """Return what a line says: the metric of each student, or the ensemble's score alone."""
        if self.key == "ensemble":
            return [ensemble_score(line)]
        return [student[self.key] for student in line["students"]]

    def show(self, value: float | None) -> str:
        """Return a value in words."""
        if value is None:
            return "-"
        return f"{value:.1%}" if self.share else f"{value:.2f} px"


def _validation(line: EpochLine) -> _Panel:
    """Return the panel of what students are judged by."""
    if of_pairs(line):
        return _Panel("Validation error, px", "val_error_px", False)
    score = score_of(line)
    return _Panel(f"Validation {score.name}", score.key, True)


class _Curve(NamedTuple):
    epochs: list[int]
    values: list[float]
    colour: str
    dash: Any
    width: float = 1.5
    band: tuple[list[float], list[float]] = ([], [])  # lowest and highest, where drawn


_KL = _Panel("Training loss, mutual (KL) part", "kl", False)
_TRAIN = (
    _Panel("Training accuracy", "train_acc", True),
    _Panel("Training loss", "loss", False),
    _Panel("Training loss, cross-entropy part", "ce", False),
    _KL,
)


def plot_curves(path: Path, histories: Mapping[str, History]) -> None:
    """Draw the curves of one run, or of several side by side.

    Args:
        path: of the PNG; an old one is replaced only by a complete new one.
        histories: label to the lines of ``metrics.jsonl``, at least one line each.
    """
    if len(histories) > 1:
        plot_groups(path, {label: [history] for label, history in histories.items()})
    else:
        [(label, history)] = histories.items()
        _save(run_figure(label, history), path)


def plot_groups(path: Path, groups: Mapping[str, Sequence[History]]) -> None:
    """Draw groups of runs side by side.

    Args:
        path: of the PNG; an old one is replaced only by a complete new one.
        groups: label to the histories of runs that differ only by their seeds; all runs are
            judged by the same score.
    """
    _save(groups_figure(groups), path)


def run_figure(label: str, history: History) -> Figure:
    """Draw the curves of one run: a line for each student, and one for the ensemble."""
    figure, axes = _figure(label)
    epochs = [line["epoch"] for line in history]
    best = history[best_epoch(history) - 1]
    chosen = styles(len(best["students"]))
    val = _validation(best)
    for axis, panel in zip(axes, (val, *_TRAIN), strict=False):
        curves = [
            _Curve(epochs, [_number(panel.values(line)[k]) for line in history], *style)
            for k, style in enumerate(chosen)
        ]
        if panel is val:
            ensemble = [_number(ensemble_score(line)) for line in history]
            curves.append(_Curve(epochs, ensemble, "black", "-", width=2.0))
        _draw(axis, panel, curves)
    if len(history) > 1:
        axes[0].axvline(best["epoch"], color=_GRAY, linewidth=1.2, linestyle=":", zorder=1)
    entries = [
        (f"{val.show(value)}  student {k}: {s['arch']}", *style)
        for k, (s, value, style) in enumerate(
            zip(best["students"], val.values(best), chosen, strict=True)
        )
    ]
    entries.append((f"{val.show(ensemble_score(best))}  ensemble", "black", "-"))
    _legend(axes[5], f"{val.title}, best epoch: {best['epoch']} (dotted)", entries)
    return without_latex(figure)


def groups_figure(groups: Mapping[str, Sequence[History]]) -> Figure:
    """Draw the curves of groups of runs: the mean over students and runs, and the range."""
    runs = sum(map(len, groups.values()))
    settings = f"{len(groups)} settings, " if runs > len(groups) else ""
    figure, axes = _figure(f"{settings}{runs} runs")
    chosen = styles(len(groups))
    val = _validation(next(iter(groups.values()))[0][0])
    ensemble = _Panel(f"{val.title} of the ensemble", "ensemble", val.share)
    for axis, panel in zip(axes, (val, ensemble, *_TRAIN[1:]), strict=False):
        spreads = (_spread(histories, panel) for histories in groups.values())
        curves = [
            _Curve(epochs, mean, *style, band=(low, high))
            for (epochs, mean, low, high), style in zip(spreads, chosen, strict=True)
        ]
        _draw(axis, panel, curves)
    entries = [
        (_group_label(label, histories), *style)
        for (label, histories), style in zip(groups.items(), chosen, strict=True)
    ]
    _legend(
        axes[5],
        f"{val.title}, best epoch\nLines: mean over students and runs; bands: range",
        entries,
    )
    return without_latex(figure)


def without_latex(figure: Figure) -> Figure:
    """Return the figure, which a caller's ``text.usetex`` does not send through LaTeX."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_ticklabels(which="both")  # makes them
    for text in figure.findobj(Text):
        text.set_usetex(False)
    return figure


def _figure(title: str) -> tuple[Figure, list[Axes]]:
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(13, 7.5), layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(short(title, 100), fontsize=13, fontweight="bold", parse_math=False)
    return figure, list(figure.subplots(2, 3).flat)


def styles(count: int) -> list[tuple[str, Any]]:
    """Return ``count`` colours and dash patterns, which repeat after 24 (6 colours, 4 patterns)."""
    pairs = [(colour, dash) for dash, colour in product(_DASHES, _COLOURS)]
    return [pairs[i % len(pairs)] for i in range(count)]


def _draw(axis: Axes, panel: _Panel, curves: Sequence[_Curve]) -> None:
    """Draw the lines and bands of one panel, on a scale that fits them."""
    axis.set_title(panel.title, fontsize=11)
    axis.set_xlabel("epoch")
    axis.spines[["top", "right"]].set_visible(False)
    values = [v for c in curves for line in (c.values, *c.band) for v in line if isfinite(v)]
    if not values or (panel is _KL and not any(values)):
        axis.set(xticks=[], yticks=[])
        axis.text(0.5, 0.5, "none", color=_GRAY, ha="center", transform=axis.transAxes)
        return
    for c in curves:
        marker = "o" if len(c.epochs) <= _MARKED else ""
        style = {"linestyle": c.dash, "linewidth": c.width, "marker": marker, "markersize": 3.5}
        axis.plot(c.epochs, c.values, color=c.colour, clip_on=False, **style)
        low, high = c.band
        if low:
            axis.fill_between(c.epochs, low, high, color=c.colour, alpha=0.15, linewidth=0)
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    last = max(epoch for c in curves for epoch in c.epochs)
    margin = max(0.03 * last, 0.2)
    axis.set_xlim(max(1 - margin, 0.5), last + margin)  # without a tick at 0
    ticks = MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
    axis.xaxis.set_major_locator(ticks)
    _scale(axis, panel, min(values), max(values))


def _scale(axis: Axes, panel: _Panel, low: float, high: float) -> None:
    """Choose the vertical axis for values from ``low`` to ``high``."""
    if panel.share:
        if low < 0.8 and high > 0.9:  # else all that matters is squeezed below the upper edge
            axis.set_yscale("function", functions=(_stretch, _unstretch))
            axis.set_ylim(max(low - 0.05, 0), 1)
            axis.yaxis.set_major_locator(FixedLocator(_ACCURACY_TICKS))
        else:
            middle, half = (low + high) / 2, max(0.55 * (high - low), 0.025)
            axis.set_ylim(max(middle - half, 0), min(middle + half, 1))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    elif 0 < low * _LOG_RANGE < high:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif high - low < 0.1 * high:
        axis.set_ylim(0.9 * low, 1.1 * high)


def _stretch(accuracy: Any) -> Any:
    """Map equal ratios of the error to equal steps, less and less so below ``_ERROR_FLOOR``."""
    return -np.log(np.maximum(1 - accuracy, 0) + _ERROR_FLOOR)


def _unstretch(position: Any) -> Any:
    return 1 + _ERROR_FLOOR - np.exp(-position)


def _legend(axis: Axes, title: str, entries: Sequence[tuple[str, str, Any]]) -> None:
    """Fill a cell of the grid with the legend, so that it covers no line."""
    axis.axis("off")
    columns = 1 + len(entries) // 25
    crowded = len(entries) > 14
    length = (56 if crowded else 43) // columns
    handles = [
        Line2D([], [], color=colour, linestyle=dash, linewidth=2, label=short(text, length))
        for text, colour, dash in entries
    ]
    legend = axis.legend(
        handles=handles,
        title=title,
        title_fontsize=10,
        alignment="left",
        loc="upper left",
        borderaxespad=0,
        frameon=False,
        handlelength=2 if crowded else 3,
        fontsize=7 if crowded else 9.5,
        ncols=columns,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _spread(
    histories: Sequence[History], panel: _Panel
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Return the epochs, and for each the mean, lowest and highest over runs and students."""
    values: dict[int, list[float]] = {}
    for history in histories:
        for line in history:
            found = map(_number, panel.values(line))
            values.setdefault(line["epoch"], []).extend(v for v in found if isfinite(v))
    epochs = sorted(values)

    def over(function: Callable[[list[float]], float]) -> list[float]:
        return [function(values[epoch]) if values[epoch] else nan for epoch in epochs]

    return epochs, over(lambda found: sum(found) / len(found)), over(min), over(max)


def _group_label(label: str, histories: Sequence[History]) -> str:
    tops = [history[best_epoch(history) - 1] for history in histories]
    mean = sum(map(mean_score, tops)) / len(tops)
    runs = f" ({len(histories)} runs)" if len(histories) > 1 else ""
    return f"{_validation(tops[0]).show(mean)}  {label}{runs}"


def _number(value: float | None) -> float:
    """Return NaN, a gap in the line, where a student did not train or a metric is not finite."""
    return value if value is not None and isfinite(value) else nan


def short(text: str, length: int) -> str:
    """Return the text in one line, without its middle where it is too long."""
    text = shown(text)
    if len(text) <= length:
        return text
    tail = length // 3
    return f"{text[: length - tail - 1]}…{text[-tail:]}"
