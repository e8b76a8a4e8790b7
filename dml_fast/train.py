"""Train a cohort: ``python -m dml_fast.train --cohort 4 --amp``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dml_fast import cli
from dml_fast.config import TrainConfig
from dml_fast.config_files import check_same_run, from_mapping, load_toml
from dml_fast.distributed.launch import Launch, end, silence
from dml_fast.distributed.mesh import Mesh, Shares
from dml_fast.errors import UserError
from dml_fast.runs.folder import Run, new_folder
from dml_fast.training.shares import place
from dml_fast.training.signals import StopRequest

if TYPE_CHECKING:
    from dml_fast.data import DataSet
    from dml_fast.distributed.world import World
    from dml_fast.engine.precision import Precision
    from dml_fast.training.trainer import Trainer


@dataclass(frozen=True)
class TrainArguments(TrainConfig):
    """Train a cohort of networks that teach each other (Deep Mutual Learning, CVPR 2018)."""

    config: str = ""
    """TOML file with any of these options as keys; flags override it."""
    resume: str = ""
    """Continue this run folder, with its own configuration, from where it stopped."""


def arguments(argv: Sequence[str] | None) -> TrainArguments:
    """Read flags on top of ``--config`` or of the run that ``--resume`` continues.

    Raises:
        UserError: a bad file, or a flag that would change a run that is being continued.
    """
    given = cli.parse(TrainArguments, argv, "train")
    if given.config and given.resume:
        raise UserError("--config and --resume exclude each other: a run keeps its configuration")
    if given.config:
        recipe = TrainArguments(**load_toml(given.config).to_dict())
        return cli.parse(TrainArguments, argv, "train", default=recipe)
    if not given.resume:
        return given
    own = replace(Run.open(given.resume).config, mesh="", shares="", fsdp=False)
    merged = cli.parse(TrainArguments, argv, "train", default=TrainArguments(**own.to_dict()))
    check_same_run(own, merged, given.resume)
    return merged


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, and return the exit code: 0, or 128 + the signal that stopped the run."""
    launch = Launch.from_environment()
    if not launch.main:
        silence()
    args = arguments(argv)
    config = TrainConfig(**{f.name: getattr(args, f.name) for f in fields(TrainConfig)})
    config.check()
    mesh, shares = place(config, launch.size)
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest(twice=launch.size > 1))
        by_torchrun = launch.size > 1 or launch.agent_store
        if not by_torchrun:  # before torch, which takes seconds to import
            run, known = Run.open(args.resume) if args.resume else Run(new_folder(config)), False
            stack.enter_context(run.taken(new=not args.resume))
        world = stack.enter_context(_world(launch, mesh, shares, config))
        if by_torchrun:
            folder, known = world.from_main(lambda: _folder(launch, args.resume, config))
            run = Run(Path(folder))
            with world.all_or_none():
                if world.main:
                    stack.enter_context(run.taken(new=not (args.resume or known)))
        if known:
            config = run.config
        resume = Path(args.resume) if args.resume else run.folder if known else None
        trainer = prepare(config, run, resume, stop, world)
        if world.watch is not None:
            world.watch.where = lambda: (
                f", at step {trainer.step}; continue from the newest checkpoint with "
                f"--resume {run.folder}"
            )
        try:
            complete = trainer.fit()
            if complete:
                trainer.finish()
        finally:
            trainer.loader.close()
            trainer.reporter.close()
    if complete:
        return 0
    print(f"stopped at step {trainer.step}; continue with --resume {run.folder}", file=sys.stderr)
    return stop.exit_code


def _world(
    launch: Launch, mesh: Mesh, shares: Shares, config: TrainConfig
) -> AbstractContextManager[World]:
    """The processes, connected."""
    from dml_fast.distributed.connect import connected, pick_local_device
    from dml_fast.engine.precision import pick_device
    from dml_fast.training.build import facts_of

    device = pick_device(pick_local_device(config.device, launch))
    return connected(launch, mesh, shares, device, facts=facts_of(config), backend=config.backend)


