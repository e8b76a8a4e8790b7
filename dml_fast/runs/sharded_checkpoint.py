"""Checkpoints of several processes: each rank writes its part, with torch.distributed.checkpoint.

Such a checkpoint is a folder, and ``last.pt`` is a link to it. Any number of processes can read it.
Tensors are stored by name and everything else as one JSON text, so that reading runs no code.
"""

from __future__ import annotations

import io
import json
import pickle
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from dml_fast.errors import CheckpointError, reason
from dml_fast.runs.files import atomic_write, point_to
from dml_fast.runs.folder import Run

if TYPE_CHECKING:
    from dml_fast.distributed.world import World

_COMMON = "common"  # the name of the JSON text, which is stored as a tensor of bytes
_SUMS = "checksums.json"


def save(run: Run, state: dict[str, Any], world: World) -> None:
    """Write a checkpoint together, then point ``last.pt`` and ``previous.pt`` to the newest two.

    Args:
        run: the folder to write to, the same for all ranks.
        state: as in `dml_fast.runs.checkpoint.save`, with this rank's ``students`` and ``rng``.
        world: the processes.

    Raises:
        CheckpointError: a rank cannot write its part; all ranks raise it.
    """
    tensors, mine = _student_tensors(state["students"], world)
    tensors[f"rng.{world.launch.rank}"] = _packed(state["rng"][0])
    described = world.gather(mine)
    name = world.from_main(lambda: run.new_parts(state["step"]).name)
    if world.main:
        tensors["meter"] = state["meter"]
        students = {k: v for part in described or [] for k, v in part.items()}
        rest = {k: v for k, v in state.items() if k not in ("students", "rng", "meter")}
        common = {**rest, "students": students, "ranks": world.launch.size}
        text = json.dumps(common).encode()
        tensors[_COMMON] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    folder = run.folder / name
    with _errors():
        save_tensors(tensors, storage_writer=FileSystemWriter(str(folder)))
    sums = world.gather({p.name: _sum(p) for p in folder.glob(f"__{world.launch.rank}_*")})
    if world.main:
        parts = [*(sums or []), {".metadata": _sum(folder / ".metadata")}]
        with atomic_write(folder / _SUMS) as file:
            file.write(json.dumps({k: v for part in parts for k, v in part.items()}).encode())
        point_to(run.checkpoint("last"), name, keep_old_as=run.checkpoint("previous"))


def load(
    path: Path, students: Sequence[int] | None = None, *, verify: bool = True
) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        path: the folder, or a link to it.
        students: the numbers of those whose states are wanted; by default all.
        verify: compare the files with their checksums first; torch has no checksums.

    Returns:
        What all ranks gave to `save`, in one.

    Raises:
        Exception: it is damaged; of which kind depends on the damage.
    """
    if verify:
        for name, expected in json.loads((path / _SUMS).read_text()).items():
            if _sum(path / name) != expected:
                raise ValueError(f"bad checksum of {name}")
    reader = _Reader(str(path.resolve()))
    there: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    raw = _read(reader, {_COMMON: there[_COMMON]})[_COMMON]
    state: dict[str, Any] = json.loads(bytes(raw.tolist()))
    wanted = range(len(state["students"])) if students is None else students
    prefixes = tuple(f"students.{k}." for k in wanted)
    found = _read(
        reader,
        {k: v for k, v in there.items() if k.startswith((*prefixes, "rng.", "meter"))},
    )
    state["students"] = [_student_state(k, state["students"][str(k)], found) for k in wanted]
    state["meter"] = found["meter"]
    state["rng"] = [_unpacked(found[f"rng.{rank}"]) for rank in range(state.pop("ranks"))]
    return state


def _sum(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found = zlib.crc32(part, found)
    return found


def _student_tensors(
    states: Sequence[dict[str, Any]], world: World
) -> tuple[dict[str, Tensor], dict[int, Any]]:
    """Return the tensors that this rank writes, by name, and descriptions of its students.

    Where each rank of a row has a copy of a tensor, the first writes it; each writes its shards.
    """
    tensors: dict[str, Tensor] = {}
    described: dict[int, Any] = {}
    for k, state in zip(world.students, states, strict=True):
        model, moments = state["model"], state["optimizer"]["state"]
        mine = {f"students.{k}.model.{name}": tensor for name, tensor in model.items()}
        for index, values in moments.items():
            mine |= {f"students.{k}.optimizer.{index}.{name}": v for name, v in values.items()}
        tensors |= {
            name: tensor
            for name, tensor in mine.items()
            if world.column == 0 or hasattr(tensor, "to_local")
        }
        if world.column == 0:
            described[k] = {
                "arch": state["arch"],
                "model": list(model),
                "optimizer": {index: list(values) for index, values in moments.items()},
                "scaler": state["scaler"],
            }
    return tensors, described


def _student_state(k: int, described: dict[str, Any], found: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "arch": described["arch"],
        "model": {name: found[f"students.{k}.model.{name}"] for name in described["model"]},
        "optimizer": {
            "state": {
                int(index): {
                    name: found[f"students.{k}.optimizer.{index}.{name}"] for name in names
                }
                for index, names in described["optimizer"].items()
            }
        },
        "scaler": described["scaler"],
    }


def _read(reader: FileSystemReader, wanted: dict[str, TensorStorageMetadata]) -> dict[str, Tensor]:
    tensors = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in wanted.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that one process reads alone
        with _errors():
            load_tensors(tensors, storage_reader=reader, no_dist=True)
    return tensors


@contextmanager
def _errors() -> Iterator[None]:
    """Turn torch's error, which is no ``Exception`` and holds a traceback, into one line."""
    try:
        yield
    except CheckpointException as error:
        [(rank, (first, _)), *_] = error.failures.items()
        raise CheckpointError(f"rank {rank}: {reason(first)}") from error


def _packed(state: Any) -> Tensor:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _unpacked(raw: Tensor) -> Any:
    return torch.load(io.BytesIO(raw.numpy().tobytes()), weights_only=True)


class _Reader(FileSystemReader):
    """Reads the index, a pickle, and allows only names in it that cannot run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _HARMLESS:
            return super().find_class(module, name)
        return _refuse(f"{module}.{name}")


_METADATA = "torch.distributed.checkpoint.metadata"
_HARMLESS = {
    *((_METADATA, name) for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(("torch", str(kind).removeprefix("torch.")) for kind in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8,
        torch.int16, torch.int32, torch.int64, torch.bool,
    )),
}  # fmt: skip


def _refuse(name: str) -> NoReturn:
    raise pickle.UnpicklingError(f"it names {name}, which could run code")
