"""Binary codes without learning through them: random hyperplanes, and PCA with a rotation (ITQ)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dml_fast.errors import UserError
from dml_fast.rng import numpy_generator

Floats = NDArray[np.float64]
Bits = NDArray[np.bool_]
Coder = Callable[[NDArray[np.floating]], Bits]
"""From rows (N, D) to bits (N, b)."""


def random_hyperplanes(rows: NDArray[np.floating], bits: int, seed: int) -> Coder:
    """Return LSH for the angle (Charikar, STOC 2002) of rows less their mean.

    Args:
        rows: (N, D), of which only the mean is used.
        bits: number of hyperplanes.
        seed: of their normals.
    """
    mean = rows.mean(0)
    normals = numpy_generator(seed, bits).standard_normal((rows.shape[1], bits))
    return lambda x: (x - mean) @ normals > 0


def itq(rows: NDArray[np.floating], bits: int, seed: int, iterations: int = 50) -> Coder:
    """Return iterative quantization (Gong and Lazebnik, CVPR 2011).

    Args:
        rows: (N, D) to fit to, without labels.
        bits: at most D.
        seed: of the first rotation.
        iterations: of the rotation; the paper has 50.

    Raises:
        UserError: there are fewer dimensions than bits.
    """
    if bits > rows.shape[1]:
        raise UserError(f"ITQ of {bits} bits needs as many dimensions, not {rows.shape[1]}")
    mean = rows.mean(0)
    centred = np.asarray(rows - mean, np.float64)
    directions = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :bits]
    turned = directions @ rotation(centred @ directions, seed, iterations)
    return lambda x: (x - mean) @ turned > 0


def rotation(projected: Floats, seed: int, iterations: int) -> Floats:
    """Return R (b, b) orthogonal for which V R (V: ``projected``, (N, b)) is near its signs.

    Each half of an iteration is exact: signs for the rotation, then the rotation for the signs, by
    the singular vectors of B^T V (orthogonal Procrustes).
    """
    bits = projected.shape[1]
    turn = np.linalg.qr(numpy_generator(seed, bits).standard_normal((bits, bits)))[0]
    for _ in range(iterations):
        signs = np.where(projected @ turn > 0, 1.0, -1.0)
        left, _, right = np.linalg.svd(signs.T @ projected)
        turn = (left @ right).T
    return turn


def quantisation_error(projected: Floats, turn: Floats) -> float:
    """Return what the rotation makes small: ``|sign(V R) - V R|²`` summed over everything."""
    turned = projected @ turn
    return float(np.square(np.where(turned > 0, 1.0, -1.0) - turned).sum())
