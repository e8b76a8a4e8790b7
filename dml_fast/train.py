"""Train a cohort: ``python -m dml_fast.train --cohort 4 --amp``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from dml_fast import cli
from dml_fast.config import TrainConfig, from_mapping, load_toml
from dml_fast.errors import UserError
from dml_fast.run import Run, new_folder
from dml_fast.signals import StopRequest

if TYPE_CHECKING:
    from dml_fast.trainer import Trainer

# what may differ from the run that --resume continues
_MAY_CHANGE = (
    "data", "data_threads", "device", "executor", "loader", "log_every", "max_skipped",
    "save_every", "skip_corrupt", "tensorboard",
)  # fmt: skip


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
    own = Run.open(given.resume).config
    merged = cli.parse(TrainArguments, argv, "train", default=TrainArguments(**own.to_dict()))
    check_same_run(own, merged, given.resume)
    return merged


def check_same_run(own: TrainConfig, wanted: TrainConfig, run: object) -> None:
    """Refuse options that would make another run of the one that is being continued.

    Raises:
        UserError: naming the first such option and both values.
    """
    for field in fields(TrainConfig):
        old, new = getattr(own, field.name), getattr(wanted, field.name)
        if old != new and field.name not in _MAY_CHANGE:
            flag = "--" + field.name.replace("_", "-")
            raise UserError(
                f"{flag} is {new} and the run {run} has {old}: leave {flag} out to "
                "continue that run, or start a new one without --resume"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, and return the exit code: 0, or 128 + the signal that stopped the run."""
    args = arguments(argv)
    config = TrainConfig(**{f.name: getattr(args, f.name) for f in fields(TrainConfig)})
    config.check()
    run = Run.open(args.resume) if args.resume else Run(new_folder(config))
    with run.lock(), StopRequest() as stop:  # before torch, which takes seconds to import
        try:
            if not args.resume:
                run.prepare(needed_bytes=2**22)
            trainer = prepare(config, run, Path(args.resume) if args.resume else None, stop)
        except BaseException:
            run.remove_if_empty()
            raise
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


def prepare(config: TrainConfig, run: Run, resume: Path | None, stop: StopRequest) -> Trainer:
    """Open the data, build the cohort, and put it where a checkpoint left it.

    Args:
        config: checked.
        run: a folder that can be written to.
        resume: None, or the run folder or one of its checkpoints.
        stop: asks to stop after a step.
    """
    from dml_fast import checkpoint
    from dml_fast.allocator import keep_freed_memory
    from dml_fast.amp import Precision, pick_device
    from dml_fast.data import open_dataset
    from dml_fast.executor_choice import check_executor
    from dml_fast.log import Reporter, logger
    from dml_fast.trainer import Trainer

    precision = Precision.from_config(config, pick_device(config.device))
    check_executor(config.executor, precision.device)
    if precision.device.type == "cpu":
        keep_freed_memory()
    path = run.checkpoint("last") if resume and resume.is_dir() else resume
    if resume == run.folder and not any(run.folder.glob("*.pt")):
        path = None  # it was killed before its first checkpoint: from the start it is the same run
    state = checkpoint.load(path) if path else None
    reporter = Reporter(run.folder / "tensorboard" if config.tensorboard else None)
    options = {**config.data_options, "device": str(precision.device)}
    data = open_dataset(config.data, download=config.download, **options)
    if state is not None:
        saved = from_mapping(json.loads(state["config"]), str(path))
        check_same_run(saved, config, run.folder)
        if state["fingerprint"] != data.fingerprint:
            raise UserError(
                f"{run.folder} was trained on other images or labels than --data {config.data} "
                "holds: give the data it was trained on"
            )
    trainer = Trainer(config, run, data, precision, reporter, stop)
    run.check_writable(trainer.disk_bytes())
    if state is not None and path is not None:
        trainer.resume(state, path)
    trainer.describe()
    if path:
        logger.info("continuing %s at step %d", path, trainer.step)
    elif resume:
        logger.info("%s has no checkpoint yet: starting from its beginning", run.folder)
    return trainer


if __name__ == "__main__":
    sys.exit(cli.run(main))
