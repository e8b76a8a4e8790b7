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

    @classmethod
    def unreadable(cls, problem: str, shape: tuple[int, ...] = ()) -> Stored:
        """Return what stands for a tensor that cannot be read; ``problem`` says why."""
        return cls(shape, torch.uint8, _unread, problem)


def _unread() -> Tensor:
    raise AssertionError("its problem was not looked at")


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
