"""scikit-learn's digits as vectors, for ``--data vectors:FILE.npz``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dml_fast.data import ImageSet, open_dataset


def write_digits(path: Path, *, halves: bool = False) -> None:
    """Write the pixels of each image; the test rows are those of ``--data digits``.

    Args:
        path: the .npz file, with ``x`` (N, 64), ``y`` (N,) and ``split`` (N,).
        halves: write the views ``x_left`` and ``x_right`` (N, 32) in place of ``x``.
    """
    data = open_dataset("digits")
    sets = [("train", data.train), ("train", data.val), ("test", data.test)]
    images = []
    for _, part in sets:
        assert isinstance(part, ImageSet)
        images.append(np.asarray(part.images, np.float32).reshape(len(part), 8, 8) / 255)
    x = np.concatenate(images)
    views = {"x_left": x[:, :, :4], "x_right": x[:, :, 4:]} if halves else {"x": x}
    np.savez(
        path,
        y=np.concatenate([part.labels for _, part in sets]).astype(np.int64),
        split=np.concatenate([np.full(len(part), split) for split, part in sets]),
        **{name: view.reshape(len(x), -1) for name, view in views.items()},
    )
