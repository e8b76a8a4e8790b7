"""Train a cohort: ``python -m dml_fast.train --cohort 4 --amp``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from dml_fast import cli
from dml_fast.config import TrainConfig
from dml_fast.config.files import CHANGES_A_RUN, check_same_run, load_toml
from dml_fast.distributed.launch import Launch, end, silence
from dml_fast.errors import UserError
from dml_fast.models import check_code
from dml_fast.runs.folder import Run
from dml_fast.training import job
from dml_fast.training.shares import place


@dataclass(frozen=True)
class TrainArguments(TrainConfig):
    """Train a cohort of networks that teach each other (Deep Mutual Learning, CVPR 2018)."""

    config: str = ""
    """TOML file with any of these options as keys; flags override it."""
    resume: str = ""
    """Continue this run folder, with its own configuration, from where it stopped."""


def arguments(argv: Sequence[str] | None, processes: int = 1) -> TrainArguments:
    """Read flags on top of ``--config`` or of the run that ``--resume`` continues.

    Args:
        argv: the command line; by default that of this process. A lone ``--`` says nothing: with
            it torchrun does not take ``--log`` for one of its own options.
        processes: how many train together.

    Raises:
        UserError: a bad file, or a flag that would change a run that is being continued.
    """
    argv = [arg for arg in (sys.argv[1:] if argv is None else argv) if arg != "--"]
    given = cli.parse(TrainArguments, argv, "train")
    if given.config and given.resume:
        raise UserError("--config and --resume exclude each other: a run keeps its configuration")
    if given.config:
        recipe = TrainArguments(**load_toml(given.config).to_dict())
        return cli.parse(TrainArguments, argv, "train", default=recipe)
    if not given.resume:
        return given
    own = _on(processes, Run.open(given.resume).config, given.mesh)
    merged = cli.parse(TrainArguments, argv, "train", default=TrainArguments(**own.to_dict()))
    check_same_run(own, merged, given.resume, CHANGES_A_RUN)
    if merged.epochs != own.epochs:
        merged = replace(merged, kl_warmup=own.with_epochs(merged.epochs).kl_warmup)
    if given.arch != own.arch:  # the user does not name it
        check_code(own.architectures, (), given.resume, f"add --arch {own.arch}")
    return merged


def _on(processes: int, own: TrainConfig, mesh: str) -> TrainConfig:
    """Return a run's configuration with as many of its options of processes as fit.

    Args:
        processes: how many there are now.
        own: the run's configuration.
        mesh: that is asked for, or "".
    """
    usual = replace(own, mesh=mesh, shares="")
    choices = [own] if mesh in ("", own.mesh) else []
    for choice in (*choices, usual):
        try:
            place(choice, processes)
        except UserError:
            continue
        return choice
    return replace(usual, fsdp=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, and return the exit code: 0, or 128 + the signal that stopped the run."""
    launch = Launch.from_environment()
    if not launch.main:
        silence()
    args = arguments(argv, launch.size)
    config = TrainConfig(**{f.name: getattr(args, f.name) for f in fields(TrainConfig)})
    return job.train(config, args.resume, launch)


if __name__ == "__main__":
    end(cli.run(main, prints_results=False))
