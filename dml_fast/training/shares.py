"""From a configuration and a number of processes to the mesh and the shares."""

from __future__ import annotations

from dml_fast.config import TrainConfig
from dml_fast.distributed.mesh import Mesh, Shares, choose_mesh, choose_shares
from dml_fast.errors import UserError


def place(config: TrainConfig, processes: int) -> tuple[Mesh, Shares]:
    """Which process holds which students and which part of a batch.

    Args:
        config: of the run.
        processes: how many train together.

    Raises:
        UserError: mesh, shares, batch or options do not fit that number.
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
            f"{config.num_instances} a column"
        )
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
