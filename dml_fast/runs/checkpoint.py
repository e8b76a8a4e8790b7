"""Checkpoints: written as a whole, verified when read, and loaded without running any code."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from dml_fast.config import flag
from dml_fast.config.files import difference, from_mapping
from dml_fast.errors import UserError
from dml_fast.foreign import Unfit, json_value, opened, reading, typed
from dml_fast.machine import sync_folder
from dml_fast.models.torch_files import load_file
from dml_fast.runs.description import earlier
from dml_fast.runs.files import atomic_write, link
from dml_fast.runs.folder import Run
from dml_fast.runs.history import EpochLine, checked

if TYPE_CHECKING:
    from dml_fast.distributed.world import World

FORMAT = "dml_fast.checkpoint"  # of every version, wherever this module is
VERSION = 2


class Moments(TypedDict):
    """A student's optimizer: for each parameter, by its number, tensors by name."""

    state: dict[int, dict[str, Tensor]]


class _Student(TypedDict):
    arch: str
    model: dict[str, Tensor]
    optimizer: Moments
    scaler: dict[str, int | float]


class StudentState(_Student, total=False):
    """A student in a checkpoint, with the average of its weights if one is kept."""

    average: dict[str, Tensor]


class Generators(TypedDict):
    """The state of a process's generators of random numbers: see `dml_fast.rng.state`."""

    torch: Tensor
    cuda: list[Tensor]
    python: str
    numpy: Tensor
    numpy_rest: str


class State(TypedDict):
    """What a checkpoint holds; ``config`` and ``history`` are texts of JSON."""

    config: str
    fingerprint: str
    mesh: str
    step: int
    seconds: float
    history: str
    meter: Tensor
    students: list[StudentState]
    rng: list[Generators]


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


def load(path: Path, students: Sequence[int] | None = None, *, verify: bool = True) -> State:
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
    with reading(path, _alternative(path)):
        try:
            state = _read(path, students, verify)
        except pickle.UnpicklingError:
            raise UserError(
                f"{path} was not loaded, it holds objects that could run code: {_alternative(path)}"
            ) from None
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise UserError(f"{path} is not a checkpoint of dml_fast: {_alternative(path)}")
        version = typed(state.get("version"), int, "its version")
        if version != VERSION:
            way = "upgrade" if version > VERSION else "use an older"
            raise UserError(
                f"{path} has format {version} and this dml_fast reads {VERSION}: {way} dml_fast"
            )
        checked_state: State = typed(state, State, "it")
        _check_tensors(checked_state)
        return checked_state


def check_run(run: Run, state: State, path: Path) -> None:
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
    if (name := difference(run.config, saved)) and all(
        difference(config, saved) for config in earlier(run.config, run.changes)
    ):
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


def history_of(run: Run, state: State, path: Path) -> list[EpochLine]:
    """Return the lines of metrics in a checkpoint of a run: one for each epoch before it.

    Args:
        run: the run.
        state: what `load` returned.
        path: what it was read from.

    Raises:
        UserError: they are damaged.
    """
    with reading(path):
        lines = checked(json_value(state["history"], path), run.config.architectures)
        if lines and lines[-1]["step"] > state["step"]:
            raise Unfit(f"it is of step {state['step']} and has a line of {lines[-1]['step']}")
        return lines


def _read(path: Path, students: Sequence[int] | None, verify: bool) -> Any:
    if path.is_dir():
        from dml_fast.runs import sharded_checkpoint

        return sharded_checkpoint.load(path, students, verify=verify)
    with opened(path) as file:
        state = load_file(file, verify=verify)
    if students is not None and isinstance(state, dict) and "students" in state:
        state["students"] = [state["students"][k] for k in students]
    return state


def _check_tensors(state: State) -> None:
    """Refuse tensors that a pickle can name and no run saves, such as those without memory."""
    tensors = [state["meter"]]
    for student in state["students"]:
        tensors += [*student["model"].values(), *student.get("average", {}).values()]
        tensors += [
            t for moments in student["optimizer"]["state"].values() for t in moments.values()
        ]
    for generators in state["rng"]:
        tensors += [generators["torch"], generators["numpy"], *generators["cuda"]]
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise Unfit(f"it holds a tensor of {tensor.layout} on {tensor.device}")


def _alternative(path: Path) -> str:
    others = [path.with_name(f"{name}.pt") for name in ("last", "previous", "best")]
    usable = [str(other) for other in others if other != path and other.exists()]
    if usable:
        return f"use {usable[0]} instead"
    return "restore it, or start a new run"
