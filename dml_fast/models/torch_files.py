"""Files of ``torch.save``, in both of its formats.

They are described in torch/serialization.py: a pickle that refers to storages by key, and the bytes
of each storage. Torch's own reader compares no checksums, and refuses a file for what lies beside
the weights.
"""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import IO, Any

from dml_fast.errors import UserError
from dml_fast.models.torch_pickle import Storages, Unpickler

_MAGIC = 0x1950A86A20F9469CFC6C  # at the start of the format before torch 1.6


def check_zip(file: IO[bytes], *, sums: bool = True) -> None:
    """Check that the members of a zip file of torch are as large as it says and undamaged.

    Args:
        file: the file.
        sums: whether to compare each member with its checksum, which torch does for only some.

    Raises:
        Exception: any, if the file is damaged or another program's.
    """
    with zipfile.ZipFile(file) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise zipfile.BadZipFile("its members are compressed")
        if sum(info.file_size for info in archive.infolist()) > file.seek(0, io.SEEK_END):
            raise zipfile.BadZipFile("its members are larger than the file")
        if sums and (broken := archive.testzip()):
            raise zipfile.BadZipFile(f"bad checksum in {broken}")


def load_file(file: IO[bytes], *, verify: bool) -> Any:
    """Read a checkpoint of our own, which ``torch.save`` wrote, onto the CPU. No code in it runs.

    Args:
        file: from its beginning.
        verify: compare each member with its checksum.

    Raises:
        Exception: it is damaged, or holds other objects than tensors, texts, numbers, lists and
            dictionaries; of which kind depends on the damage.
    """
    import torch

    check_zip(file, sums=verify)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def read_torch_file(path: Path) -> Any:
    """Read a file of ``torch.save``.

    Args:
        path: in the zip format, whose checksums are compared, or in the format before torch 1.6,
            which has none.

    Returns:
        What was saved, where each tensor is a `Stored` that is read only when asked for. Objects of
        classes other than those of plain data are empty dictionaries.

    Raises:
        UserError: the file is of another kind.
        Exception: any, if it is damaged.
    """
    storages = Storages(path)
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            return _read_zip(path, file, storages)
        file.seek(0)
        return _read_legacy(file, storages)


def _read_zip(path: Path, file: IO[bytes], storages: Storages) -> Any:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{path} is a zip file of another program: give one of torch.save")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}constants.pkl" in members:
            raise UserError(f"{path} is a TorchScript program: give its state_dict()")
        check_zip(file)
        order = f"{root}byteorder"
        if order in members and archive.read(order) != b"little":
            raise UserError(
                f"{path} is of a machine with the other byte order: save it on another one"
            )
        program = archive.read(pickles[0])
    content = Unpickler(io.BytesIO(program), storages).load()
    for key, storage in storages.found.items():
        member = members[f"{root}data/{key}"]
        if member.file_size != storage.size:
            raise ValueError(f"storage {key} has another size than its tensors say")
        file.seek(member.header_offset + 26)  # the local header's lengths of name and extra field
        lengths = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
        storages.places[key] = member.header_offset + 30 + lengths
    return content


def _read_legacy(file: IO[bytes], storages: Storages) -> Any:
    if Unpickler(file, storages).load() != _MAGIC:
        raise ValueError("it is not a file of torch.save")
    for _ in range(2):  # the version of the protocol, and sizes of C's integers
        Unpickler(file, storages).load()
    content = Unpickler(file, storages).load()
    keys = Unpickler(file, storages).load()
    if sorted(keys) != sorted(storages.found):
        raise ValueError("it lists other storages than it uses")
    end = os.fstat(file.fileno()).st_size
    for key in keys:
        storage = storages.found[key]
        if int.from_bytes(file.read(8), "little") != storage.length:
            raise ValueError(f"storage {key} has another size than its tensors say")
        storages.places[key] = file.tell()
        file.seek(storage.size, io.SEEK_CUR)
    if file.tell() != end:
        raise ValueError("it has another length than it says")
    return content