def _folder(launch: Launch, resume: str, config: TrainConfig) -> tuple[str, bool]:
    """The run's folder, and whether torchrun has restarted a job that has begun it."""
    from dml_fast.distributed.connect import remembered

    if resume:
        return str(Run.open(resume).folder), False
    if launch.restarts and (before := remembered(launch, "folder")):
        return before, Run(Path(before)).config_file.is_file()
    folder = str(new_folder(config))
    remembered(launch, "folder", folder)
    return folder, False


def prepare(
    config: TrainConfig,
    run: Run,
    resume: Path | None,
    stop: StopRequest,
    world: World | None = None,
) -> Trainer:
    """Open the data, build the cohort, and put it where a checkpoint left it.

    Args:
        config: checked.
        run: a folder that can be written to.
        resume: None, or the run folder or one of its checkpoints.
        stop: asks to stop after a step.
        world: the processes that train together; by default there is one.
    """
    from dml_fast.distributed.connect import pick_local_device
    from dml_fast.distributed.world import World
    from dml_fast.engine.choice import check_executor
    from dml_fast.engine.precision import Precision, pick_device
    from dml_fast.machine import keep_freed_memory
    from dml_fast.reporting.console import Reporter, logger
    from dml_fast.runs import checkpoint
    from dml_fast.training.costs import share_out_by_cost
    from dml_fast.training.trainer import Trainer

    world = world or World.alone(len(config.architectures))
    device = pick_device(pick_local_device(config.device, world.launch))
    precision = Precision.choose(config.amp, config.amp_dtype, device)
    check_executor(config.executor, precision.device)
    if precision.device.type == "cpu":
        keep_freed_memory()
    reporter = Reporter(run.folder / "tensorboard" if config.tensorboard and world.main else None)
    data = _open_data(config, precision, world)
    if config.shares == "measured":
        share_out_by_cost(config, data, precision, world)
    path = _checkpoint_of(run, resume)
    with world.all_or_none():
        state = checkpoint.load(path, world.students, verify=world.main) if path else None
        if state is not None:
            _check_state(state, path, config, run, data)
    trainer = Trainer(config, run, data, precision, reporter, stop, world)
    needed = trainer.disk_bytes()
    with world.all_or_none():
        if world.main:
            run.check_writable(needed)
        if state is not None and path is not None:
            trainer.resume(state, path)
    trainer.describe()
    if path:
        logger.info("continuing %s at step %d", path, trainer.step)
    elif resume:
        logger.info("%s has no checkpoint yet: starting from its beginning", run.folder)
    return trainer


def _checkpoint_of(run: Run, resume: Path | None) -> Path | None:
    """The checkpoint to go on from; None for a run that was killed before its first.

    From the start that is the same run.
    """
    if resume is None or (resume == run.folder and not any(run.folder.glob("*.pt"))):
        return None
    return run.checkpoint("last") if resume.suffix != ".pt" and resume.is_dir() else resume


def _open_data(config: TrainConfig, precision: Precision, world: World) -> DataSet:
    """Open the data on every rank; what has to be fetched, rank 0 fetches first.

    Raises:
        UserError: it cannot be read, or ranks see other data.
    """
    from dml_fast.data import open_dataset
    from dml_fast.distributed.world import agreed

    options = {**config.data_options, "device": str(precision.device)}
    if config.download and not world.single:
        world.from_main(lambda: open_dataset(config.data, download=True, **options).fingerprint)
    with world.all_or_none():
        data = open_dataset(config.data, download=config.download and world.main, **options)
    found = world.all_gather(data.fingerprint)
    for rank, fingerprint in enumerate(found):
        if fingerprint != found[0]:
            raise agreed(
                UserError(
                    f"rank {rank} has other images or labels in --data {config.data} than rank 0: "
                    "give all ranks the same data"
                )
            )
    return data


def _check_state(
    state: dict[str, Any], path: Path | None, config: TrainConfig, run: Run, data: DataSet
) -> None:
    """Refuse a checkpoint of another run, or of other data.

    Raises:
        UserError: it is.
    """
    saved = from_mapping(json.loads(state["config"]), str(path))
    check_same_run(saved, config, run.folder)
    if state["fingerprint"] != data.fingerprint:
        raise UserError(
            f"{run.folder} was trained on other images or labels than --data {config.data} "
            "holds: give the data it was trained on"
        )


if __name__ == "__main__":
    end(cli.run(main))
