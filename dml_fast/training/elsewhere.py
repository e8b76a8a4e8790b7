"""What a run's last bits depend on besides its options, and what changes if it moves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dml_fast.distributed.mesh import Mesh
from dml_fast.engine import Cohort
from dml_fast.foreign import json_value, reading, typed
from dml_fast.version import __version__


def surroundings(cohort: Cohort, executor: str) -> dict[str, str]:
    """Return what decides the last bits of a step: device, type, executor, threads, versions."""
    precision = cohort.students[0].precision
    cuda = precision.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(precision.device)
        if cuda
        else f"CPU with {torch.backends.cpu.get_cpu_capability()}",
        "precision": str(precision),
        "executor": executor,
        "fsdp": "yes" if cohort.shared_out else "no",
        "threads": "" if cuda else str(torch.get_num_threads()),
        "dml_fast": __version__,
        "torch": str(torch.__version__),
    }


def changed_surroundings(state: Mapping[str, Any], here: dict[str, str], path: Path) -> str:
    """Say in one sentence which surroundings differ from those of a checkpoint; "" for none.

    Args:
        state: of the checkpoint; one of an earlier version says nothing.
        here: `surroundings` of this process.
        path: of the checkpoint.

    Raises:
        UserError: the checkpoint's are damaged.
    """
    if "surroundings" not in state:
        return ""
    with reading(path):
        found = json_value(state["surroundings"], path)
        saved: dict[str, str] = typed(found, dict[str, str], "its surroundings")
    changes = [
        f"{name} {here[name]} in place of {saved[name]}"
        for name in here
        if name in saved and here[name] != saved[name]
    ]
    if not changes:
        return ""
    return f"the run continues with {', '.join(changes)}: not bit for bit as a run without a stop"


def changed_mesh(saved: str, mesh: Mesh, batch_size: int, path: Path) -> str:
    """Say in one sentence what another mesh changes; "" if it is the same.

    Args:
        saved: the mesh of the checkpoint.
        mesh: of this run now.
        batch_size: images per step, of all processes.
        path: of the checkpoint.

    Raises:
        UserError: the checkpoint's mesh is damaged.
    """
    if saved == str(mesh):
        return ""
    with reading(path):
        rows, columns = map(int, saved.split("x"))
        before = Mesh(rows, columns)
        images = batch_size // before.data
    draws = "networks that draw random numbers (dropout) get other draws from here"
    if before.data == mesh.data:
        what = f"{draws}; all else is as it was"
    else:
        what = (
            f"what looks at a whole batch (BatchNorm, triplets, mixup) sees "
            f"{batch_size // mesh.data} images in place of {images}, gradients are rounded "
            f"differently, and {draws}"
        )
    return f"the run was saved on a mesh of {saved} and continues on {mesh}: {what}"
