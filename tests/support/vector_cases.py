"""A file of vectors in two views, for the tests of cohorts that read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

CLASSES = ("ape", "bee", "cow")
PARTS = {"train": 96, "val": 24, "test": 60}


def two_views(path: Path, seed: int = 0) -> Path:
    """Write rows of three classes; view a has 5 columns and view b 3, of very different scales."""
    rng = np.random.default_rng(seed)
    count = sum(PARTS.values())
    label = rng.integers(0, len(CLASSES), count)
    places = np.random.default_rng(7)  # of the classes, the same in every file
    views = {}
    for name, width, scale in (("a", 5, 100.0), ("b", 3, 0.01)):
        centre = places.normal(size=(len(CLASSES), width))
        views[f"x_{name}"] = scale * (3 + centre[label] + 0.5 * rng.normal(size=(count, width)))
    np.savez(
        path,
        **views,
        y=np.array(CLASSES)[label],
        split=np.repeat([*PARTS], [*PARTS.values()]),
        id=np.array([f"row {i}" for i in range(count)]),
    )
    return path
