"""Accuracy over the number of labels, of rounds that each added some."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dml_fast.reporting.plots import short, styles, without_latex
from dml_fast.runs.files import atomic_write


def plot_rounds(
    path: Path,
    title: str,
    labels: Sequence[int],
    students: Sequence[Sequence[float]],
    ensemble: Sequence[float],
) -> None:
    """Draw a line for each student and one for the ensemble.

    Args:
        path: of the PNG; an old one is replaced only by a complete new one.
        title: above the picture.
        labels: of each of R rounds.
        students: R times the accuracies of K students, in 0..1.
        ensemble: R accuracies.
    """
    figure = rounds_figure(title, labels, students, ensemble)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def rounds_figure(
    title: str,
    labels: Sequence[int],
    students: Sequence[Sequence[float]],
    ensemble: Sequence[float],
) -> Figure:
    """Draw the picture of `plot_rounds`."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(short(title, 70), fontsize=12, fontweight="bold", parse_math=False)
    axis = figure.subplots()
    lines = [*zip(*students, strict=True)]
    few = len(labels) <= 30
    for k, (values, (colour, dash)) in enumerate(zip(lines, styles(len(lines)), strict=True)):
        axis.plot(labels, values, color=colour, linestyle=dash, linewidth=1.2, label=f"student {k}")
    axis.plot(
        labels,
        ensemble,
        color="black",
        linewidth=2,
        marker="o" if few else "",
        markersize=4,
        label=f"ensemble, mean {sum(ensemble) / len(ensemble):.1%}",
    )
    axis.set_xlabel("labels")
    axis.set_ylabel("accuracy on the test rows")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axis.legend(loc="lower right", frameon=False, fontsize=9, ncols=1 + len(lines) // 12)
    return without_latex(figure)
