"""Checkpoints: written as a whole, verified when read, and loaded without running any code."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dml_fast.config import flag
from dml_fast.config_files import difference, from_mapping
from dml_fast.errors import UserError, first_line
from dml_fast.foreign import json_value
from dml_fast.models.torch_files import check_zip
from dml_fast.runs.files import atomic_write, link, sync_folder
from dml_fast.runs.folder import Run

if TYPE_CHECKING:
    from dml_fast.distributed.world import World

FORMAT = "dml_fast.checkpoint"  # of every version, wherever this module is
VERSION = 2


def save(run: Run, state: dict[str, Any], *, best: bool, world: World | None = None) -> None:
    """Write ``last.pt``; the one before becomes ``previous.pt``.

    Args:
        run: the folder to write to.
        state: tensors, numbers, strings, lists and dictionaries of these, so that it loads with
            ``weights_only=True``.
        best: whether to make it ``best.pt`` too.
        world: the processes, all of which call this; by default there is one. ``students`` and
            ``rng`` in ``state`` are those of each process.

    Raises:
        OSError, RuntimeError: it cannot be written.
        CheckpointError: the same, of several processes.
    """
    state = {"format": FORMAT, "version": VERSION, **state}
    if world is None or world.single:
        with atomic_write(run.checkpoint("last"), keep_old_as=run.checkpoint("previous")) as file:
            torch.save(state, file)
    else:
        from dml_fast.runs import sharded_checkpoint  # what it needs of torch is slow to import

        sharded_checkpoint.save(run, state, world)
    if world is None or world.main:
        if best:
            mark_best(run)
        run.remove_unused_parts()


def mark_best(run: Run) -> None:
    """Make ``best.pt`` the same file as ``last.pt``."""
    link(run.checkpoint("last"), run.checkpoint("best"))
    sync_folder(run.folder)


def load(
    path: Path, students: Sequence[int] | None = None, *, verify: bool = True
) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        path: a file, or a link to the folder that several processes wrote.
        students: the numbers of those whose states are wanted; by default all.
        verify: compare with the checksums. Where several processes read it, one is enough.

    Returns:
        What was saved; ``rng`` has the state of each process.

    Raises:
        UserError: it is missing, damaged, not a checkpoint, or of another version.
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
    except Exception as error:
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


def check_run(run: Run, state: dict[str, Any], path: Path) -> None:
    """Refuse a checkpoint of another run: it would be evaluated, or continued, as this one.

    The folder's name is no part of a run, which may be copied or renamed.

    Args:
        run: the run.
        state: what `load` returned.
        path: what it was read from.

    Raises:
        UserError: it was saved with another configuration, other students, or other data than
            ``config.json`` names.
    """
    saved = from_mapping(json_value(state["config"], path), str(path))
    if name := difference(run.config, saved):
        theirs, mine = getattr(saved, name), getattr(run.config, name)
        why = f"it has {flag(name)} {theirs} and not {mine}"
    elif any(student["arch"] not in run.config.architectures for student in state["students"]):
        why = "it has other students"
    elif state["fingerprint"] != run.facts.fingerprint:
        why = "it learned other images or labels"
    else:
        return
    raise UserError(
        f"{path} is of another run than {run.config_file} ({why}): restore the one that was changed"
    )


def _read(path: Path, students: Sequence[int] | None, verify: bool) -> Any:
    if path.is_dir():
        from dml_fast.runs import sharded_checkpoint

        return sharded_checkpoint.load(path, students, verify=verify)
    if verify:
        check_zip(path)  # torch verifies only some
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
