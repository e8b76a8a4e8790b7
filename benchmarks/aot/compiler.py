"""Compile a Triton kernel for a GPU that need not be here, and read what its machine code does.

Triton's wheel carries NVIDIA's assemblers and disassemblers, so registers, spills and the widths of
loads and stores are known without a GPU. What is not known here is time.

Not under TRITON_INTERPRET=1: `triton.jit` then makes functions that only the interpreter can run.
Tests, which set it, start `benchmarks/aot/report.py` in a process of its own.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# `/*0090*/  @!P0 LDG.E.128.CONSTANT R4, ...`: address, predicate, operation, operands
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)((?:\.\w+)*)(.*)")
_LABEL = re.compile(r"\s*\.(L_x_\d+):")
_WIDTH = re.compile(r"[US]?(8|16|64|128|256)")


@dataclass(frozen=True)
class Instruction:
    """The operation of a line of SASS such as `LDG.E.128 R4, desc[UR8][R4.64]`."""

    name: str  # LDG
    modifiers: tuple[str, ...]  # E, 128

    @property
    def bits(self) -> int:
        """Bits that a load or store moves for one thread."""
        widths = (_WIDTH.fullmatch(m) for m in self.modifiers)
        return next((int(w[1]) for w in widths if w), 32)


@dataclass(frozen=True)
class Stretch:
    """Some of a kernel's code, as one thread runs it."""

    instructions: int  # NOPs left out
    loads: dict[int, int]  # of global memory: bits of a thread's access -> instructions
    stores: dict[int, int]


@dataclass(frozen=True)
class Compiled:
    """What the machine code of one kernel says."""

    registers: int  # per thread
    spills: int  # loads from and stores to local memory
    stack_bytes: int
    shared_bytes: int
    whole: Stretch
    body: Stretch  # up to the first atomic operation: what every program runs
    start: Stretch  # up to the first barrier, over which no load is moved
    loops: tuple[Stretch, ...]  # their bodies, inner ones included
    seldom: int  # the most instructions in the body, not of memory, that one branch jumps over
    mufu: int  # exponentials, logarithms, reciprocals
    shuffles: int
    barriers: int
    cluster_barriers: int
    fused_sums: int  # multiply-adds to what another lane sent: lanes then hold other sums
    fp64: int  # mentions of 64-bit floats in the PTX
    ptx: str
    sass: str

    def figures(self) -> dict[str, Any]:
        """Everything but the code, as JSON takes it."""
        return {name: value for name, value in asdict(self).items() if name not in ("ptx", "sass")}


def compile_for(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    arch: int,
    *,
    aligned: frozenset[str] = frozenset(),
    **options: Any,
) -> Compiled:
    """Compile ``kernel`` and read the result.

    Args:
        kernel: what `triton.jit` made.
        signature: type of each run-time argument: "*fp32" (a pointer), "i32", "fp32".
        constexprs: value of every other argument.
        arch: compute capability without the dot: 80, 90, 100.
        aligned: run-time arguments divisible by 16, as Triton finds them when it launches.
        options: num_warps, num_ctas, maxnreg, enable_fp_fusion.

    Returns:
        The figures, and the code itself.
    """
    names = kernel.arg_names
    types = {name: "constexpr" if name in constexprs else signature[name] for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in sorted(aligned)}
    source = ASTSource(kernel, types, dict(constexprs), attrs)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
        sass = _tool("nvdisasm", "--print-code", cubin.name)
    return _read(usage, built.asm["ptx"], sass, built.metadata.shared)


def _tool(name: str, *arguments: str) -> str:
    run = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return run.stdout


def _read(usage: str, ptx: str, sass: str, shared_bytes: int) -> Compiled:
    code, loops, jumps = _parse(sass)
    names = [line.name for line in code]
    counts = Counter(names)
    end = names.index("ATOMG") if "ATOMG" in counts else len(code)
    pure = [
        len(j) for j in jumps if j.stop <= end and not {"LDG", "STG"} & {*names[j.start : j.stop]}
    ]
    waits = names.index("BAR") if "BAR" in counts else len(code)
    resources = dict(re.findall(r"\b(REG|STACK):(\d+)", usage))
    return Compiled(
        registers=int(resources["REG"]),
        spills=counts["LDL"] + counts["STL"],
        stack_bytes=int(resources["STACK"]),
        shared_bytes=shared_bytes,
        whole=_stretch(code),
        body=_stretch(code[:end]),
        start=_stretch(code[:waits]),
        loops=tuple(_stretch(code[loop.start : loop.stop]) for loop in loops),
        seldom=max(pure, default=0),
        mufu=counts["MUFU"],
        shuffles=counts["SHFL"],
        barriers=counts["BAR"],
        cluster_barriers=counts["UCGABAR_ARV"],
        fused_sums=_fused_sums(sass),
        fp64=len(re.findall(r"\.f64\b", ptx)),
        ptx=ptx,
        sass=sass,
    )


def _fused_sums(sass: str) -> int:
    received: set[str] = set()  # registers that hold what a shuffle brought
    count = 0
    for line in sass.splitlines():
        if not (found := _INSTRUCTION.match(line)):
            continue
        name, _, operands = found.groups()
        registers = re.findall(r"\bR\d+\b", operands)
        if not registers:
            continue
        count += name == "FFMA" and registers[-1] in received
        (received.add if name == "SHFL" else received.discard)(registers[0])
    return count


def _parse(sass: str) -> tuple[list[Instruction], list[range], list[range]]:
    """The instructions in order, and what a branch repeats (its loop) and what one jumps over."""
    code: list[Instruction] = []
    branches = []
    labels: dict[str, int] = {}  # label -> index of the instruction behind it
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            name, modifiers, operands = found.groups()
            target = re.search(r"`\(\.(L_x_\d+)\)", operands)
            if name == "BRA" and target:
                branches.append((len(code), target[1]))
            code.append(Instruction(name, tuple(modifiers.split(".")[1:])))
    # A branch to itself is the trap behind the last EXIT.
    loops = [range(labels[to], at + 1) for at, to in branches if labels[to] < at]
    jumps = [range(at + 1, labels[to]) for at, to in branches if labels[to] > at]
    return code, loops, jumps


def _stretch(code: list[Instruction]) -> Stretch:
    length = sum(line.name != "NOP" for line in code)
    return Stretch(length, _widths(code, "LDG"), _widths(code, "STG"))


def _widths(code: list[Instruction], name: str) -> dict[int, int]:
    return dict(sorted(Counter(line.bits for line in code if line.name == name).items()))
