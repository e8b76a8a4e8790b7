"""What an option of training adds to a step: EMA, clipping, accumulation, teachers, and others.

    python -m benchmarks.bench_options [--arch resnet32] [--batch 128] [--json FILE]
    pytest benchmarks/bench_options.py --benchmark-only

Each contestant is a trainer of `dml_fast.train` with the option, whose engine steps on one batch of
grey images of 32 x 32 pixels. They take turns; medians are divided by the median without options.
A second contestant without options shows how far two equal ones differ here. pytest-benchmark
times one after the other on a small cohort; it shows that each runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common import timing
from benchmarks.common.machine import provenance
from dml_fast.config import TrainConfig
from dml_fast.machine import keep_freed_memory
from dml_fast.reporting.markdown import table
from dml_fast.runs.folder import Run
from dml_fast.training.build import build_trainer
from dml_fast.training.signals import StopRequest

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAIN = "no option"
OPTIONS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "no option, again": {},
    "--ema 0.999": {"ema": 0.999},
    "--ema 0.999 --teach-with ema": {"ema": 0.999, "teach_with": "ema"},
    "--clip-norm 1": {"clip_norm": 1.0},
    "--no-decay norm,bias": {"no_decay": "norm,bias"},
    "--accumulate 4": {"accumulate": 4},
    "--class-weights auto": {"class_weights": "auto"},
    "--teachers RUN (one student)": {"teachers": "RUN:0"},
}
SIZE = 32


@contextmanager
def steps(
    arch: str, students: int, batch: int, executor: str, names: Sequence[str]
) -> Iterator[dict[str, Callable[[], Tensor]]]:
    """One step by name; all on the same batch."""
    g = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 1, SIZE, SIZE, generator=g).to(DEVICE)
    images = images.contiguous(memory_format=torch.channels_last)
    target = torch.randint(10, (batch,), generator=g).to(DEVICE)
    common = {"arch": arch, "cohort": students, "batch_size": batch, "executor": executor}
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = {}
        for place, name in enumerate(names):
            options = OPTIONS[name]
            if "teachers" in options:
                options = {**options, "teachers": f"{_finished(home / 'teacher', arch)}:0"}
            config = TrainConfig(**common, amp=True, **options)
            run = Run(home / str(place))
            trainer = stack.enter_context(closing(build_trainer(config, run, None, StopRequest())))
            for student in trainer.engine.cohort:
                student.model.train()
                student.set_lr(1e-3)
            found[name] = _step(trainer.engine, images, target)
        yield found


def _step(engine: Any, images: Tensor, target: Tensor) -> Callable[[], Tensor]:
    def step() -> Tensor:
        losses: Tensor = engine.step(images, target).losses
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return losses

    return step


def _finished(folder: Path, arch: str) -> Path:
    """Return a run of one short epoch."""
    config = TrainConfig(arch=arch, cohort=1, method="independent", epochs=1, train_fraction=0.1)
    with closing(build_trainer(config, Run(folder), None, StopRequest())) as trainer:
        trainer.fit()
        trainer.saver.write_results()
    return folder


@pytest.mark.parametrize("name", OPTIONS)
def bench_options(benchmark: Any, name: str) -> None:
    """Time one option on a small cohort."""
    with steps("resnet8", 2, 32, "sequential", [name]) as found:
        assert torch.isfinite(found[name]()).all()
        benchmark.group = f"step of 2 resnet8 with an option, batch 32, {DEVICE.type}"
        benchmark.pedantic(found[name], rounds=5, warmup_rounds=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of medians and of what each option adds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="resnet32")
    parser.add_argument("--students", type=int, default=2)
    parser.add_argument("--batch", type=int, default=128)
    usual = "graph" if DEVICE.type == "cuda" else "sequential"
    parser.add_argument("--executor", default=usual)
    parser.add_argument("--budget", type=float, default=120, help="seconds of timing")
    parser.add_argument("--json", type=Path, help="write the report there")
    args = parser.parse_args(argv)
    keep_freed_memory()
    with steps(args.arch, args.students, args.batch, args.executor, [*OPTIONS]) as found:
        turns = {name: timing.Turn(step) for name, step in found.items()}
        taken = timing.interleaved(turns, timing.wall_time, args.budget, (3, 200), warm_up=2)
    medians = {name: timing.figures(found)["median_ms"] for name, found in taken.items()}
    rows = [
        {"name": name, "median_ms": ms, "times": ms / medians[PLAIN]}
        for name, ms in medians.items()
    ]
    rounds = len(taken[PLAIN])
    print(
        f"{args.students} x {args.arch}, batch {args.batch}, bf16, executor {args.executor}; "
        f"{rounds} rounds in turns:\n"
    )
    cells = [[r["name"], f"{r['median_ms']:.1f}", f"{100 * (r['times'] - 1):+.1f}"] for r in rows]
    print(table(["option", "median ms", "added, %"], cells))
    if args.json:
        report = {"benchmark": "options", **provenance(DEVICE), **_given(args), "rounds": rounds}
        args.json.write_text(json.dumps({**report, "options": rows}, indent=1) + "\n")
    return 0


def _given(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("arch", "students", "batch", "executor")}


if __name__ == "__main__":
    sys.exit(main())
