"""The launches whose machine code is looked at, and what must be true of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.aot.compiler import Compiled, Stretch, compile_for
from benchmarks.aot.launches import Launch, recorded
from dml_fast.kernels import choice, launch_table
from dml_fast.kernels import launch as launcher
from dml_fast.loss.problem import Problem

ARCHITECTURES = (80, 90, 100)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Rows of a few bytes, unaligned ones, and both sides of every change in the launch table.
CLASSES = (10, 100, 256, 1000, 1001, 2048, 4096, 8192, 32768, 131072)
ODD = 50257  # GPT-2's: no row but the first is aligned
SWITCHES = ("4,batch=1", "4,batch=32", "8,hints", "16", "16,hints")
# What a call launches: the engine's one kernel, or autograd's two.
PATHS = ("engine", "forward", "backward")
OPTIONS = ("plain", "weighted", "soft", "teacher", "all statistics")
DIVERGENCES = ("reverse", "symmetric", "jsd")
UNTEMPERED = ("plain", "all statistics", *DIVERGENCES)


@dataclass(frozen=True)
class Case:
    """One launch: K students, C classes, a dtype, options, and the architecture to compile for.

    ``switch`` is what DML_FAST_TWO_SWEEP says, to look at another launch than the table's.
    """

    path: str
    students: int
    classes: int
    dtype: str
    options: str
    arch: int
    switch: str = ""


def whole_table() -> Iterator[Case]:
    """On sm_90 every K on the engine's path, the other paths and options at K = 4; CI's part."""
    cases = list(quick_table())
    for path, students, classes, dtype, arch in product(
        PATHS, range(2, 9), CLASSES, DTYPES, ARCHITECTURES
    ):
        on_90 = arch == 90 and (students == 4 or path == "engine")
        if on_90 or (path == "engine" and students in (4, 8)):
            cases.append(Case(path, students, classes, dtype, "plain", arch))
    for path, classes, dtype, options in product(PATHS, (100, 1000, 32768), DTYPES, OPTIONS[1:]):
        if options != "all statistics" or path != "backward":  # that has none
            cases.append(Case(path, 4, classes, dtype, options, 90))
    for dtype, arch in product(DTYPES, ARCHITECTURES):
        cases += [Case(path, 4, ODD, dtype, "plain", arch) for path in PATHS[:2]]
    for dtype, options in product(DTYPES, OPTIONS[1:]):
        cases.append(Case("engine", 4, ODD, dtype, options, 90))
    cases += variants()
    for divergence, path, (classes, dtype), arch in product(
        DIVERGENCES, PATHS, ((1000, "bf16"), (32768, "bf16"), (32768, "fp32")), ARCHITECTURES
    ):
        if arch == 90 or path == "engine":
            cases.append(Case(path, 4, classes, dtype, divergence, arch))
    cases += [Case("engine", n, 1000, "fp32", d, 90) for d in DIVERGENCES for n in (2, 8)]
    yield from dict.fromkeys(cases)


def variants(switches: Sequence[str] = SWITCHES) -> Iterator[Case]:
    """What `benchmarks.gpu.variants` times of two sweeps, and the sums of eight students."""
    for switch, dtype, arch in product(switches, DTYPES, ARCHITECTURES[1:]):
        yield Case("engine", 4, 32768, dtype, "plain", arch, switch)
    for dtype, arch in product(DTYPES, ARCHITECTURES[1:]):
        yield Case("engine", 8, 32768, dtype, "plain", arch, "4,batch=8")


def quick_table() -> Iterator[Case]:
    """What CI compiles: every kernel, option and architecture, and where registers are short."""
    for path, classes in product(PATHS, (100, 1000, 32768)):
        yield Case(path, 4, classes, "bf16", "plain", 90)
    for arch, path in product(ARCHITECTURES, ("engine", "backward")):
        yield Case(path, 4, 1000, "fp32", "plain", arch)
    for students, classes in ((2, 8192), (4, 4096), (8, 10), (8, 1000), (8, 2048), (8, 32768)):
        yield Case("engine", students, classes, "fp32", "plain", 90)
    for options in OPTIONS[1:] + DIVERGENCES:
        yield Case("engine", 4, 1000, "fp32", options, 90)
    yield Case("engine", 4, ODD, "bf16", "soft", 90)
    yield Case("engine", 4, 32768, "fp32", "symmetric", 90)
    yield Case("backward", 4, 1000, "fp32", "jsd", 90)


def problem(case: Case, rows: int, kl_weight: float = 1.0) -> Problem:
    """Of empty tensors, which nothing reads. As on a GPU, labels may be missing."""
    count, classes, extra = case.students, case.classes, case.options == "teacher"
    weighted = case.options == "weighted"
    return Problem(
        students=tuple(_empty(rows, classes, case.dtype) for _ in range(count)),
        teachers=(_empty(rows, classes, case.dtype),) if extra else (),
        dtype=torch.float32,
        batch_shape=torch.Size([rows]),
        index=None if case.options == "soft" else torch.zeros(rows, dtype=torch.int64),
        ignore_index=None if case.options == "soft" else -100,
        soft=_empty(rows, classes, "fp32") if case.options == "soft" else None,
        class_weight=torch.ones(classes) if weighted else None,
        row_weight=torch.ones(rows) if weighted else None,
        peer_weight=torch.ones(count, count + 1) if extra else None,
        kl_weight=torch.ones(()) if weighted else kl_weight,
        temperature=1.0 if case.options in UNTEMPERED else 2.0,
        label_smoothing=0.1 if weighted else 0.0,
        peer_reduction="mean",
        reduction="mean",
        grad_scale=torch.ones(count) if weighted else None,
        divergence=case.options if case.options in DIVERGENCES else "forward",
    )


def _empty(rows: int, classes: int, dtype: str) -> torch.Tensor:
    return torch.empty(rows, classes, dtype=DTYPES[dtype])


def launches_of(case: Case, rows: int = 2, kl_weight: float = 1.0) -> list[Launch]:
    """What the launchers would run on ``rows`` rows, in order; the last is the one that counts."""
    asked = problem(case, rows, kl_weight)
    plain = "cheap" if case.path == "engine" else "none"
    switched = patch.object(launch_table, "SWITCH", case.switch)
    with recorded(launcher, choice) as launches, switched:
        if case.path == "backward":
            count = case.students
            saved = torch.empty(launcher.saved_rows(asked), rows)
            launcher.launch_gradient(asked, saved, torch.ones(count), asked.students)
        else:
            stats = "all" if case.options == "all statistics" else plain
            save = case.path == "forward"
            launcher.launch(asked, with_grad=not save, save=save, stats=stats)
    return launches


def look(case: Case) -> dict[str, Any]:
    """Compile a case; the figures, and what is wrong with them.

    Of long rows as for more programs than are added up at once, of others as for fewer.
    """
    launch = launches_of(case, 2 if case.classes <= 1001 else 300)[-1]
    compiled = compile_for(
        launch.kernel,
        launch.signature,
        launch.constexprs,
        case.arch,
        aligned=launch.aligned,
        **launch.options,
    )
    tile = Tile(case, launch)
    return {
        **asdict(case),
        "kernel": launch.kernel.__name__,
        "rows": tile.rows,
        "columns": tile.columns,
        "warps": tile.threads // 32,
        "access_bits": tile.access_bits,
        "instructions_per_logit": round(sum(tile.instructions_per_logit(compiled)), 1),
        "faults": tile.faults(compiled),
        **compiled.figures(),
    }


class Tile:
    """What a program holds at a time, and what its code should do with it."""

    def __init__(self, case: Case, launch: Launch) -> None:
        constants = launch.constexprs
        self.threads: int = 32 * launch.options["num_warps"] * launch.options.get("num_ctas", 1)
        self.swept = "EACH" in constants  # the columns, in a loop
        width = constants["THREADS"] * constants["EACH"] if self.swept else constants["BLOCK"]
        self.thrice = case.options == "jsd"
        self.several_warps = width > 32  # to a row
        self.rows: int = constants.get("R", 1)
        self.columns: int = min(width, case.classes)
        self.read: int = constants["L"]  # distributions
        self.learners: int = constants["K"]
        self.writes = constants.get("GRAD", True)
        self.itemsize = DTYPES[case.dtype].itemsize
        # The widest access that the rows' alignment allows, and for "jsd" that the kernel wants.
        wanted = self.itemsize * constants["EACH"] if self.swept else 16
        self.access_bits = 8 * math.gcd(case.classes * self.itemsize, wanted)

    def faults(self, compiled: Compiled) -> list[str]:
        """Spills, fp64, lanes that disagree on a sum, accesses narrower than alignment allows."""
        found = []
        if compiled.spills or compiled.stack_bytes:
            found.append(f"{compiled.spills} spills, {compiled.stack_bytes} bytes of stack")
        if compiled.fp64:
            found.append(f"{compiled.fp64} mentions of fp64")
        # Within a warp each lane continues with its own; across warps one of them is written.
        if compiled.fused_sums and self.several_warps:
            found.append(f"{compiled.fused_sums} products fused with a lane's sum")
        parts = self._sweeps(compiled)
        if not parts:
            found.append(f"narrow loads: {compiled.body.loads}, not {self.access_bits} bits")
        if self.writes and not any(self._passes(part.stores, self.learners) for part in parts):
            found.append(f"narrow stores: {compiled.body.stores}, not {self.access_bits} bits")
        return found

    def instructions_per_logit(self, compiled: Compiled) -> list[float]:
        """Of each sweep over the logits."""
        logits = self.read * self.rows * self.columns / self.threads
        return [
            part.instructions / (logits * self._passes(part.loads, self.read))
            if self.swept
            else (part.instructions - compiled.seldom) / logits
            for part in self._sweeps(compiled)
        ]

    def _sweeps(self, compiled: Compiled) -> list[Stretch]:
        """The code that reads all logits of a tile: the whole body, or the first and last loop."""
        parts = compiled.loops if self.swept else (compiled.body,)
        reading = [part for part in parts if self._passes(part.loads, self.read)]
        writing = [part for part in reading if self._passes(part.stores, self.learners)]
        # Between the two may be others that run for few rows only, unless they are needed.
        return reading[:1] + writing[-1:] if self.swept and not self.thrice else reading

    def _passes(self, accesses: Mapping[int, int], tensors: int) -> int:
        """How often wide accesses cover the tile of this many tensors (a loop may be unrolled)."""
        wide = sum(bits // 8 * n for bits, n in accesses.items() if bits >= self.access_bits)
        tile_bytes = self.rows * self.columns * self.itemsize
        return wide * self.threads // (tensors * tile_bytes)
