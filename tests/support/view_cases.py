"""Rows of vectors in three views of different sizes, and a cohort that reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dml_fast.config import TrainConfig

SIZES = {"args": 6, "pairs": 4, "edges": 9}


def make_views(path: Path, train: int = 160, sizes: dict[str, int] | None = None) -> str:
    """Write rows of four classes, 40 each to validate and to test; return the data's spec."""
    g = np.random.default_rng(3)
    count = train + 80
    y = g.integers(0, 4, count)
    views = {
        f"x_{name}": (g.normal(0, 1, (4, size))[y] + g.normal(0, 1, (count, size))).astype("f4")
        for name, size in (sizes or SIZES).items()
    }
    split = np.array(["train"] * train + ["val"] * 40 + ["test"] * 40)
    np.savez(path, y=y, split=split, **views)  # type: ignore[arg-type]
    return f"vectors:{path}"


def config_of_views(data: str, **options: Any) -> TrainConfig:
    usual = {"arch": "mlp_8", "cohort": 3, "epochs": 3, "batch_size": 16, "views": "levels"}
    return TrainConfig(**{**usual, "data": data, "seed": 5, "device": "cpu", **options})
