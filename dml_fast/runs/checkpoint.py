"""Checkpoints: written whole or not at all, and refused by name when damaged or foreign."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from dml_fast.errors import UserError, first_line
from dml_fast.runs import sharded_checkpoint
from dml_fast.runs.files import atomic_write, link, sync_folder
from dml_fast.runs.folder import Run

if TYPE_CHECKING:
    from dml_fast.distributed.world import World

FORMAT = "dml_fast.checkpoint"  # of every version, wherever this module is
VERSION = 2


def save(run: Run, state: dict[str, Any], *, best: bool, world: World | None = None) -> None:
    """Write ``last.pt``; what was last becomes ``previous.pt``, and the best one ``best.pt``.

    Args:
        run: where to.
        state: tensors, numbers, strings, lists and dictionaries of these, so that it loads with
            ``weights_only=True``.
        best: whether this one is also the best so far.
        world: the processes, which save together: ``students`` and ``rng`` are those of each.
    """
    state = {"format": FORMAT, "version": VERSION, **state}
    if world is not None and not world.single:
        sharded_checkpoint.save(run, state, world, best=best)
        return
    with atomic_write(run.checkpoint("last"), keep_old_as=run.checkpoint("previous")) as file:
        torch.save(state, file)
    if best:
        mark_best(run)
    sharded_checkpoint.sweep(run)


def mark_best(run: Run) -> None:
    """Make ``best.pt`` the same file as ``last.pt``."""
    link(run.checkpoint("last"), run.checkpoint("best"))
    sync_folder(run.folder)


def load(
    path: Path, students: Sequence[int] | None = None, *, verify: bool = True
) -> dict[str, Any]:
    """Read a checkpoint onto the CPU: what was saved, with ``rng`` of every process.

    Args:
        path: a file, or a link to the folder that several processes wrote.
        students: whose states are wanted, by number; by default all.
        verify: compare with checksums; of several processes that read it, one is enough.

    Raises:
        UserError: it is missing, damaged, foreign, or of another version.
    """
    if path.suffix != ".pt" and path.is_file():
        raise UserError(f"{path} is not a checkpoint: give the run folder, or a .pt file in it")
    if not path.exists():
        raise UserError(f"{path} does not exist: {_alternative(path)}")
    try:
        state = _read(path, students, verify)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} was not loaded, it holds objects that could run code: {_alternative(path)}"
        ) from None
    except (Exception, CheckpointException) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): {_alternative(path)}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of dml_fast: {_alternative(path)}")
    if state.get("version") != VERSION:
        way = "upgrade" if state["version"] > VERSION else "use an older"
        raise UserError(
            f"{path} has format {state['version']} and this dml_fast reads {VERSION}: "
            f"{way} dml_fast"
        )
    return state


def _read(path: Path, students: Sequence[int] | None, verify: bool) -> Any:
    if path.is_dir():
        return sharded_checkpoint.load(path, students, verify=verify)
    if verify:
        with zipfile.ZipFile(path) as archive:  # torch does not check every sum
            if broken := archive.testzip():
                raise zipfile.BadZipFile(f"bad checksum in {broken}")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if students is not None and isinstance(state, dict) and "students" in state:
        state["students"] = [state["students"][k] for k in students]
    return state


def _alternative(path: Path) -> str:
    others = [path.with_name(f"{name}.pt") for name in ("last", "previous", "best")]
    usable = [str(other) for other in others if other != path and other.exists()]
    if usable:
        return f"use {usable[0]} instead"
    return "restore it, or start a new run"
