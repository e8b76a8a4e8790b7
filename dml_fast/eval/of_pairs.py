"""A finished run on pairs registers images of files, or the pairs that it was trained with."""

from __future__ import annotations

import logging
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from dml_fast.data import PairSet
from dml_fast.data.npz import array_in
from dml_fast.data.offset_files import offsets_text
from dml_fast.engine.precision import pick_device
from dml_fast.errors import UserError
from dml_fast.eval.prediction_files import new_file
from dml_fast.eval.registration import (
    LEAST,
    Registration,
    as_image,
    of_surface,
    register,
    search_of,
    surfaces,
)
from dml_fast.foreign import shown
from dml_fast.ranking.inputs import Floats, Ints
from dml_fast.reporting.console import progress
from dml_fast.runs.folder import Run
from dml_fast.runs.trained import Trained, open_data

_log = logging.getLogger("dml_fast")
_SAVE = "give an array that numpy.save wrote"
_AT_ONCE = 2**18  # pixels of a that are compared together


class StudentsOfPairs(NamedTuple):
    """The students of a run on pairs.

    Attributes:
        run: the run.
        models: of the checkpoint, all whose weights are finite.
        search: R, in pixels.
        words: how many students of which checkpoint, for what is printed.
    """

    run: Run
    models: list[nn.Module]
    search: int
    words: str

    @classmethod
    def load(cls, folder: Path, checkpoint: str, device: str) -> StudentsOfPairs:
        """Load all students of a checkpoint; one that diverged is left out, and named.

        Args:
            folder: of the run.
            checkpoint: best, last or previous.
            device: auto, cpu, cuda or cuda:N.

        Raises:
            UserError: no such run, checkpoint or device; a run on other data; no student's weights
                are finite.
        """
        run = Run.open(folder)
        kind = run.facts.inputs[0].kind
        if kind != "pair":
            raise UserError(
                f"{run.folder} was trained on {kind}s and registers nothing: give a run on "
                "--data pairs:FILE.npz"
            )
        trained = Trained.load(run, checkpoint, weights=run.config.weights)
        place = pick_device(device)
        models = []
        for k in range(len(trained.archs)):
            model = trained.model(k).to(place)
            if all(bool(value.isfinite().all()) for value in model.state_dict().values()):
                models.append(model)
            else:
                _log.warning("student %d's weights are not finite: it is left out", k)
        if not models:
            raise UserError(
                f"no student of {run.folder} has finite weights in {checkpoint}.pt: give another "
                "--checkpoint"
            )
        count = f"{len(models)} students" if len(models) > 1 else "one student"
        return cls(run, models, search_of(models), f"{count} of {shown(trained.path.name)}")


def register_files(
    students: StudentsOfPairs,
    a: Path,
    b: Path,
    *,
    search: int = 0,
    surface: Path | None = None,
    picture: Path | None = None,
) -> dict[str, Any]:
    """Register two images of .npy files.

    Args:
        students: the students.
        a: (h, w) real numbers.
        b: (h + 2m, w + 2m), with any m from 0. With m below the search, a loses a border; with m
            above it, b does. Either is said.
        search: R, the largest displacement in pixels; 0 for the students'.
        surface: an .npz file for ``logits`` (2R + 1, 2R + 1) float64, ``offset`` (2,) int64 and
            ``margin``; or None.
        picture: a PNG for `dml_fast.reporting.registration.draw_registration`; or None.

    Returns:
        What ``--json`` prints.

    Raises:
        UserError: a search above the students'; a file is missing or no such array; as `register`;
            a file cannot be written.
    """
    most = students.search
    if search > most:
        raise UserError(
            f"--search is {search}, and {students.run.folder} learned displacements of up to "
            f"{most} pixels: give {most} or less, or train with --search {search}"
        )
    radius = search or most
    first, second, cut = _fitting(array_in(a, _SAVE), array_in(b, _SAVE), radius, (a, b))
    found = register(students.models, first, second)
    if surface is not None:
        with new_file("--surface", surface) as file:
            np.savez(file, logits=found.logits, offset=found.offset, margin=found.margin)
    rows, columns = found.offset.tolist()
    if picture is not None:
        # matplotlib takes a second to import
        from dml_fast.reporting.registration import draw_registration

        title = f"{rows:+d} rows, {columns:+d} columns, peak {found.margin:.1f} deviations"
        with new_file("--picture", picture) as file:
            draw_registration(
                file, title, (a.name, b.name), first, second, (rows, columns), found.logits
            )
    return {
        "run": str(students.run.folder),
        "a": str(a),
        "b": str(b),
        "by": students.words,
        "search": radius,
        "rows": rows,
        "columns": columns,
        "margin": found.margin,
        "cut": cut,
        "surface": None if surface is None else str(surface),
        "picture": None if picture is None else str(picture),
    }


