"""Commands within this process: what they print, and training on data that takes a second."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dml_fast import cli
from dml_fast.train import main

QUICK = ["--arch", "resnet8", "--epochs", "1", "--train-fraction", "0.2"]
THREE_EPOCHS = [*QUICK[:2], "--epochs", "3", "--train-fraction", "0.2"]


Command = Callable[[Sequence[str] | None], int]


def json_of(
    command: Command, capsys: pytest.CaptureFixture[str], *arguments: object
) -> dict[str, Any]:
    """What a command prints with --json, and nothing else."""
    capsys.readouterr()
    assert command([*map(str, arguments), "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def refusal_of(command: Command, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert cli.run(command, [str(a) for a in arguments]) == 2
    out, error = capsys.readouterr()
    assert not out
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


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
