"""Images that a user names: which files they are, their pixels as a run takes them, their names."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dml_fast.config import TrainConfig
from dml_fast.data import ImageSet
from dml_fast.data.corrupt import CorruptFiles
from dml_fast.data.decode import Pixels, decode_image, fit
from dml_fast.data.files import ImageFiles
from dml_fast.data.listing import PassedOver, images_below
from dml_fast.data.readers.market1501 import identity_and_camera
from dml_fast.data.reading import dali_is_installed
from dml_fast.data.storage import SUFFIXES, LooseFiles
from dml_fast.errors import UserError
from dml_fast.foreign import shown
from dml_fast.machine import cores
from dml_fast.runs.facts import DataFacts

_log = logging.getLogger("dml_fast")


def find_images(given: Sequence[Path]) -> list[Path]:
    """Return the files that are named, and those below the folders that are named, each once.

    Args:
        given: files, whatever their suffix, and folders, in which files with the suffix of an image
            are taken, in sorted order; one log line counts what else is there.

    Raises:
        UserError: one does not exist, or a folder cannot be listed or holds no images.
    """
    found: list[Path] = []
    for path in given:
        if os.path.isdir(path):
            passed = PassedOver()
            inside = images_below(path, passed)
            passed.report(path, logging.WARNING)
            if not inside:
                raise UserError(
                    f"{path} holds no image files ({' '.join(sorted(SUFFIXES))}): give the folder "
                    "that holds them"
                )
            found += map(Path, inside)
        elif os.path.isfile(path):
            found.append(path)
        else:
            raise UserError(f"{path} is no file and no folder that can be read: check the path")
    once: dict[str, Path] = {}
    for path in found:
        once.setdefault(os.path.abspath(path), path)
    if repeated := len(found) - len(once):
        _log.warning("%d files were named more than once: each is predicted once", repeated)
    return list(once.values())


@dataclass(frozen=True, eq=False)
class GivenImages(ImageFiles):
    """Images of any size and colours, brought to what a run's students take.

    Attributes:
        other_sizes: one entry for each image that did not have the students' size.
    """

    other_sizes: list[int] = field(default_factory=list)

    @classmethod
    def for_run(cls, paths: Sequence[Path], config: TrainConfig, facts: DataFacts) -> GivenImages:
        """List files as `dml_fast.data.open_dataset` would, for students of that run.

        An image of another size is resized, even if the run took its images as they were.

        Raises:
            UserError: the students take neither gray nor RGB images.
        """
        channels, (height, width) = facts.in_channels, facts.image_size
        if channels not in (1, 3):
            raise UserError(
                f"the run's students take images of {channels} channels, and image files have 1 or "
                "3: only its own data can be evaluated"
            )
        options = config.data_options
        size, margin = options["image_size"], options["resized"]
        if not size:
            size, margin = height if height == width else (height, width), False
        # as for training and `evaluate`; it resizes a little differently
        dali = margin and channels == 3 and dali_is_installed()
        return cls(
            files=LooseFiles.of(paths),
            size=size,
            shape=(len(paths), channels, height, width),
            margin=margin,
            loader="dali" if dali else "fallback",
            threads=options["threads"] or cores(),
            first=paths[0],
            corrupt=_LeftOut(),
        )

    def decoded(self, index: int) -> Pixels:
        """Decode an image and bring it to (H, W, C) uint8.

        Raises:
            CorruptImageError: it cannot be read or decoded.
        """
        pixels = decode_image(self.files.read(index))
        if pixels.shape[:2] != self.shape[2:]:
            self.other_sizes.append(index)
        out = fit(pixels, self.size, self.margin)
        return out if self.shape[1] == 3 else _gray(out)

    def report_sizes(self, config: TrainConfig) -> None:
        """Log how many images were resized although the run took its own as they were."""
        if self.other_sizes and not config.data_options["image_size"]:
            height, width = self.shape[2:]
            _log.warning(
                "%d images were resized to %d x %d pixels (height x width), as all of the run's "
                "own images are",
                len(self.other_sizes),
                height,
                width,
            )

    def as_set(self) -> ImageSet:
        """Return them as a set, with labels that mean nothing."""
        return ImageSet(self, np.zeros(len(self), np.int64))


class _LeftOut(CorruptFiles):
    """Files that are left out; who asked for them names each, wherever it is."""

    def __init__(self) -> None:
        super().__init__(Path(), allowed=True)

    def report(self) -> None:
        """Do nothing."""


def _gray(pixels: Pixels) -> Pixels:
    """Return the luma of RGB: (H, W, 3) to (H, W, 1); gray stays as it is."""
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]


def known_identities(
    paths: Sequence[Path], config: TrainConfig, facts: DataFacts
) -> dict[str, NDArray[Any]]:
    """Return what the names of files say, where names in the run's kind of data say something.

    Args:
        paths: N files.
        config: the run's. Names in a market1501 tree tell identity and camera; in a folder of
            classes, a class that the run knows is the identity.
        facts: of the run's data.

    Returns:
        ``pids`` (N,) and ``cams`` (N,), those that all names tell.
    """
    kind = config.data.partition(":")[0]
    if kind == "market1501":
        seen = [identity_and_camera(path.name) for path in paths]
        arrays: dict[str, list[Any]] = {
            "pids": [s and s[0] for s in seen],
            "cams": [s and s[1] for s in seen],
        }
        wanted = "named like 0002_c1s1_000451_03.jpg"
    elif kind == "folder" and not facts.several_labels:
        classes = frozenset(facts.classes)
        arrays = {"pids": [_class_of(path, classes) for path in paths]}
        wanted = "in a folder that is called like a class of the run"
    else:
        return {}
    known = {}
    for name, values in arrays.items():
        if None in values:
            first = paths[values.index(None)]
            _log.warning("%s are not known: %s is not %s", name, shown(first), wanted)
        else:
            known[name] = np.array(values)
    return known


def _class_of(path: Path, classes: frozenset[str]) -> str | None:
    return next((part for part in reversed(path.parts[:-1]) if part in classes), None)
