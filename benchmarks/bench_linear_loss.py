"""Time and memory of linear heads and their mutual loss, with whole logits and without.

    python -m benchmarks.bench_linear_loss [--shape KxNxCxD] [--dtype float32] [--json FILE]
    pytest benchmarks/bench_linear_loss.py --benchmark-only

Each contestant computes the gradients of hidden states (N, D) and weights (C, D) of K students;
"shared weight" is one weight for all. On CUDA the shape is 4 students of a language model, N =
4096, C = 131072, D = 1024 in bf16; on a CPU it is small. Peaks are beyond hidden states and
weights. On CUDA they are ``torch.cuda.max_memory_allocated``; on a CPU the bytes of all tensors
alive at once, as PyTorch's dispatcher sees them, and in the script also the growth of the resident
set of a fresh process.
``predicted`` is the dispatcher's count on the meta device, where the large shape costs nothing; the
closed form replaces the kernels there.

Contestants take turns, except those that could disturb the others: memory that is asked for and
given back falls into others' time where it nearly fills the device. On CUDA "naive" and "careful"
(64 and 26 GiB) run before the others, each in a process of its own; ``--alone`` names them.

The arithmetic for that shape, in GiB; K N C logits are 4 in bf16 and 8 in fp32:

    naive              64.0  logits 4; fp32 softmax and log-softmax of 12 pairs 48, of the
                             cross-entropies 8; gradients on their way 4
    careful            26.0  logits 4, log-softmax 8, softmax 8, gradients of log-softmax 6
    closed form        30.5  logits 4, three fp32 buffers 24, what the peers share 2.5
    kernels             8.3  logits 4, their gradients 4, a gradient of the weights 0.25
    without logits      2.3  fp32 gradients of weights 2 and of hidden states 0.06; the closed
                             form's chunk of 32 rows and a product, 0.28
                        3.1  with kernels: the logits of 1,024 rows, 1, and no product beside
                             the sums; their gradients take the logits' place
    lean                1.2  with kernels: gradients of weights in bf16 1, logits of 4,096 classes
                             0.125, fp32 gradients of hidden states 0.06

That is 1/20 of the usual loop, 1/10 of the closed form, and 1/8 of the careful loop. Compared
with the kernels on whole logits it is 3/8: the gradients of the weights, 1 in bf16, have to exist,
and take 2 while they are summed.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import clocks, counting, tables, timing
from benchmarks.common.loss_case import DTYPES
from benchmarks.common.machine import provenance
from benchmarks.common.tables import Column, Row
from benchmarks.peers import loss as peers
from dml_fast.loss import mutual_loss, reference
from dml_fast.loss.linear import linear_mutual_loss

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LARGE = (4, 4096, 131072, 1024)  # (K, N, C, D)
SHAPE, DTYPE = (LARGE, "bfloat16") if DEVICE.type == "cuda" else ((4, 512, 8192, 64), "float32")
# Of the norm of the gradients' error, relative. Logits rounded to bf16 are off by 0.4%.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
MIB = 2**20
PROC_STATUS = Path("/proc/self/status")  # on Linux

Shape = tuple[int, int, int, int]
Losses = Callable[[list[Tensor], list[Tensor], Tensor], Tensor]


def with_logits(losses: Callable[[list[Tensor], Tensor], Any]) -> Losses:
    """A loss of logits, as one of hidden states and weights."""

    def call(hidden: list[Tensor], weight: list[Tensor], target: Tensor) -> Tensor:
        found: Tensor = losses(
            [F.linear(*head) for head in zip(hidden, weight, strict=True)], target
        )
        return found

    return call


def ours(memory: str) -> Losses:
    """Linear heads, without statistics."""

    def call(hidden: list[Tensor], weight: list[Tensor], target: Tensor) -> Tensor:
        found = linear_mutual_loss(hidden, weight, target, memory=memory)
        assert isinstance(found, Tensor)
        return found

    return call


CONTESTANTS: dict[str, Losses] = {
    "naive": with_logits(peers.naive),
    "careful": with_logits(peers.careful),
    "mutual_loss": with_logits(mutual_loss),
    "linear_mutual_loss": ours("fast"),
    "ours, lean": ours("lean"),
    "ours, shared weight": ours("fast"),
    "ours, shared weight, lean": ours("lean"),
}


class Heads:
    """Hidden states, weights and a target, and what a contestant makes of them."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device | str):
        """Draw them, so that logits have a standard deviation of 2."""
        students, rows, classes, width = shape
        draw = functools.partial(torch.randn, dtype=dtype, device=device)
        torch.manual_seed(0)
        self.hidden = [draw(rows, width).requires_grad_() for _ in range(students)]
        self.weight = [
            draw(classes, width).mul_(2 * width**-0.5).requires_grad_() for _ in range(students)
        ]
        self.target = torch.randint(classes, (rows,), device=device)

    def run(self, name: str) -> tuple[Tensor, ...]:
        """The gradients of all hidden states and weights by a contestant."""
        return self.by(CONTESTANTS[name], "shared" in name)

    def by(self, losses: Losses, shared: bool) -> tuple[Tensor, ...]:
        """The same; ``shared``: all students have the first one's weight."""
        weight = self.weight[:1] if shared else self.weight
        total = losses(self.hidden, weight * (len(self.hidden) // len(weight)), self.target).sum()
        return torch.autograd.grad(total, self.hidden + weight)


def error_of(name: str, shape: Shape, dtype: str) -> float:
    """Of a contestant's gradients, relative to float64, for 8 of the rows."""
    students, _, classes, width = shape
    small = Heads((students, 8, classes, width), DTYPES[dtype], DEVICE)
    found = small.run(name)
    for tensors in (small.hidden, small.weight):
        tensors[:] = [t.detach().double().requires_grad_() for t in tensors]
    exact = small.by(with_logits(reference.mutual_loss), "shared" in name)
    pairs = zip(found, exact, strict=True)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def peak_of(name: str, heads: Heads) -> int:
    """Peak bytes beyond the heads: allocated on CUDA, counted by the dispatcher elsewhere."""
    call = functools.partial(heads.run, name)
    if DEVICE.type == "cuda":
        return counting.device_bytes(call)
    return counting.operators_and_bytes(call)[1]


def predicted(name: str, shape: Shape, dtype: str) -> int:
    """Return `peak_of` for tensors without data, as the dispatcher counts."""
    heads = Heads(shape, DTYPES[dtype], "meta")
    return counting.work(functools.partial(heads.run, name)).peak


# ---------------------------------------------------------------- under pytest-benchmark


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: those of a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CONTESTANTS)
def bench_linear_loss(benchmark: Any, name: str) -> None:
    """Forward and backward of one contestant."""
    assert error_of(name, SHAPE, DTYPE) < TOLERANCE[DTYPE]
    heads = Heads(SHAPE, DTYPES[DTYPE], DEVICE)

    def call() -> None:
        heads.run(name)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"linear heads and mutual loss {SHAPE} {DTYPE}"
    try:
        benchmark.extra_info["peak_bytes"] = peak_of(name, heads)
    except torch.OutOfMemoryError:
        pytest.skip("out of memory")
    benchmark.extra_info["predicted_peak_bytes_of_the_large_shape"] = predicted(
        name, LARGE, "bfloat16"
    )
    benchmark.pedantic(call, rounds=3, warmup_rounds=1)


# ---------------------------------------------------------------- side by side


def resident(name: str, shape: Shape, dtype: str) -> int:
    """Return the bytes by which a fresh process grows beyond its heads."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.bench_linear_loss",
        "--resident",
        name,
        "--dtype",
        dtype,
    ]
    command += ["--shape", "x".join(map(str, shape))]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def own_growth(name: str, shape: Shape, dtype: str) -> int:
    """Print that growth; `resident` runs this in the fresh process."""
    heads = Heads(shape, DTYPES[dtype], DEVICE)
    before = high_water()
    heads.run(name)
    return high_water() - before


def high_water() -> int:
    """The largest resident set so far, in bytes. Not ru_maxrss, which a child inherits."""
    (line,) = (x for x in PROC_STATUS.read_text().splitlines() if x.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def compare(names: Sequence[str], shape: Shape, dtype: str, budget_s: float) -> dict[str, Any]:
    """Errors, memory and time of contestants that take turns; one that does not fit says so."""
    heads = Heads(shape, DTYPES[dtype], DEVICE)
    rows: list[Row] = []
    for name in names:
        row = {"name": name, "grad_error": error_of(name, shape, dtype)}
        rows.append(row)
        row["predicted_large_peak_bytes"] = predicted(name, LARGE, "bfloat16")
        try:
            row["peak_bytes"] = peak_of(name, heads)
        except torch.OutOfMemoryError:
            row["left_out"] = "out of memory"
        if DEVICE.type == "cpu" and PROC_STATUS.exists():
            row["resident_bytes"] = resident(name, shape, dtype)
    turns = {
        row["name"]: timing.Turn(functools.partial(heads.run, row["name"]))
        for row in rows
        if "left_out" not in row
    }
    before, rounds = None, (3, 50)
    stopwatch: timing.Stopwatch = timing.thread_time
    if DEVICE.type == "cuda":
        stopwatch, rounds = timing.DeviceTime(cold=False), (timing.ROUNDS["cuda"][0], 50)
        before = clocks.read()
    samples = timing.interleaved(turns, stopwatch, budget_s, rounds)
    for row in rows:
        if row["name"] in samples:
            row |= timing.figures(samples[row["name"]])
            row["rounds"] = len(samples[row["name"]])
    result: dict[str, Any] = {"contestants": rows}
    if before is not None:
        result["clocks"] = {"before": before, "after": clocks.read()}
    return result


def alone(name: str, shape: Shape, dtype: str, budget_s: float) -> dict[str, Any]:
    """Return `compare` of one contestant in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        command = [sys.executable, "-m", "benchmarks.bench_linear_loss", "--json", str(file)]
        command += ["--contestants", name, "--alone", "--dtype", dtype, "--budget", str(budget_s)]
        command += ["--shape", "x".join(map(str, shape))]
        done = subprocess.run(command, capture_output=True, text=True)
        if not file.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return {"contestants": [{"name": name, "failed": f"its process ended: {last}"}]}
        found: dict[str, Any] = json.loads(file.read_text())
    return found


COLUMNS = [
    tables.BEST,
    tables.NAIVE,
    Column("median_ms", "median ms"),
    Column("host_ms", "host ms"),
    Column("peak_bytes", "peak MiB", 1 / MIB),
    Column("resident_bytes", "resident MiB", 1 / MIB),
    Column("grad_error", "gradients' error", style=".1e"),
    Column("predicted_large_peak_bytes", "predicted MiB of the large shape", 1 / MIB, ".5g"),
]


def describe(result: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    rows = tables.compared(result["contestants"], peers.is_baseline)
    if naive := tables.best(rows, lambda name: name == "naive", "median_ms"):
        for row in rows:
            if "median_ms" in row:
                row["naive_over_this"] = naive["median_ms"] / row["median_ms"]
    return "\n\n".join([tables.describe(rows, COLUMNS), *map(tables.prose, tables.remarks(result))])


def shape_of(text: str) -> Shape:
    """Read a shape such as 4x512x8192x64."""
    try:
        students, rows, classes, width = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape: write KxNxCxD") from None
    return students, rows, classes, width


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table, and write it; 1 if a contestant failed or its gradients are wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=shape_of, default=SHAPE, metavar="KxNxCxD")
    parser.add_argument("--dtype", choices=list(DTYPES), default=DTYPE)
    parser.add_argument("--json", type=Path, help="write the report there")
    parser.add_argument("--budget", type=float, default=20, help="seconds of timing")
    names = list(CONTESTANTS)
    parser.add_argument("--contestants", nargs="+", choices=names, default=names)
    parser.add_argument(
        "--alone",
        nargs="*",
        choices=names,
        default=["naive", "careful"] if DEVICE.type == "cuda" else [],
        help="those of them that run in processes of their own",
    )
    parser.add_argument("--resident", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if DEVICE.type == "cpu":
        torch.set_num_threads(1)
    if args.resident:
        print(own_growth(args.resident, args.shape, args.dtype))
        return 0
    report = {"benchmark": "linear_loss", **provenance(DEVICE)}
    print(f"{report['machine']['device']}, torch {report['versions']['torch']}, {report['commit']}")
    print(f"(K, N, C, D) = {args.shape}, {args.dtype}\n")
    result: dict[str, Any] = {"contestants": []}
    # First, while nothing of this process is on the device.
    for name in (name for name in args.contestants if name in args.alone):
        found = alone(name, args.shape, args.dtype, args.budget / 2)
        result["contestants"] += found["contestants"]
        if "clocks" in found:
            result.setdefault("clocks_alone", {})[name] = found["clocks"]
    together = [name for name in args.contestants if name not in args.alone]
    if together:
        found = compare(together, args.shape, args.dtype, args.budget)
        result["contestants"] += found.pop("contestants")
        result |= found
    print(describe(result))
    report |= {"shape": args.shape, "dtype": args.dtype, "large": LARGE, **result}
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    rows = result["contestants"]
    wrong = any(row.get("grad_error", 0) > TOLERANCE[args.dtype] for row in rows)
    return int(wrong or any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
