"""CIFAR-100 by `python -m dml_fast.compare`, in legs: the stage ``cifar100`` of run.sh.

    python -m benchmarks.gpu.cifar100 --out DIR --limit SECONDS

A leg goes on where the last one stopped: its runs lie in WORK/runs, or, on a fresh machine, in the
files ``state.tar.N`` of the last leg, which are put into WORK/state. README.md says how.
Exit code: 0 all is done, 3 call again, 2 something is missing, 1 a comparison failed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.common.machine import commit, device_name

ROOT = Path(__file__).parents[2]
WORK = ROOT / "runs" / "cifar100"
SHARED = ROOT.parent / "shared"
PART_BYTES = 15 << 20  # of a file of the state
MOST_PARTS = 4
SAVING_S = 30  # that stopping, saving and packing may take
UNFINISHED = 3
Over = Callable[[], bool]


@dataclass(frozen=True)
class Table:
    """One comparison.

    Attributes:
        name: of its folder.
        options: of `dml_fast.compare`, without those that all have.
        seeds: how many.
        jobs: runs side by side.
    """

    name: str
    options: str
    seeds: int = 5
    jobs: int = 2


SHORT = "--epochs 60 --batch-size 128"
PAPER = "--epochs 200 --batch-size 64 --schedule paper --warmup 0"
TABLES = (
    Table("gpu-cifar100", f"--arch resnet32 --cohort 2 {SHORT}"),
    Table("gpu-cifar100-k4", f"--arch resnet32 --cohort 4 {SHORT}"),
    Table("gpu-cifar100-paper", f"--arch resnet32 --cohort 2 {PAPER}"),
    # one at a time: two of these checkpoints, one of a finished run, just fit
    Table("gpu-cifar100-mixed", f"--arch resnet32,mobilenet_v1 {SHORT}", jobs=1),
)
COMMON = "--methods independent,dml --val-fraction 0.02 --amp"
ON_GPU = "--executor graph --device cuda --save-every 30s"
TINY = "--epochs 2 --batch-size 32 --device cpu --train-fraction 0.005"


def leg(tables: Sequence[Table], data: str, common: str, runs: Path, over: Over) -> int:
    """Train until all is done, or until ``over``; seed by seed, so that all seeds are paired.

    Args:
        tables: in the order in which to make them.
        data: as ``--data`` takes it.
        common: options of all.
        runs: the folder with a folder for each table.
        over: whether the leg is to end.

    Returns:
        The exit code of this module.
    """
    for table in tables:
        folder = runs / table.name
        for seeds in range(_measured(folder) + 1, table.seeds + 1):
            if over():
                return UNFINISHED
            options = f"{common} {table.options} --seeds {seeds} --jobs {table.jobs}".split()
            command = ["-m", "dml_fast.compare", *options, "--data", data, "--out", str(folder)]
            if code := _until(command, over):
                return code
            _note(folder, ["python", *command])
    return 0


def _measured(folder: Path) -> int:
    """Return how many seeds a comparison has measured."""
    path = folder / "compare.json"
    return len(json.loads(path.read_text())["seeds"]) if path.exists() else 0


def _until(command: Sequence[str], over: Over) -> int:
    """Run a module until it ends, or stop it: then it finishes the step and saves."""
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    while process.poll() is None:
        if over():
            process.terminate()
            return UNFINISHED if process.wait() else 0
        time.sleep(0.05)
    return 1 if process.returncode else 0


def _note(folder: Path, command: Sequence[str]) -> None:
    """Write where the figures come from, for `benchmarks.evidence`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    origin = {"command": " ".join(command), "commit": commit(), "machine": device_name(device)}
    (folder / "origin.json").write_text(json.dumps(origin, indent=2) + "\n")


def pack(runs: Path, out: Path) -> None:
    """Write all that the next leg needs into ``state.tar.N``, each at most 15 MiB.

    Of a measured run that is what was measured, of another its last checkpoint too.
    """
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as tar:
        for path in sorted([*runs.glob("*/*"), *runs.glob("*/*/*")]):
            if path.is_file() and _travels(path):
                tar.add(path, path.relative_to(runs))
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("state.tar.*"):
        old.unlink()
    data = whole.getbuffer()
    starts = range(0, len(data), PART_BYTES)
    for number, start in enumerate(starts):
        (out / f"state.tar.{number}").write_bytes(data[start : start + PART_BYTES])
    print(f"state: {len(starts)} files, {len(data) / 2**20:.1f} MiB", flush=True)
    if len(starts) > MOST_PARTS:
        print(f"more than {MOST_PARTS} files may not come back from a lent machine", flush=True)


