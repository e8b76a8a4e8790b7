"""Tensors that stay in their file until they are needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Stored(NamedTuple):
    """A tensor that lies in a file.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        read: reads it.
        problem: why it cannot be read, as an adjective; "" if it can.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    problem: str = ""


def file_part(path: Path, start: int, size: int) -> bytearray:
    """Read ``size`` bytes of a file.

    Raises:
        ValueError: it ends before.
        OSError: it cannot be read.
    """
    part = bytearray(size)
    with path.open("rb") as file:
        file.seek(start)
        if file.readinto(part) != size:
            raise ValueError("it ends too early")
    return part
