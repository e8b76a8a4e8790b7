"""The peers of the loaders: torchvision's ImageFolder and DataLoader, DALI, and tarfile.

Each is used as in its own documentation.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

MEAN, STD = (0.47, 0.45, 0.40), (0.25, 0.25, 0.26)
Pass = Callable[[], int]  # goes once over the images and returns how many there were


def has_torchvision() -> bool:
    """Import torchvision if it is installed, and return whether it is.

    With a torch for CPUs only, the C++ operators of torchvision do not load.
    """
    if find_spec("torchvision") is None:
        return False
    if torch.version.cuda is None:  # transforms and data sets need none of these
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["_library"] = library  # kept as long as this module
    import_module("torchvision")
    return True


def transforms(kind: str) -> Any:
    """Return the usual training transforms for a kind of data: cifar, reid or photos."""
    T: Any = import_module("torchvision.transforms")
    end = [T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)]
    if kind == "cifar":
        return T.Compose([T.RandomCrop(32, padding=4), *end])
    if kind == "reid":
        first = [T.Resize((128, 64)), T.Pad(8), T.RandomCrop((128, 64))]
        return T.Compose([*first, *end, T.RandomErasing(0.5, value=0)])
    return T.Compose([T.RandomResizedCrop(224), *end])


def image_folder(root: Path, kind: str, batch_size: int, workers: int) -> Pass:
    """Return a pass of ImageFolder and DataLoader over the files in ``root``/CLASS/."""
    datasets: Any = import_module("torchvision.datasets")
    return data_loader(datasets.ImageFolder(root, transforms(kind)), batch_size, workers)


class InMemory(torch.utils.data.Dataset[Any]):
    """Images in memory, used as in CIFAR10: a PIL image of each, then transforms."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels  # (N, H, W, C)
        self.transform = transforms("cifar")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def data_loader(data: Any, batch_size: int, workers: int) -> Pass:
    """Return a pass of a DataLoader, whose workers stay between passes."""
    loader: Any = torch.utils.data.DataLoader(
        data,
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )

    def once() -> int:
        return sum(len(target) for _, target in loader)

    return once


def dali_in_memory(images: np.ndarray, batch_size: int, threads: int) -> Pass:
    """Return a pass of DALI over arrays: external_source, a crop padded by 4, mirror, normalise."""
    fn, types = (import_module(f"nvidia.dali.{name}") for name in ("fn", "types"))
    pipeline: Any = import_module("nvidia.dali.pipeline")
    rng = np.random.default_rng(0)

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        while True:
            order = rng.permutation(len(images))
            for start in range(0, len(order) - batch_size + 1, batch_size):
                ids = order[start : start + batch_size]
                corners = rng.integers(-4, 5, (batch_size, 2)).astype(np.int32)
                yield images[ids], corners, rng.integers(0, 2, batch_size).astype(np.int32)

    pipe = pipeline.Pipeline(batch_size=batch_size, num_threads=threads, device_id=None)
    with pipe:
        pixels, corner, mirror = fn.external_source(
            source=batches(), num_outputs=3, layout=["HWC", None, None]
        )
        crop = fn.slice(
            pixels, start=corner, shape=[32, 32], axes=(0, 1), out_of_bounds_policy="pad"
        )
        out = fn.crop_mirror_normalize(
            crop,
            mirror=mirror,
            mean=[255 * m for m in MEAN],
            std=[255 * s for s in STD],
            dtype=types.FLOAT,
            output_layout="HWC",
        )
        pipe.set_outputs(out)
    pipe.build()

    def once() -> int:
        steps = len(images) // batch_size
        return sum(len(np.asarray(pipe.run()[0].as_tensor())) for _ in range(steps))

    return once


def samples_of(path: Path) -> int:
    """Read the headers and labels of a tar with the standard library; return how many there are."""
    with tarfile.open(path) as tar:
        streams = [tar.extractfile(member) for member in tar if member.name.endswith(".cls")]
        return len([int(stream.read()) for stream in streams if stream is not None])
