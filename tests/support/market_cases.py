"""A small tree of the form of Market-1501: each identity is a pattern of its own, with noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (16, 8)  # height, width


def pattern(pid: int) -> np.ndarray:
    """The look of an identity, (16, 8, 3) float."""
    rng = np.random.default_rng(pid + 100)
    return np.kron(rng.integers(0, 2, (4, 2, 3)), np.ones((4, 4, 1))) * 200.0


def save(folder: Path, pid: int, cam: int | None, frame: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(frame).normal(0, 160, (*SIZE, 3))
    pixels = np.clip(pattern(pid) + noise, 0, 255).astype(np.uint8)
    camera = "" if cam is None else f"c{cam}s1_"
    path = folder / f"{f'{pid:04d}' if pid >= 0 else pid}_{camera}{frame:06d}_00.png"
    Image.fromarray(pixels).save(path)
    return path


def make_market(
    root: Path,
    learned: int = 12,
    searched: int = 5,
    shots: int = 6,
    *,
    cameras: tuple[int | None, ...] = (1, 2),
    test_cameras: tuple[int | None, ...] | None = None,
    first: int = 1,
) -> Path:
    """``learned`` identities to train on and others to search for, seen by two cameras.

    The gallery also has a distractor (0) and a junk image (-1). The first of the identities to
    train on has the number ``first``; a camera of None is left out of the names.
    """
    frame = 0
    seen = cameras if test_cameras is None else test_cameras
    for pid in range(first, first + learned):
        for shot in range(shots):
            frame += 1
            save(root / "bounding_box_train", pid, cameras[shot % len(cameras)], frame)
    for pid in range(101, 101 + searched):
        for shot in range(shots):
            frame += 1
            folder = root / ("bounding_box_test" if shot else "query")
            save(folder, pid, seen[shot % len(seen)], frame)
    for pid in (0, -1):
        frame += 1
        save(root / "bounding_box_test", pid, seen[0], frame)
    return root
