"""Rows that are vectors around a centre for each class, some without a label, and runs on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dml_fast import cli
from dml_fast.select import main as select_main
from dml_fast.train import main as train_main

CLASSES = ("ash", "beech", "cedar")
TRAINING = ("--arch", "mlp_8,mlp_8,mlp_8", "--epochs", "2", "--batch-size", "6", "--device", "cpu")


def blobs(path: Path, train: int = 48, unlabelled: int = 0, **changes: Any) -> str:
    """Write a file for ``vectors:``; the last rows to train on have no label. Return its spec."""
    g = np.random.default_rng(0)
    count = train + 24
    y = np.arange(count) % 3
    x = g.normal(size=(count, 5)) + 2 * np.eye(5)[y]
    arrays: dict[str, Any] = {
        "x": x.astype(np.float32),
        "y": np.where((np.arange(count) >= train - unlabelled) & (np.arange(count) < train), -1, y),
        "split": np.array(["train"] * train + ["val"] * 12 + ["test"] * 12),
        "id": np.array([f"row {i}" for i in range(count)]),
        "classes": np.array(CLASSES),
    }
    arrays |= changes
    np.savez(path, **arrays)
    return f"vectors:{path}"


def train(folder: Path, *options: str) -> Path:
    assert cli.run(train_main, [*TRAINING, *options, "--out", str(folder)]) == 0
    return folder


def select(*options: object) -> int:
    return cli.run(select_main, [*map(str, options)])


def table(path: Path) -> list[list[str]]:
    """The rows of a file of tab-separated values, the header first."""
    return [line.split("\t") for line in path.read_text().splitlines()]
