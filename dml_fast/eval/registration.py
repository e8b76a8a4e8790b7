"""Where one image lies in another, by students that compare displacements.

A surface is an array (2R + 1, 2R + 1) with a number for each displacement t = (rows, columns) from
-R to R, at t + R. The mutual information of two images gives one too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dml_fast.errors import UserError, brief, times
from dml_fast.ranking.inputs import ArrayLike, Floats, Ints, as_floats, as_numpy

if TYPE_CHECKING:
    from torch import nn

LEAST = 5  # pixels that one feature sees: a smaller image is mostly margin
_FLIPS: tuple[tuple[int, ...], ...] = ((), (1,), (2,), (1, 2))  # of rows, of columns, of both


class Registration(NamedTuple):
    """How two images lie to each other.

    Attributes:
        offset: (2,) int64, rows and columns in pixels: what is at u in a is at u + R + offset in b.
        logits: (2R + 1, 2R + 1) float64, of each displacement; larger is likelier.
        margin: how far the largest logit stands out: (max - mean) / deviation of all logits; 0
            where all are equal.
    """

    offset: Ints
    logits: NDArray[np.float64]
    margin: float


def register(models: Sequence[nn.Module], a: ArrayLike, b: ArrayLike) -> Registration:
    """Find the displacement between two images, by all displacements of a square.

    A logit is the sum over the students and the mean over the four joint flips of both images. The
    offset has the largest; of equal ones the shortest, and of those the first in row-major order.

    Args:
        models: students (`dml_fast.models.displacement.DisplacementNet`), in any mode, on one
            device; they compute in float32.
        a: (h, w) real numbers, any height and width of at least 5 pixels, numpy or torch.
        b: (h + 2R, w + 2R), with R from 1 to the students' search.

    Raises:
        UserError: no students, or of another kind; sizes that do not fit; an image has a number
            that is not finite, or is constant; a student's logits are not finite.
    """
    first, second = as_image(a, "a"), as_image(b, "b")
    search = search_of(models)
    more = [there - here for there, here in zip(second.shape, first.shape, strict=True)]
    if more[0] != more[1] or more[0] % 2 or not 1 <= more[0] // 2 <= search:
        raise UserError(
            f"a is {times(first.shape)} and b {times(second.shape)} pixels: b must be wider on "
            f"each side by the same number of pixels, 1 to {search}"
        )
    return of_surface(surfaces(models, first[None], second[None])[0])


def of_surface(logits: NDArray[np.float64]) -> Registration:
    """Return the optimum of a surface, by the rule of `register`."""
    radius = len(logits) // 2
    steps = np.arange(-radius, radius + 1)
    rows, columns = (x.ravel() for x in np.meshgrid(steps, steps, indexing="ij"))
    nearest_first = np.argsort(rows**2 + columns**2, kind="stable")
    best = nearest_first[logits.ravel()[nearest_first].argmax()]
    spread = logits.std()
    margin = float((logits.max() - logits.mean()) / spread) if spread > 0 else 0.0
    return Registration(np.array([rows[best], columns[best]], np.int64), logits, margin)


def surfaces(models: Sequence[nn.Module], a: Floats, b: Floats) -> NDArray[np.float64]:
    """Return the surfaces of N pairs of images of one size; see `register`.

    Args:
        models: of `register`.
        a: (N, h, w) of `as_image`.
        b: (N, h + 2R, w + 2R), likewise.

    Returns:
        (N, 2R + 1, 2R + 1).

    Raises:
        UserError: a student's logits are not finite.
    """
    import torch

    from dml_fast.eval.classification import evaluating

    device = next(models[0].parameters()).device
    one, other = (
        torch.from_numpy((x - x.mean((1, 2), keepdims=True)).astype(np.float32)).to(device)[:, None]
        for x in (a, b)
    )
    side = b.shape[1] - a.shape[1] + 1
    total = np.zeros((len(a), side, side))
    with evaluating(models), torch.inference_mode():
        for k, model in enumerate(models):
            for flip in _FLIPS:
                dims = [1 + dim for dim in flip]
                logits = model.displacements(one.flip(dims), other.flip(dims))  # type: ignore[operator]
                found = logits.double().cpu().numpy()
                if not np.isfinite(found).all():
                    raise UserError(
                        f"student {k} gives logits that are not finite: leave it out, or take an "
                        "earlier checkpoint"
                    )
                total += np.flip(found, flip)
    return total / len(_FLIPS)


def search_of(models: Sequence[nn.Module]) -> int:
    """Return the largest displacement that all students tell, in pixels.

    Raises:
        UserError: there are none, or some are of another kind.
    """
    import torch
    from torch import nn

    from dml_fast.models.displacement import DisplacementNet

    given: Any = models
    if not isinstance(given, Sequence | nn.ModuleList):
        raise UserError(f"models is {brief(given)}: give a list of students")
    if not models:
        raise UserError("there are no students to register with: give at least one")
    for model in models:
        if not isinstance(model, DisplacementNet):
            raise UserError(
                f"a student is {brief(model)}, which compares no displacements: give students of "
                "a run on pairs: data"
            )
        if model.channels != (1, 1) or model.log_scale.dtype != torch.float32:
            raise UserError(
                f"a student takes images of {model.channels} channels in {model.log_scale.dtype}: "
                "give students for one channel, in float32"
            )
    return min(model.search for model in models if isinstance(model, DisplacementNet))


def as_image(value: ArrayLike, name: str) -> Floats:
    """Return an image as (h, w) float32 or float64.

    Raises:
        UserError: it is none, too small, constant, or has a number that is not finite.
    """
    image = as_floats(value, name, "one channel, (height, width)")
    if min(image.shape) < LEAST:
        raise UserError(
            f"{name} has {times(image.shape)} pixels: give at least {LEAST} in each direction"
        )
    if len(wrong := np.argwhere(~np.isfinite(image))):
        row, column = wrong[0].tolist()
        raise UserError(
            f"{name} is {image[row, column]} at row {row}, column {column}, and not finite in "
            f"{len(wrong)} of {image.size} pixels: give real numbers"
        )
    if (image == image[0, 0]).all():
        raise UserError(
            f"{name} is {image[0, 0]:g} everywhere, so nothing in it can be found: give an image "
            "with contrast"
        )
    return image


def climb(surface: ArrayLike, start: tuple[int, int]) -> tuple[int, int]:
    """Climb from a displacement to the highest of its eight neighbours, until none is higher.

    Args:
        surface: (2R + 1, 2R + 1) numbers; of equal neighbours the first in row-major order is next.
        start: rows and columns, each from -R to R.

    Returns:
        The displacement at the end, which is one of `local_maxima`.

    Raises:
        UserError: the surface is not square with an odd side, not finite, or start is outside.
    """
    values = _padded(surface)
    radius = len(values) // 2 - 1
    if max(map(abs, start)) > radius:
        raise UserError(f"start is {start}: give rows and columns from {-radius} to {radius}")
    row, column = (x + radius + 1 for x in start)
    while True:
        around = values[row - 1 : row + 2, column - 1 : column + 2]
        if around.max() <= values[row, column]:
            return int(row - radius - 1), int(column - radius - 1)
        down, right = divmod(int(around.argmax()), 3)
        row, column = row + down - 1, column + right - 1


def local_maxima(surface: ArrayLike) -> Ints:
    """Return the displacements that none of their eight neighbours is above.

    Args:
        surface: (2R + 1, 2R + 1) numbers.

    Returns:
        (M, 2) rows and columns from -R to R, in row-major order. Each of equal neighbours counts.

    Raises:
        UserError: the surface is not square with an odd side, or not finite.
    """
    values = _padded(surface)
    side = len(values) - 2
    steps = range(3)
    around = [values[r : r + side, c : c + side] for r in steps for c in steps]
    return np.argwhere(np.max(around, axis=0) <= values[1:-1, 1:-1]) - side // 2


def _padded(surface: ArrayLike) -> NDArray[np.float64]:
    """Return a surface with minus infinity around it."""
    values = as_numpy(surface, "the surface").astype(np.float64)
    if values.ndim != 2 or len(values) != values.shape[1] or not len(values) % 2:
        raise UserError(
            f"the surface has shape {values.shape}: give a number for each displacement, "
            "(2R + 1, 2R + 1)"
        )
    if not np.isfinite(values).all():
        raise UserError("the surface has numbers that are not finite: give real numbers")
    return np.pad(values, 1, constant_values=-np.inf)
