"""Files of ``torch.save``, read so that a damaged or a hostile one is an error and nothing else."""

from __future__ import annotations

import os
import zipfile
from typing import IO, Any

import torch

from dml_fast.foreign import Unfit


def load_file(file: IO[bytes], *, verify: bool = True) -> Any:
    """Read what ``torch.save`` wrote, onto the CPU. No code in it runs.

    Args:
        file: from its beginning.
        verify: compare each record with its checksum; torch compares only some.

    Raises:
        Exception: it is damaged, larger unpacked than packed, or holds other objects than tensors,
            texts, numbers, lists and dictionaries; of which kind depends on the damage.
    """
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        # torch packs nothing, so that a small file cannot ask for much memory
        packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
        if packed or sum(record.file_size for record in records) > size:
            raise Unfit("it is larger unpacked than packed")
        if verify and (broken := archive.testzip()):
            raise Unfit(f"bad checksum in {broken}")
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)
