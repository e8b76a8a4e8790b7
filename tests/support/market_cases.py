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


def save(folder: Path, pid: int, cam: int, frame: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(frame).normal(0, 160, (*SIZE, 3))
    pixels = np.clip(pattern(pid) + noise, 0, 255).astype(np.uint8)
    path = folder / f"{f'{pid:04d}' if pid >= 0 else pid}_c{cam}s1_{frame:06d}_00.png"
    Image.fromarray(pixels).save(path)
    return path


def make_market(root: Path, learned: int = 12, searched: int = 5, shots: int = 6) -> Path:
    """``learned`` identities to train on and others to search for, seen by two cameras.

    The gallery also has a distractor (0) and a junk image (-1).
    """
    frame = 0
    for pid in range(1, learned + 1):
        for shot in range(shots):
            frame += 1
            save(root / "bounding_box_train", pid, 1 + shot % 2, frame)
    for pid in range(101, 101 + searched):
        for shot in range(shots):
            frame += 1
            save(root / ("bounding_box_test" if shot else "query"), pid, 1 + shot % 2, frame)
    for pid in (0, -1):
        frame += 1
        save(root / "bounding_box_test", pid, 1, frame)
    return root
