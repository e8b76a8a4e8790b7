"""Pairs of two modalities of a smooth random field, with errors of alignment that are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dml_fast.config import TrainConfig
from dml_fast.data.pairs import PairSet

SIZE, MARGIN = 16, 8  # of a, and of b beyond it
SMALL = {"patch": 12, "search": 3}  # 49 displacements
BIAS, SPREAD = (1, -1), 1  # the usual error, and how far single ones are from it


def two_modalities(size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A scene of size x size pixels seen twice: as it is, and by two of its level lines."""
    rng = np.random.default_rng(seed)
    waves = np.fft.rfft2(rng.normal(size=(size, size)))
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    scene = np.fft.irfft2(waves * np.exp(-((9 * frequency) ** 2)), s=(size, size))
    scene /= scene.std()
    other = np.exp(-4 * (scene - 0.7) ** 2) - np.exp(-4 * (scene + 0.7) ** 2)
    return 100 + 20 * scene, other + 0.02 * rng.normal(size=(size, size))


def make_pairs(
    path: Path, count: int = 200, *, aligned: bool = True, offset: bool = False, seed: int = 0
) -> str:
    """Write a file of pairs; return the data's spec.

    Args:
        path: of the file.
        count: how many pairs.
        aligned: whether the content of both is at the same places; otherwise b's is displaced by
            `BIAS` on the mean.
        offset: whether the file tells the displacements.
        seed: of the scene and of where the pairs are in it.
    """
    first, second = two_modalities(256, seed)
    rng = np.random.default_rng((seed, 1))
    error = np.zeros((count, 2), np.int64)
    if not aligned:
        error = np.array(BIAS) + rng.integers(-SPREAD, SPREAD + 1, (count, 2))
    edge = MARGIN + 4
    corner = rng.integers(edge, 256 - SIZE - edge, (count, 2))
    a, b = [], []
    for place, moved in zip(corner, corner - MARGIN - error, strict=True):
        a.append(_square(first, place, SIZE))
        b.append(_square(second, moved, SIZE + 2 * MARGIN))
    arrays: dict[str, Any] = {"a": np.array(a), "b": np.array(b)}
    np.savez(path, **arrays, **({"offset": error} if offset else {}))
    return f"pairs:{path}"


def _square(image: np.ndarray, place: np.ndarray, side: int) -> np.ndarray:
    row, column = place.tolist()
    return image[row : row + side, column : column + side]


def config_of_pairs(data: str, **options: Any) -> TrainConfig:
    usual = {"arch": "displacement_8", "epochs": 3, "batch_size": 16, "lr": 0.02, **SMALL}
    return TrainConfig(**{**usual, "data": data, "seed": 5, "device": "cpu", **options})


def numbered(count: int, **options: Any) -> PairSet:
    """Pairs whose pixels tell their place: of a row * 100 + column, of b likewise."""
    place = np.arange(SIZE)[:, None] * 100 + np.arange(SIZE)
    wide = np.arange(-MARGIN, SIZE + MARGIN)[:, None] * 100 + np.arange(-MARGIN, SIZE + MARGIN)
    a, b = (
        np.broadcast_to(x + 1e5 * np.arange(1, count + 1)[:, None, None], (count, *x.shape))
        for x in (place, wide)
    )
    usual = {"offset": np.zeros((count, 2), np.int64), **SMALL, "seed": 3}
    return PairSet(a.astype("f4"), b.astype("f4"), numbers=np.arange(count), **{**usual, **options})
