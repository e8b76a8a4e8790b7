"""Files in the safetensors format; those that `seal` has made hold a checksum of their bytes.

The format is a header in JSON and the bytes of the tensors. The safetensors package cannot open a
file whose name is not UTF-8.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from dml_fast.foreign import json_value
from dml_fast.models.stored import Stored, file_part

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
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        start = 8 + int.from_bytes(file.read(8), "little")
        if not 8 < start <= length:
            raise ValueError("it ends too early")
        head = file.read(start - 8)
        sealed = _check_seal(head, file)
    table = json_value(head, path, "replace it")
    metadata = table.pop("__metadata__", {})
    tensors: dict[str, Stored] = {}
    end = 0
    for name, entry in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
        tensors[name] = _stored(path, start, entry)
        if entry["data_offsets"][0] != end:
            raise ValueError("there is a gap between its tensors")
        end = entry["data_offsets"][1]
    if start + end != length:
        raise ValueError("it has another length than it says")
    header: dict[str, Any] = json.loads(metadata.get(HEADER, "{}"))
    if not sealed and header.keys() - _KEYS_BEFORE_SEALS:
        raise ValueError("its header lacks the checksum")
    return tensors, header


def _check_seal(head: bytes, file: IO[bytes]) -> bool:
    """Return whether a file has a checksum.

    Args:
        head: its header.
        file: the file, which is read from after the header to its end.

    Raises:
        ValueError: the checksum is another file's.
    """
    place = _PLACE.search(head)
    if place is None:
        return False
    digest = hashlib.sha256(len(head).to_bytes(8, "little"))
    digest.update(head[: place.start(1)] + NO_SEAL.encode() + head[place.end(1) :])
    while chunk := file.read(2**20):
        digest.update(chunk)
    if digest.hexdigest().encode() != place[1]:
        raise ValueError("bad checksum")
    return True


def _stored(path: Path, start: int, entry: dict[str, Any]) -> Stored:
    """Return a tensor, from its entry in the header; offsets count from ``start``."""
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError("a size is not a whole number")
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:  # float8 and what is to come
        return Stored.unreadable(f"of type {entry['dtype']}", shape)
    if prod(shape) * dtype.itemsize != end - begin:
        raise ValueError("a tensor has another size than its shape says")

    def read() -> Tensor:
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        part = file_part(path, start + begin, end - begin)
        return torch.frombuffer(part, dtype=dtype).reshape(shape)

    return Stored(shape, dtype, read)
