"""Folders of images for the tests of the loaders."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import processes
import pytest
from PIL import Image

from dml_fast.data import DataSet, open_dataset
from dml_fast.data.files import ImageFiles
from dml_fast.data.loaders import train_loader
from dml_fast.data.loaders.assemble import Loader, TrainBatch
from dml_fast.data.plan import Augmentation
from dml_fast.data.sets import ImageSet

DALI = pytest.param("dali", marks=pytest.mark.dali)
STREAMING = ["fallback", DALI]
ALL = ["resident", *STREAMING]
MEAN, STD = (0.2, 0.5, 0.7), (0.3, 0.2, 0.1)  # of random_images


def photographs() -> list[np.ndarray]:
    """Two real photographs, (427, 640, 3) uint8, which scikit-learn brings."""
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "datasets" / "images"
    return [np.asarray(Image.open(folder / name)) for name in ("china.jpg", "flower.jpg")]


def picture(seed: int, height: int = 16, width: int = 16) -> np.ndarray:
    """A smooth colour image, (H, W, 3) uint8, another for each seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def save(path: Path, pixels: np.ndarray | Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def pieces(
    root: Path,
    count: int,
    sizes: list[tuple[int, int]],
    *,
    suffixes: tuple[str, ...] = (".jpg",),
    parts: tuple[str, ...] = ("train",),
) -> Path:
    """Writes ``count`` pieces of the photographs in each of two classes of each part."""
    photos, rng = photographs(), np.random.default_rng(0)
    for part in parts:
        for label, name in enumerate(("china", "flower")):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                height, width = sizes[number % len(sizes)]
                top, left = (rng.integers(0, n) for n in (427 - height + 1, 640 - width + 1))
                piece = Image.fromarray(photos[label][top : top + height, left : left + width])
                suffix = suffixes[number % len(suffixes)]
                piece.save(root / part / name / f"{number:03}{suffix}")
    return root


def opened(root: Path, loader: str, **options: object) -> DataSet:
    return open_dataset(f"folder:{root}", loader=loader, **options)  # type: ignore[arg-type]


def loader_of(data: DataSet, how: Augmentation | None = None, **options: object) -> Loader:
    how = how or Augmentation(pad=data.pad, flip=data.flip)
    usual: dict = {"batch_size": 8, "seed": 3, "device": "cpu"}
    return train_loader(data, how, **(usual | options))


def batch_of(loader: Loader, epoch: int, step: int) -> TrainBatch:
    """Return one batch of an epoch."""
    with closing(loader.epoch(epoch, step)) as batches:
        return next(batches)


def holder(data: DataSet) -> str:
    """Return who decodes the training images: resident, dali or fallback."""
    images = data.train.images
    return images.loader if isinstance(images, ImageFiles) else "resident"


def skipped(data: DataSet) -> tuple[str, ...]:
    """Return the corrupt files that were skipped so far, relative to the data folder."""
    assert data.corrupt is not None
    return data.corrupt.names


def tensors(batch: TrainBatch) -> list:
    inputs = batch.inputs if isinstance(batch.inputs, tuple) else (batch.inputs,)
    return [*inputs, batch.target, batch.ids]


def random_images(count: int, channels: int = 3, height: int = 6, width: int = 5) -> ImageSet:
    rng = np.random.default_rng(count)
    shape = (count, channels, height, width)
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    return ImageSet(images, np.arange(count, dtype=np.int64) % 7)


def normalized(image: np.ndarray) -> np.ndarray:
    channels = len(image)
    mean, std = (np.array(values[:channels])[:, None, None] for values in (MEAN, STD))
    return (image / 255.0 - mean) / std


def evaluated(root: Path, loader: str, skip_corrupt: bool = False) -> dict:
    """What evaluation and one epoch of training make of a folder: sums of pixels by file."""
    from dml_fast.data.loaders import evaluation_batches

    data = opened(root, loader, image_size=24, skip_corrupt=skip_corrupt)
    usual = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3, "device": "cpu", "batch_size": 4}
    sums = {}
    for batch in evaluation_batches(data.val, **usual):
        for image, index in zip(batch.inputs, batch.ids.tolist(), strict=True):
            sums[index] = [float(image.sum()), float(image[0, :12].sum()), float(image[2].sum())]
    trainer = loader_of(data, Augmentation(), batch_size=4)
    labels = [i for batch in trainer.epoch(0) for i in batch.target.tolist()]
    trainer.close()
    return {"sums": list(sums.values()), "ids": list(sums), "labels": labels, "bad": skipped(data)}


def in_another_process(root: Path, loader: str, skip_corrupt: bool = False) -> dict | str:
    """The same, where a crash would not end the tests; a UserError comes as its text."""
    arguments = [str(root), loader, str(int(skip_corrupt))]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    run = processes.run(Path(__file__).stem, *arguments, env=environment, timeout=120)
    assert run.returncode == 0, f"exit code {run.returncode}: {run.stderr}"
    found: dict | str = json.loads(run.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    from dml_fast.errors import UserError

    try:
        result: dict | str = evaluated(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "1")
    except UserError as error:
        result = str(error)
    print(json.dumps(result))
