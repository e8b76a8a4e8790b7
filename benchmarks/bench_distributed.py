"""Compare a step of a cohort over processes with a step of one process.

    python -m benchmarks.bench_distributed [--arch resnet32 ...] [--students 2 4] [--json FILE]
    pytest benchmarks/bench_distributed.py --benchmark-only

Each contestant is a job of real processes that communicate by gloo over loopback. The jobs take
turns, one step at a time. "2x1" shares the students over two processes, "1x2" the images (DDP);
each process has one thread. The exchange counts the bytes that a rank receives; those of DDP are
computed. `tests/distributed/test_bytes.py` compares both with the sockets.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.common.machine import provenance
from dml_fast.config import TrainConfig
from dml_fast.distributed.connect import connected
from dml_fast.distributed.launch import Launch, end
from dml_fast.engine import Engine
from dml_fast.engine.choice import make_executor
from dml_fast.engine.precision import Precision
from dml_fast.models import InputSpec
from dml_fast.reporting.markdown import table
from dml_fast.training.build import facts_of
from dml_fast.training.shares import place
from dml_fast.training.students import build_cohort

CLASSES, SIZE = 100, 32
BASE = "1 process, 1 thread"


class Job(NamedTuple):
    """Hold the number of processes, the threads of each, and options of training."""

    processes: int
    threads: int
    options: dict[str, Any]


JOBS = {
    BASE: Job(1, 1, {}),
    "1 process, 2 threads": Job(1, 2, {}),
    "1 process, threads (2 x 1)": Job(1, 2, {"executor": "threads"}),
    "2x1, 1 thread each": Job(2, 1, {"mesh": "2x1"}),
    "1x2, 1 thread each": Job(2, 1, {"mesh": "1x2"}),
}


class Running:
    """A job that waits for its turn.

    Args:
        job: what it is.
        options: of training, for all jobs.
    """

    def __init__(self, job: Job, options: dict[str, Any]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        text = json.dumps({"executor": "sequential", **options, **job.options})
        self._ranks = []
        for rank in range(job.processes):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.processes}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            variables |= {"OMP_NUM_THREADS": job.threads}
            self._ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.bench_distributed", "--worker", text],
                    env={**os.environ, **{k: str(v) for k, v in variables.items()}},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )

    def step(self) -> dict[str, Any]:
        """Run one step and return what rank 0 reports."""
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write("step\n")
            rank.stdin.flush()
        first = self._ranks[0].stdout
        assert first is not None
        line = first.readline()
        if not line:
            raise RuntimeError(f"the job ended with {[rank.wait() for rank in self._ranks]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End all ranks together, because they wait for each other."""
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.close()
        for rank in self._ranks:
            rank.wait(timeout=60)


def work(text: str) -> None:
    """Run one rank: one step for each line on the standard input."""
    launch, config = Launch.from_environment(), TrainConfig(**json.loads(text))
    cpu = torch.device("cpu")
    mesh, shares = place(config, launch.size)
    with connected(launch, mesh, shares, cpu, facts=facts_of(config)) as world:
        cohort = build_cohort(
            config,
            Precision.choose(config.amp, config.amp_dtype, cpu),
            num_classes=CLASSES,
            inputs=[InputSpec("image", (3, SIZE, SIZE))],
            world=world,
        )
        executor = make_executor(config.executor, len(cohort), cpu)
        engine = Engine(cohort, executor=executor)
        generator = torch.Generator().manual_seed(world.column)
        rows = config.batch_size // mesh.data
        images = torch.randn(rows, 3, SIZE, SIZE, generator=generator)
        images = images.contiguous(memory_format=torch.channels_last)
        target = torch.randint(CLASSES, (rows,), generator=generator)
        exchange, waited = world.exchange, 0.0
        if exchange is not None:

            def timed(mine: Any) -> Any:
                nonlocal waited
                begun = time.perf_counter()
                found = exchange(mine)
                waited += time.perf_counter() - begun
                return found

            timed.received_bytes = 0  # type: ignore[attr-defined]
            world.exchange = timed  # type: ignore[assignment]
        parameters = sum(p.numel() for s in cohort for p in s.model.parameters())
        for _ in sys.stdin:
            waited, begun = 0.0, time.perf_counter()
            losses = engine.step(images, target).losses.tolist()
            report = {
                "ms": 1e3 * (time.perf_counter() - begun),
                "exchange_ms": 1e3 * waited,
                "logits_bytes": exchange.received_bytes // exchange.calls if exchange else 0,
                "ddp_bytes": 2 * (mesh.data - 1) * 4 * parameters // mesh.data,
                "losses": losses,
            }
            if world.main:
                print(json.dumps(report), flush=True)


def compare(options: dict[str, Any], names: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Return the medians of the jobs, which take turns."""
    jobs = {name: Running(JOBS[name], options) for name in names}
    order, shuffle = list(jobs), random.Random(0)
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    for number in range(rounds + 2):
        shuffle.shuffle(order)
        for name in order:
            found = jobs[name].step()
            if number >= 2:  # the first compile, and DDP makes its buckets
                samples[name].append(found)
    for job in jobs.values():
        job.close()
    rows = []
    for name, found in samples.items():
        median = statistics.median(step["ms"] for step in found)
        rows.append(
            {
                "name": name,
                "median_ms": median,
                "min_ms": min(step["ms"] for step in found),
                "exchange_ms": statistics.median(step["exchange_ms"] for step in found),
                "logits_bytes": found[0]["logits_bytes"],
                "ddp_bytes": found[0]["ddp_bytes"],
            }
        )
    base = next((row["median_ms"] for row in rows if row["name"] == BASE), None)
    for row in rows:
        row["base_over_this"] = base / row["median_ms"] if base else None
    return rows


@pytest.mark.parametrize("name", JOBS)
def bench_distributed(benchmark: Any, name: str) -> None:
    """Time one job with a small cohort."""
    options = {"arch": "resnet8", "cohort": 2, "batch_size": 32}
    job = Running(JOBS[name], options)
    job.step()
    benchmark.group = "step of 2 resnet8, batch 32, over processes"
    found = benchmark.pedantic(job.step, rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(found)
    job.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table for each cohort."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=["resnet32"])
    parser.add_argument("--students", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--no-amp", action="store_true", help="fp32 in place of bf16")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path, help="write the report there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        work(args.worker)
        return 0
    report = {"benchmark": "distributed", **provenance(torch.device("cpu")), "results": []}
    for arch in args.arch:
        for students in args.students:
            options = {
                "arch": arch,
                "cohort": students,
                "batch_size": args.batch,
                "amp": not args.no_amp,
            }
            rows = compare(options, list(JOBS), args.rounds)
            report["results"].append({**options, "rounds": args.rounds, "contestants": rows})
            print(f"\n{students} x {arch}, batch {args.batch}; {args.rounds} rounds in turns:\n")
            heads = ["contestant", "median ms", "min ms", "1 thread / this", "exchange ms",
                     "logits kB a rank", "DDP kB a rank"]  # fmt: skip
            cells = [
                [
                    row["name"],
                    f"{row['median_ms']:.0f}",
                    f"{row['min_ms']:.0f}",
                    f"{row['base_over_this']:.2f}",
                    f"{row['exchange_ms']:.1f}",
                    f"{row['logits_bytes'] / 1e3:.1f}",
                    f"{row['ddp_bytes'] / 1e3:.1f}",
                ]
                for row in rows
            ]
            print(table(heads, cells), flush=True)
            if args.json:
                args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    end(main())
