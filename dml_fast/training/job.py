"""One run from its start to its exit code: its processes, its folder, and restarts by torchrun."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dml_fast.config import TrainConfig
from dml_fast.distributed.launch import Launch
from dml_fast.distributed.mesh import Mesh, Shares
from dml_fast.foreign import shown
from dml_fast.models import names_code
from dml_fast.runs.folder import Run, new_folder
from dml_fast.runs.named import students_named
from dml_fast.training.shares import place
from dml_fast.training.signals import StopRequest

if TYPE_CHECKING:
    from dml_fast.data.features import Features
    from dml_fast.distributed.world import World


def train(
    config: TrainConfig,
    resume: str,
    launch: Launch,
    *,
    brief: bool = False,
    features: Features | None = None,
) -> int:
    """Train a run, or what is left of it.

    Args:
        config: of the run.
        resume: a run folder, or a checkpoint in one, to continue from; "" for a new run.
        launch: how this process was started.
        brief: whether to leave out curves and the last table, for one of many runs.
        features: of texts and vectors, for a new run; by default they are fitted to its rows.

    Returns:
        The exit code: 0, or 128 + the signal that stopped the run. It is 0 too where ``--max-time``
        or ``--max-steps`` stopped it.

    Raises:
        UserError: an option, the folder, the data or the checkpoint does not allow the run.
        TrainingError: the run cannot continue.
    """
    begun = bool(resume) and Run.open(resume).to_continue(Path(resume)) is not None
    (replace(config, pretrained="") if begun else config).check()  # its weights are needed once
    if not resume:
        students_named(config.teachers, "--teachers")
        students_named(config.init_from, "--init-from")
    processes = _connected(config, launch, *place(config, launch.size))
    by_torchrun = launch.size > 1 or launch.agent_store
    job = _job_of_torchrun if by_torchrun else _job_alone
    with (
        StopRequest(twice=launch.size > 1, seconds=config.time_limit) as stop,
        job(processes, config, resume, launch) as (world, run, restarted),
    ):
        from dml_fast.training.build import build_trainer

        if restarted:
            config = run.config  # with the executor that the first attempt has chosen
        start = Path(resume) if resume else run.folder if restarted else None
        with closing(build_trainer(config, run, start, stop, world, features)) as trainer:
            if world.watch is not None:
                world.watch.where = trainer.whereabouts
            complete = trainer.fit()
            if complete:
                trainer.finish(brief=brief)
    if complete:
        return 0
    step = trainer.progress.step
    code = f" --arch {config.arch}" if any(map(names_code, config.architectures)) else ""
    again, by = f"--resume {shown(run.folder)}{code}", ""
    if not stop.signal and 0 < config.max_steps <= step:
        again, by = f"{again} --max-steps 0", f" by --max-steps {config.max_steps}"
    elif not stop.signal and config.max_time:
        by = f" by --max-time {config.max_time}"
    print(f"stopped at step {step}{by}; continue with {again}", file=sys.stderr)
    return stop.exit_code


@contextmanager
def _connected(config: TrainConfig, launch: Launch, mesh: Mesh, shares: Shares) -> Iterator[World]:
    """Connect the processes while inside. Torch, which takes seconds to import, comes here."""
    from dml_fast.distributed.connect import connected
    from dml_fast.training.build import device_of, facts_of

    device, facts = device_of(config, launch), facts_of(config)
    with connected(launch, mesh, shares, device, facts=facts, backend=config.backend) as world:
        yield world


@contextmanager
def _job_alone(
    processes: AbstractContextManager[World], config: TrainConfig, resume: str, launch: Launch
) -> Iterator[tuple[World, Run, bool]]:
    """Hold the run's folder, then enter ``processes``: a bad folder is refused at once."""
    run = Run.open(resume) if resume else Run(new_folder(config))
    with run.taken(new=not resume), processes as world:
        yield world, run, False


@contextmanager
def _job_of_torchrun(
    processes: AbstractContextManager[World], config: TrainConfig, resume: str, launch: Launch
) -> Iterator[tuple[World, Run, bool]]:
    """Enter ``processes``; then rank 0 chooses and holds the folder, for all.

    Yields:
        The world, the run, and whether torchrun has restarted a job that had begun this run.
    """
    with processes as world, ExitStack() as stack:
        folder, restarted = world.from_main(lambda: _choose_folder(config, resume, launch))
        run = Run(Path(folder))
        with world.all_or_none():
            if world.main:
                stack.enter_context(run.taken(new=not (resume or restarted)))
        yield world, run, restarted


def _choose_folder(config: TrainConfig, resume: str, launch: Launch) -> tuple[str, bool]:
    """Return the run's folder, and whether torchrun has restarted a job that had begun it."""
    from dml_fast.distributed.connect import remembered

    if resume:
        return str(Run.open(resume).folder), False
    if launch.restarts and (before := remembered(launch, "folder")):
        return before, Run(Path(before)).config_file.is_file()
    folder = str(new_folder(config))
    remembered(launch, "folder", folder)
    return folder, False
