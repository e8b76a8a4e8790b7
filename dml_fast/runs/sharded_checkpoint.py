"""Checkpoints of several processes: each rank writes its part, with torch.distributed.checkpoint.

Such a checkpoint is a folder, and ``last.pt`` is a link to it. Any number of processes can read it.
Tensors are stored by name and everything else as one JSON text, so that reading runs no code.
"""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from dml_fast.errors import CheckpointError, brief, reason
from dml_fast.foreign import Unfit, content, json_value, opened, typed
from dml_fast.models.torch_files import load_file
from dml_fast.runs.files import atomic_write, point_to
from dml_fast.runs.folder import Run, is_name_of_parts
from dml_fast.runs.shard_index import FILE, Stored, read_index

if TYPE_CHECKING:
    from dml_fast.distributed.world import World

_COMMON = "common"  # the name of the JSON text, which is stored as a tensor of bytes
_SUMS = "checksums.json"
_INDEX = ".metadata"


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
    sums = world.gather({p.name: _sum_of(p) for p in folder.glob(f"__{world.launch.rank}_*")})
    if world.main:
        parts = [*(sums or []), {_INDEX: _sum_of(folder / _INDEX)}]
        with atomic_write(folder / _SUMS) as file:
            file.write(json.dumps({k: v for part in parts for k, v in part.items()}).encode())
        point_to(run.checkpoint("last"), name, keep_old_as=run.checkpoint("previous"))


def load(
    path: Path, students: Sequence[int] | None = None, *, verify: bool = True
) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, from the files in its folder alone.

    Args:
        path: the folder, or a link to it.
        students: the numbers of those whose states are wanted; by default all.
        verify: compare the files with their checksums first; torch has no checksums.

    Returns:
        What all ranks gave to `save`, in one.

    Raises:
        Exception: it is damaged; of which kind depends on the damage.
    """
    with ExitStack() as stack:
        files = _open_files(_folder_of(path), stack, verify)
        index = read_index(files[_INDEX].read())
        size = sum(os.fstat(file.fileno()).st_size for file in files.values())
        if sum(piece.length for stored in index.values() for piece in stored.pieces) > size:
            raise Unfit("its tensors are larger than its files")

        def tensor(name: str) -> Tensor:
            if name not in index:
                raise Unfit(f"it has no {brief(name)}")
            return _read(index[name], files)

        common = json_value(tensor(_COMMON).numpy().tobytes(), path)
        state: dict[str, Any] = typed(common, _Common, "it")
        described, ranks = state["students"], state.pop("ranks")
        if sorted(described) != sorted(map(str, range(len(described)))):
            raise Unfit("its students are not numbered")
        wanted = range(len(described)) if students is None else students
        state["students"] = [_student_state(k, described[str(k)], tensor) for k in wanted]
        state["meter"] = tensor("meter")
        state["rng"] = [_unpacked(tensor(f"rng.{rank}")) for rank in range(ranks)]
        return state


class _Always(TypedDict):
    arch: str
    model: list[str]
    optimizer: dict[str, list[str]]
    scaler: dict[str, int | float]


class _Described(_Always, total=False):
    average: list[str]


class _Common(TypedDict):
    students: dict[str, _Described]
    ranks: int


def _folder_of(path: Path) -> Path:
    """Return the folder that a checkpoint's name stands for: one beside it, if it is a link."""
    if not path.is_symlink():
        return path
    name = os.readlink(path)
    folder = path.parent / name
    if not is_name_of_parts(name) or folder.is_symlink():
        raise Unfit(f"it is a link to {brief(name)}, which is no checkpoint in this folder")
    return folder


def _open_files(folder: Path, stack: ExitStack, verify: bool) -> dict[str, IO[bytes]]:
    """Open the files of a checkpoint; links and names that we do not give are refused."""
    _check_file(folder / _SUMS)
    found = json_value(content(folder / _SUMS), folder / _SUMS)
    sums: dict[str, int] = typed(found, dict[str, int], _SUMS)
    if _INDEX not in sums:
        raise Unfit(f"{_SUMS} has no {_INDEX}")
    files = {}
    for name, expected in sums.items():
        if name != _INDEX and not FILE.fullmatch(name):
            raise Unfit(f"{_SUMS} names {brief(name)}, which is no file of a checkpoint")
        _check_file(folder / name)
        files[name] = stack.enter_context(opened(folder / name))
        if verify and _sum(files[name]) != expected:
            raise Unfit(f"bad checksum of {name}")
        files[name].seek(0)
    return files


def _check_file(path: Path) -> None:
    if path.is_symlink() or not path.is_file():
        raise Unfit(f"{path.name} is missing, or a link")


def _sum(file: IO[bytes]) -> int:
    found = 0
    while part := file.read(1 << 20):
        found = zlib.crc32(part, found)
    return found


def _sum_of(path: Path) -> int:
    with path.open("rb") as file:
        return _sum(file)


def _student_tensors(
    states: Sequence[dict[str, Any]], world: World
) -> tuple[dict[str, Tensor], dict[int, Any]]:
    """Return the tensors that this rank writes, by name, and descriptions of its students.

    Where each rank of a row has a copy of a tensor, the first writes it; each writes its shards.
    """
    tensors: dict[str, Tensor] = {}
    described: dict[int, Any] = {}
    for k, state in zip(world.students, states, strict=True):
        moments = state["optimizer"]["state"]
        networks = {part: state[part] for part in ("model", "average") if part in state}
        mine = {
            f"students.{k}.{part}.{name}": tensor
            for part, tensors_of in networks.items()
            for name, tensor in tensors_of.items()
        }
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
                **{part: list(names) for part, names in networks.items()},
                "optimizer": {index: list(values) for index, values in moments.items()},
                "scaler": state["scaler"],
            }
    return tensors, described


def _student_state(
    k: int, described: _Described, tensor: Callable[[str], Tensor]
) -> dict[str, Any]:
    networks = {"model": described["model"]}
    if "average" in described:
        networks["average"] = described["average"]
    return {
        "arch": described["arch"],
        **{
            part: {name: tensor(f"students.{k}.{part}.{name}") for name in names}
            for part, names in networks.items()
        },
        "optimizer": {
            "state": {
                int(index): {
                    name: tensor(f"students.{k}.optimizer.{index}.{name}") for name in names
                }
                for index, names in described["optimizer"].items()
            }
        },
        "scaler": described["scaler"],
    }


def _read(stored: Stored, files: Mapping[str, IO[bytes]]) -> Tensor:
    """Return a tensor, put together from its pieces."""
    parts = []
    for piece in stored.pieces:
        file = files[piece.file]
        file.seek(piece.start)
        part = load_file(io.BytesIO(file.read(piece.length)), verify=False)
        if not isinstance(part, Tensor) or part.shape != piece.sizes or part.dtype != stored.dtype:
            raise Unfit(f"a tensor in {piece.file} is not the one that {_INDEX} names")
        parts.append(part)
    if len(parts) == 1 and parts[0].shape == stored.size:
        return parts[0]
    whole = torch.zeros(stored.size, dtype=stored.dtype)
    for piece, part in zip(stored.pieces, parts, strict=True):
        place = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.sizes, strict=True))
        whole[place] = part
    return whole


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
    return load_file(io.BytesIO(raw.numpy().tobytes()), verify=False)
