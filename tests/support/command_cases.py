"""`python -m dml_fast.train` within this process, on data that takes a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dml_fast import cli
from dml_fast.train import main

QUICK = ["--arch", "resnet8", "--epochs", "1", "--train-fraction", "0.2"]
THREE_EPOCHS = [*QUICK[:2], "--epochs", "3", "--train-fraction", "0.2"]


def train(*options: str) -> int:
    return cli.run(main, list(options))


def tree(folder: Path, classes: int = 2, images: int = 12) -> Path:
    g = np.random.default_rng(0)
    for split in ("train", "test"):
        for c in range(classes):
            (folder / split / f"class {c}").mkdir(parents=True)
            for i in range(images):
                pixels = g.integers(0, 120, (8, 8, 3), dtype=np.uint8) + np.uint8(120 * c)
                Image.fromarray(pixels).save(folder / split / f"class {c}" / f"{i}.png")
    return folder
