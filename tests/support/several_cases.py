"""Folders of images with several labels: real digits side by side."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from dml_fast.data.readers.digits import read_digits
from dml_fast.data.sets import ImageSet

PART = {"train": 160, "val": 40, "test": 60}


def digits_side_by_side(
    root: Path, counts: dict[str, int] = PART, wide: int = 2, seed: int = 0
) -> Path:
    """Write images of ``wide`` digits side by side, each labelled with all digits it shows.

    Every fifth image of a part shows one digit and an empty place.
    """
    rng = np.random.default_rng(seed)
    raw = read_digits()
    lines = []
    for part, count in counts.items():
        found = getattr(raw, part)
        assert isinstance(found, ImageSet)
        (root / part / "some").mkdir(parents=True)
        for number in range(count):
            ids = rng.integers(len(found), size=wide)
            tiles = found.pixels[ids, 0].copy()
            shown = set(found.labels[ids].tolist())
            if number % 5 == 4:
                tiles[0], shown = 0, set(found.labels[ids[1:]].tolist())
            name = f"{part}/some/{number:04}.png"
            Image.fromarray(np.concatenate(list(tiles), axis=1)).save(root / name)
            lines.append([name, *(int(digit in shown) for digit in range(10))])
    write_labels(root, lines)
    return root


def write_labels(root: Path, lines: list[list[object]], first: str = "file") -> None:
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[first, *(f"has {d}" for d in range(10))], *lines])
