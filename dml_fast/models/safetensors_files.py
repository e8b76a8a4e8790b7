"""Files in the safetensors format; those that `seal` has made hold a checksum of their bytes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dml_fast.models.torch_pickle import Stored

HEADER = "dml_fast"
"""Under this name the metadata of our files has JSON: what is needed to build the network."""

SEAL = "sha256"
"""Under this name that JSON has the checksum."""

NO_SEAL = "0" * 64
"""The checksum of a file that `seal` is to make."""

_PLACE = re.compile(rb'\\"sha256\\": \\"([0-9a-f]{64})\\"')  # JSON in a string of JSON
_KEYS_BEFORE_SEALS = frozenset({
    "version", "arch", "name", "num_classes", "classes", "in_channels", "image_size", "mean", "std",
    "fingerprint", "task",
})  # fmt: skip
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


def seal(content: bytes) -> bytes:
    """Put the SHA-256 of a file in the place of `NO_SEAL` in its header."""
    place = _PLACE.search(content)
    assert place is not None
    digest = hashlib.sha256(content).hexdigest().encode()
    return content[: place.start(1)] + digest + content[place.end(1) :]


def read_safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Read a file, and compare it with its checksum, if it holds one.

    Files of other programs hold none, nor do our oldest ones: damage to their numbers
    is not seen.

    Returns:
        Its tensors by name, each of which is read only when asked for, and our header, which is
        empty for a file of another program.

    Raises:
        Exception: any, if the file is damaged.
    """
    sealed = _check_seal(path)
    with _opened(path) as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        tensors = {
            name: Stored(
                tuple(part.get_shape()),
                _DTYPES.get(part.get_dtype(), torch.float32),
                _reader(path, name),
                "" if part.get_dtype() in _DTYPES else f"of type {part.get_dtype()}",
            )
            for name, part in parts.items()
        }
        header: dict[str, Any] = json.loads((file.metadata() or {}).get(HEADER, "{}"))
    if not sealed and header.keys() - _KEYS_BEFORE_SEALS:
        raise ValueError("its header lacks the checksum")
    return tensors, header


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a file of any name: the library refuses one that is not UTF-8."""
    with path.open("rb") as file:
        utf8 = str(path).encode(errors="ignore").decode() == str(path)
        name = path if utf8 else f"/dev/fd/{file.fileno()}"
        with safe_open(name, framework="pt") as opened:
            yield opened


def _check_seal(path: Path) -> bool:
    """Return whether the file has a checksum; raise ValueError if it is another file's."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        file.seek(0)
        head = file.read(8 + min(size, path.stat().st_size))
        place = _PLACE.search(head)
        if place is None:
            return False
        digest = hashlib.sha256(head[: place.start(1)] + NO_SEAL.encode() + head[place.end(1) :])
        while chunk := file.read(2**20):
            digest.update(chunk)
    if digest.hexdigest().encode() != place[1]:
        raise ValueError("bad checksum")
    return True


def _reader(path: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with _opened(path) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    return read