def register_training_pairs(students: StudentsOfPairs, keep: float, out: Path) -> dict[str, Any]:
    """Register the pairs that a run could train with, and write the offsets of the surest.

    A pair starts from its known offset: that of the run's ``--offsets``, or for pairs which that
    leaves out, and without it, that of the data. What is found is added to it. The pairs are those
    whose optimum stands out most, by `Registration.margin`.

    Args:
        students: the students.
        keep: the share of the pairs to write, above 0 and up to 1.
        out: a file for ``--offsets`` (`dml_fast.data.offset_files`), in the order of the data.

    Returns:
        What ``--json`` prints.

    Raises:
        UserError: the data cannot be read or have changed; fewer pairs are kept than a batch of
            the run; the file cannot be written.
    """
    run = students.run
    pairs = open_data(run, unlabelled=True).train
    assert isinstance(pairs, PairSet)
    batch = min(run.config.batch_size, len(pairs))
    count = ceil(round(keep * len(pairs), 6))  # 0.07 * 100 is above 7
    if count < batch:
        raise UserError(
            f"--keep {keep:g} keeps {count} of {len(pairs)} pairs, fewer than a batch of the run "
            f"({batch}): give at least --keep {ceil(100 * batch / len(pairs)) / 100:g}"
        )
    found = register_pairs(students, pairs)
    moved = np.array([one.offset for one in found])
    margins = np.array([one.margin for one in found])
    offsets = pairs.offset + moved
    fits = (np.abs(offsets) <= pairs.room).all(axis=1)
    if not fits.all():
        _log.warning(
            "%d pairs are left out: their offset leaves no room for crops in the margin",
            np.count_nonzero(~fits),
        )
    ranked = np.argsort(np.where(fits, -margins, np.inf), kind="stable")
    kept = np.sort(ranked[: min(count, np.count_nonzero(fits))])
    if len(kept) < batch:
        raise UserError(
            f"only {len(kept)} of {len(pairs)} pairs have an offset that leaves room for crops, "
            f"fewer than a batch of the run ({batch}): give pairs with a wider margin"
        )
    with new_file("--out", out) as file:
        names = pairs.names
        chosen = {names[i]: (int(offsets[i, 0]), int(offsets[i, 1])) for i in kept.tolist()}
        file.write(offsets_text(chosen).encode())
    return {
        "run": str(run.folder),
        "by": students.words,
        "out": str(out),
        "pairs": len(pairs),
        "kept": len(kept),
        "no_room": int(np.count_nonzero(~fits)),
        "least_margin": float(margins[kept].min()),
        "mean_offset": offsets[kept].mean(axis=0).tolist(),
        "mean_correction": moved[kept].mean(axis=0).tolist(),
        "corrected": int(np.count_nonzero(moved[kept].any(axis=1))),
    }


def register_pairs(students: StudentsOfPairs, pairs: PairSet) -> list[Registration]:
    """Register P pairs, each whole, or the part of it whose surroundings are in b."""
    radius = students.search
    found: dict[int, Registration] = {}
    with progress("registering", len(pairs), hidden=False) as done:
        for ids in _alike(pairs, radius):
            top, left, height, width = _part(pairs, int(ids[0]), radius)
            a = pairs.a[ids, top : top + height, left : left + width]
            corner = pairs.margin + pairs.offset[ids[0]] - radius + (top, left)
            bottom, right = corner + (height, width) + 2 * radius
            b = pairs.b[ids, corner[0] : bottom, corner[1] : right]
            for i, logits in zip(ids.tolist(), surfaces(students.models, a, b), strict=True):
                found[i] = of_surface(logits)
            done(len(found))
    return [found[i] for i in range(len(pairs))]


def _alike(pairs: PairSet, radius: int) -> list[Ints]:
    """Return the indices of pairs in groups of one offset, each small enough for the memory."""
    _, groups = np.unique(pairs.offset, axis=0, return_inverse=True)
    size = max(1, _AT_ONCE // pairs.a[0].size)
    order = np.argsort(groups.ravel(), kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(groups.ravel()[order])) + 1)
    return [part[i : i + size] for part in parts for i in range(0, len(part), size)]


def _part(pairs: PairSet, pair: int, radius: int) -> tuple[int, int, int, int]:
    """Return the largest part of a whose surroundings are in b: top, left, height, width."""
    size = np.array(pairs.a.shape[1:])
    spare = pairs.margin - radius  # pixels by which b may be off with all of a inside
    offset = pairs.offset[pair]
    start, end = np.maximum(0, -offset - spare), np.minimum(size, size + spare - offset)
    height, width = end - start
    return int(start[0]), int(start[1]), int(height), int(width)


def _fitting(
    a: NDArray[Any], b: NDArray[Any], radius: int, paths: tuple[Path, Path]
) -> tuple[Floats, Floats, str]:
    """Return both images, so that b is wider by the search on each side, and what was cut off."""
    first, second = (as_image(x, str(path)) for x, path in zip((a, b), paths, strict=True))
    (height, width), (higher, wider) = first.shape, second.shape
    sizes = f"{paths[0]} is {height} x {width} and {paths[1]} {higher} x {wider} pixels"
    if higher - height != wider - width or (higher - height) % 2 or higher < height:
        raise UserError(
            f"{sizes}: give images of one size, or a second that is wider on each side by the "
            "same number of pixels"
        )
    margin = (higher - height) // 2
    border = abs(margin - radius)
    if not border:
        return first, second, ""
    inner = slice(border, -border)
    if margin > radius:
        cut, second = paths[1], second[inner, inner]
    elif min(first.shape) < 2 * border + LEAST:
        raise UserError(
            f"{sizes}, and a search of {radius} leaves too little of the first: give larger "
            "images, or a smaller --search"
        )
    else:
        cut, first = paths[0], first[inner, inner]
    words = f"{shown(cut)} without a border of {border} pixels, for a search of {radius}"
    return first, second, words