def _travels(path: Path) -> bool:
    if path.name == "last.pt":
        return not (path.parent / "test.json").exists()
    return path.suffix in (".json", ".jsonl", ".md", ".npy")


def unpack(state: Path, runs: Path) -> None:
    """Restore the runs from what `pack` wrote, if there is something."""
    parts = sorted(state.glob("state.tar.*"), key=lambda path: int(path.suffix[1:]))
    if not parts:
        return
    whole = io.BytesIO(b"".join(part.read_bytes() for part in parts))
    fresh = runs.with_name("unpacking")
    shutil.rmtree(fresh, ignore_errors=True)
    with tarfile.open(fileobj=whole) as tar:
        tar.extractall(fresh, filter="data")
    os.replace(fresh, runs)
    print(f"went on from {len(parts)} files of {state}", flush=True)


def prepare(work: Path, parts: Path) -> str:
    """Return the data as ``--data`` takes it: what is there, or made of the parts; "" if neither.

    The tool that joins them lies beside the parts, or in ``shared/tools``.
    """
    made = work / "data" / "cifar-100-binary"
    if not (made / "test.bin").exists():
        tools = [path for path in (parts, SHARED / "tools") if (path / "cifar100.py").exists()]
        if len([*parts.glob("cifar100-png.tar.xz.?")]) < 3 or not tools:
            return ""
        partial = work / "partial"
        command = [sys.executable, tools[0] / "cifar100.py", partial, "--parts", parts]
        subprocess.run(command, check=True)
        made.parent.mkdir(exist_ok=True)
        os.replace(partial / "cifar-100-binary", made)
    return f"cifar100:{made.parent}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one leg; with --rehearse two tiny ones on a CPU, the second as on a fresh machine."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for state.tar.N")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the data and the runs")
    parser.add_argument("--parts", type=Path, help="folder of the parts (default: WORK/parts)")
    parser.add_argument("--limit", type=float, default=560, help="seconds of a leg")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args(argv)
    end = time.monotonic() + args.limit - SAVING_S
    if not find_spec("tyro"):
        print("cifar100: tyro is not installed: bring it along, as README.md says", file=sys.stderr)
        return 2
    work: Path = args.work.resolve()
    runs = work / "runs"
    parts = args.parts or (SHARED / "data" / "cifar100" if args.rehearse else work / "parts")
    work.mkdir(parents=True, exist_ok=True)
    data = prepare(work, parts)
    if args.rehearse:
        return _rehearse(data, runs, args.out, end)
    if not data:
        print(f"cifar100: the three parts and cifar100.py belong into {parts}", file=sys.stderr)
        return 2
    if not runs.exists():
        unpack(work / "state", runs)
    return _leg_and_pack(TABLES, data, f"{COMMON} {ON_GPU}", runs, args.out, end)


def _leg_and_pack(
    tables: Sequence[Table], data: str, common: str, runs: Path, out: Path, end: float
) -> int:
    code = leg(tables, data, common, runs, lambda: time.monotonic() > end)
    pack(runs, out)
    for table in tables:
        print(f"{table.name}: {_measured(runs / table.name)} of {table.seeds} seeds measured")
    if code == UNFINISHED:
        print("not done: call this again to continue")
    return code


def _rehearse(data: str, runs: Path, out: Path, end: float) -> int:
    """Stop a tiny comparison in its second seed, pack it, and go on from what was packed."""
    common = f"{COMMON} {TINY}"
    if not data:
        print("the parts of CIFAR-100 are not here: digits in their place")
        data, common = "digits", common.replace("0.005", "0.1")
    tables = [Table("rehearsal", "--arch resnet8 --cohort 2", seeds=2)]
    seen = runs / "rehearsal" / "dml-s1" / "metrics.jsonl"
    if leg(tables, data, common, runs, lambda: seen.exists() or time.monotonic() > end) == 1:
        return 1
    pack(runs, out)
    shutil.rmtree(runs, ignore_errors=True)
    unpack(out, runs)
    return _leg_and_pack(tables, data, common, runs, out, end)


if __name__ == "__main__":
    sys.exit(main())
