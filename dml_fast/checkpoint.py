"""Checkpoints: written whole or not at all, and refused by name when damaged or foreign."""

from __future__ import annotations

import json
import logging
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dml_fast.errors import UserError
from dml_fast.run import Run, atomic_write, link, sync_folder

logger = logging.getLogger(__name__)

FORMAT = "dml_fast.checkpoint"
VERSION = 1


def save(run: Run, state: dict[str, Any], *, best: bool) -> None:
    """Write ``last.pt``; what was last becomes ``previous.pt``, and the best one ``best.pt``.

    Args:
        run: where to.
        state: tensors, numbers, strings, lists and dictionaries of these, so that it loads with
            ``weights_only=True``.
        best: whether this one is also the best so far.
    """
    with atomic_write(run.checkpoint("last"), keep_old_as=run.checkpoint("previous")) as file:
        torch.save({"format": FORMAT, "version": VERSION, **state}, file)
    if best:
        mark_best(run)


def mark_best(run: Run) -> None:
    """Make ``best.pt`` the same file as ``last.pt``."""
    link(run.checkpoint("last"), run.checkpoint("best"))
    sync_folder(run.folder)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        UserError: it is missing, damaged, foreign, or of a newer version.
    """
    if path.suffix != ".pt" and path.is_file():
        raise UserError(f"{path} is not a checkpoint: give the run folder, or a .pt file in it")
    if not path.is_file():
        raise UserError(f"{path} does not exist: {_alternative(path)}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not check every sum
            if broken := archive.testzip():
                raise zipfile.BadZipFile(f"bad checksum in {broken}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged ({reason}): {_alternative(path)}") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} was not loaded, it holds objects that could run code: {_alternative(path)}"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of dml_fast: {_alternative(path)}")
    if state.get("version", 0) > VERSION:
        raise UserError(
            f"{path} has format {state['version']} and this dml_fast reads up to {VERSION}: "
            "upgrade dml_fast"
        )
    return state


def rng_state() -> dict[str, Any]:
    """The state of every global random generator, in types that ``weights_only`` accepts."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": json.dumps(random.getstate()),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_rest": json.dumps([str(kind), int(position), int(has_gauss), float(gauss)]),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every global random generator back to ``rng_state()``."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    else:
        logger.warning(
            "the checkpoint was written with %d CUDA devices and there are %d: "
            "dropout there continues with other draws",
            len(state["cuda"]),
            torch.cuda.device_count(),
        )
    version, internal, gauss = json.loads(state["python"])
    random.setstate((version, tuple(internal), gauss))
    kind, position, has_gauss, cached = json.loads(state["numpy_rest"])
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state((kind, keys, position, has_gauss, cached))


def _alternative(path: Path) -> str:
    others = [path.with_name(f"{name}.pt") for name in ("last", "previous", "best")]
    usable = [str(other) for other in others if other != path and other.is_file()]
    if usable:
        return f"use {usable[0]} instead"
    return "restore it, or start a new run"
