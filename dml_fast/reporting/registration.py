"""A picture of two registered images: the surface, and the pair before and after."""

from __future__ import annotations

from typing import IO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from dml_fast.reporting.plots import short, without_latex

_TINTS = np.array([[0.95, 0.35, 0.0], [0.0, 0.5, 1.0]])  # of edges: their sum is near white


def draw_registration(
    file: IO[bytes],
    title: str,
    names: tuple[str, str],
    a: NDArray[np.floating],
    b: NDArray[np.floating],
    offset: tuple[int, int],
    surface: NDArray[np.float64],
) -> None:
    """Draw both images, their edges laid over each other before and after, and the surface.

    Two modalities have few grey levels in common but many edges. Those of a are orange, those of b
    are blue, and where both are at one place they are white.

    Args:
        file: gets the PNG.
        title: above the picture.
        names: of a and of b.
        a: (h, w).
        b: (h + 2R, w + 2R).
        offset: rows and columns: what is at u in a is at u + R + offset in b.
        surface: (2R + 1, 2R + 1), the logit of each displacement.
    """
    figure = registration_figure(title, names, a, b, offset, surface)
    figure.savefig(file, format="png", dpi=110)


def registration_figure(
    title: str,
    names: tuple[str, str],
    a: NDArray[np.floating],
    b: NDArray[np.floating],
    offset: tuple[int, int],
    surface: NDArray[np.float64],
) -> Figure:
    """Draw the picture of `draw_registration`."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(short(title, 110), fontsize=12, fontweight="bold", parse_math=False)
    axes = figure.subplot_mosaic(
        [["a", "b", "surface"], ["before", "after", "surface"]], width_ratios=[1, 1, 1.5]
    )
    rows, columns = offset
    before, after = _window(b, a.shape, (0, 0)), _window(b, a.shape, offset)
    edges = _edges(a)
    moved = f"{rows:+d} rows, {columns:+d} columns"
    height, width = a.shape
    _picture(axes["a"], a, f"{short(names[0], 32)}\n{height} x {width} pixels")
    _picture(axes["b"], after, f"{short(names[1], 32)}\nat {moved}")
    _picture(axes["before"], _overlay(edges, _edges(before)), "edges before: orange and blue")
    _picture(axes["after"], _overlay(edges, _edges(after)), "edges after: white where they meet")
    _surface(axes["surface"], surface, offset)
    return without_latex(figure)


def _surface(axis: Axes, surface: NDArray[np.float64], offset: tuple[int, int]) -> None:
    radius = len(surface) // 2
    edge = radius + 0.5
    image = axis.imshow(surface, cmap="viridis", extent=(-edge, edge, edge, -edge))
    axis.plot(0, 0, marker="+", color="red", markersize=11, linestyle="", label="as given")
    axis.plot(
        offset[1],
        offset[0],
        marker="o",
        markerfacecolor="none",
        markeredgecolor="red",
        markeredgewidth=2,
        markersize=13,
        linestyle="",
        label=f"optimum {offset[0]:+d}, {offset[1]:+d}",
    )
    axis.set(xlabel="columns", ylabel="rows", title="logit of each displacement")
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_locator(MaxNLocator(integer=True))
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False)
    axis.figure.colorbar(image, ax=axis, shrink=0.7)


def _picture(axis: Axes, pixels: NDArray[np.floating], title: str) -> None:
    """Show grey (h, w), or colours (h, w, 3) in 0..1."""
    if pixels.ndim == 2:
        low, high = np.percentile(pixels, [1, 99])
        axis.imshow(pixels, cmap="gray", vmin=low, vmax=max(high, low + 1e-12))
    else:
        axis.imshow(pixels)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=10, parse_math=False)


def _window(
    b: NDArray[np.floating], size: tuple[int, ...], offset: tuple[int, int]
) -> NDArray[np.floating]:
    """Return the part of b, of the size of a, that an offset puts on a."""
    top, left = ((there - here) // 2 for there, here in zip(b.shape, size, strict=True))
    top, left = top + offset[0], left + offset[1]
    return b[top : top + size[0], left : left + size[1]]


def _edges(image: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return the length of the gradient, (h, w), its 98th percentile as 1."""
    down, right = np.gradient(image.astype(np.float64))
    length = np.hypot(down, right)
    scale = np.percentile(length, 98) or length.max() or 1.0
    return np.asarray(np.clip(length / scale, 0, 1))


def _overlay(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return the edges of two images as colours (h, w, 3)."""
    return np.asarray(np.clip(a[..., None] * _TINTS[0] + b[..., None] * _TINTS[1], 0, 1))
