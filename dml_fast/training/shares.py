"""Which process holds which students and images: by the configuration, or by measured costs.

Nothing here imports torch before it measures.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dml_fast.config import TrainConfig
from dml_fast.config.checks_steps import check_parts
from dml_fast.distributed.mesh import Mesh, Shares, balanced, choose_mesh, choose_shares
from dml_fast.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from dml_fast.distributed.world import World
    from dml_fast.engine import Student
    from dml_fast.models import InputSpec

logger = logging.getLogger(__name__)

_STEPS = 3  # timed for each architecture, after one to warm up


def place(config: TrainConfig, processes: int) -> tuple[Mesh, Shares]:
    """Return the mesh of a run's processes and the students of each of its rows.

    Args:
        config: of the run.
        processes: how many train together.

    Raises:
        UserError: the mesh, the shares, the batch or an option does not fit that number.
    """
    students = len(config.architectures)
    mesh = choose_mesh(config.mesh, students, processes)
    shares = choose_shares(config.shares, students, mesh.cohort)
    if config.batch_size % mesh.data:
        raise UserError(
            f"--batch-size is {config.batch_size} and --mesh {mesh} has {mesh.data} columns: "
            "give a multiple of that"
        )
    if (
        config.retrieval
        and config.num_instances
        and config.batch_size // mesh.data % config.num_instances
    ):
        raise UserError(
            f"--batch-size {config.batch_size} over the {mesh.data} columns of --mesh {mesh} is "
            f"{config.batch_size // mesh.data} images each: give a multiple of --num-instances "
            f"{config.num_instances} per column"
        )
    check_parts(config, mesh.data)
    if config.update == "alternating" and mesh.cohort > 1:
        raise UserError(
            "--update alternating refreshes predictions one student after the other, in one "
            f"process, and --mesh {mesh} has {mesh.cohort} rows: give --mesh 1x{processes}, or "
            "--update simultaneous"
        )
    if config.fsdp and mesh.data == 1:
        raise UserError(
            f"--fsdp shares students out over the columns of the mesh and --mesh {mesh} has one: "
            "leave it out, or give more processes"
        )
    if mesh.data > 1 and config.executor == "graph":
        raise UserError(
            f"--executor graph does not capture what the {mesh.data} columns of --mesh {mesh} "
            "send each other: give auto, streams or sequential"
        )
    if config.fsdp and config.executor not in ("auto", "sequential"):
        raise UserError(
            f"--executor {config.executor} runs students side by side, which --fsdp does not "
            "allow: give auto or sequential"
        )
    return mesh, shares


def share_out_by_cost(
    world: World,
    students: Sequence[tuple[str, InputSpec]],
    make: Callable[[str, InputSpec], tuple[Student, Tensor]],
) -> None:
    """Let rank 0 time a step of each kind of student, and share the students out by that.

    Args:
        world: whose shares are set, on all ranks alike.
        students: the architecture and the input of each of K students.
        make: makes one to be timed, and its rows of one column of the mesh, (N, ...).
    """
    kinds = sorted({*students}, key=str)
    seconds = world.from_main(lambda: {kind: _step_seconds(*make(*kind)) for kind in kinds})
    world.share_out(balanced([seconds[kind] for kind in students], world.mesh.cohort))
    several = len({spec for _, spec in kinds}) > 1
    times = ", ".join(
        f"{arch}{f' on {spec.words}' if several else ''} {1e3 * seconds[arch, spec]:.0f} ms"
        for arch, spec in kinds
    )
    logger.info("shares measured: a step of %s", times)


def _step_seconds(student: Student, inputs: Tensor) -> float:
    """Return the median time of a training step, after one to warm up."""
    import torch

    student.model.train()
    times = []
    for _ in range(_STEPS + 1):
        begun = time.perf_counter()
        logits = student.forward(inputs)
        student.backward(logits, torch.zeros_like(logits))
        student.update()
        if inputs.is_cuda:
            torch.cuda.synchronize(inputs.device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])
