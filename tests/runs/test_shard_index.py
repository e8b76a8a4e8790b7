"""The index of a checkpoint of several processes: what torch reads in it, and no code."""

from __future__ import annotations

import importlib
import io
import pathlib
import pickle
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import checkpoint_state
from torch.distributed.checkpoint.filesystem import FileSystemReader

from dml_fast.distributed.world import World
from dml_fast.runs import sharded_checkpoint
from dml_fast.runs.folder import Run
from dml_fast.runs.shard_index import _NAMES, read_index

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Run(tmp_path_factory.mktemp("run"))
    sharded_checkpoint.save(run, checkpoint_state(1), World.alone(2))
    return run.checkpoint().resolve()


def test_it_says_what_torch_reads(folder: Path) -> None:
    theirs = FileSystemReader(str(folder)).read_metadata()
    mine = read_index((folder / ".metadata").read_bytes())
    assert mine.keys() == theirs.state_dict_metadata.keys()
    places = {(k.fqn, tuple(k.offset)): v for k, v in theirs.storage_data.items()}
    for name, about in theirs.state_dict_metadata.items():
        assert mine[name].dtype == about.properties.dtype
        assert mine[name].size == tuple(about.size)
        for piece, chunk in zip(mine[name].pieces, about.chunks, strict=True):
            place = places[name, tuple(chunk.offsets)]
            assert piece == (
                tuple(chunk.offsets), tuple(chunk.sizes),
                place.relative_path, place.offset, place.length,
            )  # fmt: skip


def asks_for(module: str, name: str, then: bytes) -> bytes:
    """A pickle that puts a name on the stack and does something with it."""
    return b"c" + f"{module}\n{name}\n".encode() + then + b"."


SET_MARK = b"(N}S'mark'\nI01\nstb"  # the state of objects with slots, which is set as attributes


@pytest.mark.parametrize(("module", "name"), [*_NAMES, ("pathlib", "Path"), ("builtins", "eval")])
def test_no_name_in_it_reaches_what_it_names(module: str, name: str) -> None:
    for then in (SET_MARK, b"}S'mark'\nI01\nsb", b"(I1\ntR" + SET_MARK):
        with pytest.raises(Exception):  # noqa: B017
            read_index(asks_for(module, name, then))
    if module != "pathlib._local":
        there = getattr(importlib.import_module(module), name)
        assert not hasattr(there, "mark")
    assert not hasattr(_NAMES.get((module, name)), "mark")


def test_the_attack_is_live() -> None:
    """An unpickler that admits the class itself lets a file change it."""
    kind = type("PosixPath", (pathlib.PurePosixPath,), {})

    class Admits(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return kind

    Admits(io.BytesIO(asks_for("pathlib", "PosixPath", SET_MARK))).load()
    assert kind.mark


def changed(folder: Path, change: Any) -> bytes:
    """The index after a change of torch's objects."""
    theirs = FileSystemReader(str(folder)).read_metadata()
    change(theirs)
    return pickle.dumps(theirs)


def place(metadata: Any, **changes: Any) -> None:
    [found] = [v for k, v in metadata.storage_data.items() if k.fqn == "meter"]
    for name, value in changes.items():
        setattr(found, name, value)


def about(metadata: Any, **changes: Any) -> None:
    for name, value in changes.items():
        setattr(metadata.state_dict_metadata["meter"], name, value)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: place(m, relative_path="../x/__0_0.distcp"), "is no file of a checkpoint"),
        (lambda m: place(m, relative_path="/etc/passwd"), "is no file of a checkpoint"),
        (lambda m: place(m, relative_path=b"__0_0.distcp"), "is no file of a checkpoint"),
        (lambda m: place(m, offset=-1), "is at no place"),
        (lambda m: place(m, length=True), "is at no place"),
        (lambda m: place(m, length=10), "is larger than what is stored of it"),
        (lambda m: place(m, transform_descriptors=["zstd"]), "is encoded"),
        (lambda m: about(m, size=torch.Size([10**9, 10**9])), "chunks|shorter|is not whole"),
        (lambda m: about(m, size=torch.Size([1, 2, 99])), "is not whole"),
        (lambda m: about(m, size=torch.Size([1, 2, 7])), "is outside of it"),
        (lambda m: about(m, chunks=[]), "is not whole"),
        (lambda m: m.state_dict_metadata.update({"meter": 3}), "is no TensorStorageMetadata"),
        (lambda m: setattr(m, "storage_data", {}), "meter|students"),
        (lambda m: setattr(m, "storage_data", None), "NoneType"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(folder: Path, change: Any, why: str) -> None:
    assert read_index(changed(folder, lambda m: None))
    with pytest.raises(Exception, match=why):
        read_index(changed(folder, change))


@pytest.mark.parametrize(
    "program",
    [b"\x80\x02Nr\x00\x00\x00\x40.", b"\x80\x05\x96\x00\x00\x00\x00\x20\x00\x00\x00."],
    ids=["a far place in the memo", "a long array of bytes"],
)
def test_no_number_in_it_takes_memory(program: bytes) -> None:
    """Each would take gigabytes of the unpickler in C, or of Python's own."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Exception, match=r"is no Metadata|150"):
        read_index(program)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # in KiB
