"""A picture of what queries find: each query, and next to it its nearest gallery images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dml_fast.data import RetrievalSet
from dml_fast.ranking.result import RankingResult
from dml_fast.reporting.plots import without_latex
from dml_fast.runs.files import atomic_write

_HIT, _MISS, _QUERY = "#008837", "#d7191c", "black"
_INCHES = 1.15  # an image's shorter side


def draw_ranked_lists(path: Path, images: RetrievalSet, result: RankingResult, count: int) -> None:
    """Draw the ranked lists of some queries: hits framed in green, misses in red and dashed.

    The queries are evenly spaced in the order of their average precision, the best first. So the
    picture shows what is found and what is not. Images that are not valid for a query (its identity
    in its camera, junk) are left out, as they are from the scores.

    Args:
        path: of the PNG; an old one is replaced only by a complete new one.
        images: the queries and the gallery.
        result: of a search among them, with ``topk`` at least 1.
        count: how many lists; fewer if fewer queries have a valid match.

    Raises:
        OSError: the file cannot be written.
    """
    figure = lists_figure(images, result, count)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)


def lists_figure(images: RetrievalSet, result: RankingResult, count: int) -> Figure:
    """Draw the picture of `draw_ranked_lists`."""
    chosen = spaced_queries(result.ap, count)
    length = result.topk.shape[1]
    _, _, height, width = images.images.shape
    scale = _INCHES / min(height, width)
    size = ((length + 2.2) * width * scale * 1.12, len(chosen) * (height * scale + 0.42) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{len(chosen)} of {result.n_valid} queries, evenly spaced by average precision (AP)",
        fontsize=11,
    )
    ratios = [1.0, 0.12, *[1.0] * length]
    grid = figure.subplots(len(chosen), length + 2, squeeze=False, width_ratios=ratios)
    for axes, query in zip(grid, chosen, strict=True):
        for axis in axes:
            axis.axis("off")
        about = f"query {_who(images, query)}\nAP {result.ap[query]:.2f}"
        _picture(axes[0], images.picture(query), about, _QUERY)
        for place, item in enumerate(result.topk[query], 1):
            if item < 0:
                break  # the gallery ends
            row = images.queries + int(item)
            hit = images.labels[row] == images.labels[query]
            text = f"{place}: {'hit' if hit else 'miss'}\n{_who(images, row)}"
            _picture(axes[place + 1], images.picture(row), text, _HIT if hit else _MISS)
    return without_latex(figure)


def spaced_queries(ap: NDArray[np.float64], count: int) -> list[int]:
    """Choose queries from the highest to the lowest AP, evenly spaced in that order.

    Args:
        ap: (Q,), NaN for queries without a valid match, which are not chosen.
        count: how many, at least 1.
    """
    ranked = np.argsort(-ap, kind="stable")[: np.count_nonzero(~np.isnan(ap))]
    places = np.linspace(0, len(ranked) - 1, min(count, len(ranked)))
    return [int(query) for query in ranked[np.rint(places).astype(int)]]


def _who(images: RetrievalSet, row: int) -> str:
    camera = "" if images.cams is None else f", cam {images.cams[row]}"
    return f"id {images.labels[row]}{camera}"


def _picture(axis: Axes, pixels: NDArray[np.uint8], text: str, colour: str) -> None:
    """Show one image in a frame.

    Args:
        axis: where to draw.
        pixels: (C, H, W).
        text: above it.
        colour: of frame and text.
    """
    axis.axis("on")
    axis.set(xticks=[], yticks=[])
    shown = pixels.transpose(1, 2, 0)
    gray = shown.shape[2] == 1
    axis.imshow(shown[:, :, 0] if gray else shown, cmap="gray" if gray else None, vmin=0, vmax=255)
    axis.set_title(text, fontsize=7, color=colour, pad=3)
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=3, linestyle="--" if colour == _MISS else "-")
