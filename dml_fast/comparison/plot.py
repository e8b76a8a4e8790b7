"""Paired differences as a picture: a dot for each seed, and the interval of the mean."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dml_fast.comparison.statistics import paired
from dml_fast.comparison.tables import Result
from dml_fast.reporting.plots import short, styles, without_latex
from dml_fast.runs.files import atomic_write

_COLUMNS = 3
_SPREAD = 0.12  # of the dots of one method, up and down


def plot_differences(path: Path, result: Result) -> None:
    """Draw one panel for each measure; an old picture is replaced by a complete new one only."""
    figure = differences_figure(result)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def differences_figure(result: Result) -> Figure:
    """Return the picture of `plot_differences`."""
    methods, measures = result.names[1:], result.measures
    rows = -(-len(measures) // _COLUMNS)
    figure = Figure(
        figsize=(4 * _COLUMNS, rows * (1.5 + 0.4 * len(methods)) + 0.8), layout="constrained"
    )
    FigureCanvasAgg(figure)
    figure.suptitle(
        short(f"{result.contestants[0].config.data}: difference from {result.names[0]}", 90),
        fontsize=12,
        fontweight="bold",
        parse_math=False,
    )
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axis in panels[len(measures) :]:
        axis.set_visible(False)
    for axis, measure in zip(panels, measures, strict=False):
        scale = 100 if measure.percent else 1
        axis.axvline(0, color="#888888", linewidth=1)
        for place, (name, (colour, _)) in enumerate(
            zip(methods, styles(len(methods)), strict=True)
        ):
            values = [scale * d for d in result.differences(name, measure)]
            found = paired(values)
            step = 2 * _SPREAD / max(len(values) - 1, 1)
            heights = [place + 0.2 - _SPREAD + step * i for i in range(len(values))]
            axis.plot(values, heights, "o", color=colour, markersize=3.5, alpha=0.6)
            if found.seeds > 1:
                axis.plot([found.low, found.high], [place - 0.15] * 2, color=colour, linewidth=2)
            axis.plot(found.mean, place - 0.15, "D", color=colour, markersize=6)
        axis.set_yticks(range(len(methods)))
        axis.set_yticklabels([short(name, 18) for name in methods], parse_math=False)
        axis.set_ylim(len(methods) - 0.5, -0.5)
        unit = "points" if measure.percent else "nats" if measure.key.endswith("nll") else ""
        better = "more is better" if measure.up else "less is better"
        axis.set_title(f"{measure.title} ({unit + ', ' if unit else ''}{better})", fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    figure.supxlabel(
        f"dots: {len(result.seeds)} seeds; diamond and line: mean and 95 % interval", fontsize=9
    )
    return without_latex(figure)
