"""The C++ extension against definitions written out in numpy, and against scikit-learn."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

from dml_fast import _native

CSRC = Path(__file__).parents[2] / "csrc"
LEVELS = ("baseline", "avx2", "avx512")

rank_sets = st.sets(st.integers(1, 300), min_size=1, max_size=60).map(
    lambda ranks: np.array(sorted(ranks), dtype=np.int64)
)


def walk_the_list(ranks: NDArray[np.int64]) -> tuple[float, float, float]:
    """The scores by walking the whole ranked list, as compute_AP.m of Market-1501 does."""
    relevant = np.isin(np.arange(1, ranks[-1] + 1), ranks)
    at_hits = trapezoid = old_recall = hits = 0.0
    old_precision = 1.0
    for position, hit in enumerate(relevant, start=1):
        hits += hit
        recall, precision = hits / len(ranks), hits / position
        trapezoid += (recall - old_recall) * (old_precision + precision) / 2
        at_hits += (recall - old_recall) * precision
        old_recall, old_precision = recall, precision
    return at_hits, trapezoid, len(ranks) / len(relevant)


@settings(deadline=None, max_examples=200)
@given(rank_sets)
@example(np.array([1], dtype=np.int64))
@example(np.array([300], dtype=np.int64))
def test_scores_equal_the_walk_down_the_list(ranks: NDArray[np.int64]) -> None:
    np.testing.assert_allclose(
        _native.average_precision(ranks), walk_the_list(ranks), rtol=0, atol=1e-12
    )


@settings(deadline=None, max_examples=50)
@given(rank_sets)
def test_average_precision_equals_scikit_learns(ranks: NDArray[np.int64]) -> None:
    relevant = np.isin(np.arange(1, 301), ranks)
    expected = average_precision_score(relevant, -np.arange(300))
    assert _native.average_precision(ranks)[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([1, 2, 3], (1.0, 1.0, 1.0)),
        ([2], (1 / 2, 1 / 4, 1 / 2)),
        ([1, 3], ((1 + 2 / 3) / 2, (1 + (1 / 2 + 2 / 3) / 2) / 2, 2 / 3)),
        ([2**62], (2.0**-62, 2.0**-63, 2.0**-62)),
    ],
)
def test_scores_worked_out_by_hand(ranks: list[int], expected: tuple[float, ...]) -> None:
    got = _native.average_precision(np.array(ranks, dtype=np.int64))
    assert got == pytest.approx(expected, rel=1e-15, abs=0)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (np.zeros(0, dtype=np.int64), "empty"),
        (np.array([0, 1]), r"ranks\[0\] = 0$"),
        (np.array([-3]), r"ranks\[0\] = -3$"),
        (np.array([1, 4, 4]), r"ranks\[2\] = 4 follows 4"),
        (np.array([5, 2]), r"ranks\[1\] = 2 follows 5"),
        (np.array([[1, 2]]), "one dimension.*got 2"),
        (np.array(1), "one dimension.*got 0"),
        (np.frombuffer(b"\0" * 17, dtype=np.int64, count=2, offset=1), "aligned"),
    ],
)
def test_impossible_ranks_are_refused(ranks: NDArray[np.int64], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _native.average_precision(ranks)


@pytest.mark.parametrize(
    "ranks",
    [
        np.array([1.0, 2.0]),
        np.array([1, 2], dtype=np.int32),
        np.array([1, 2], dtype=np.uint64),
        np.array([1, 2], dtype=">i8"),
        np.arange(1, 9)[::2],
        [1, 2],
        None,
    ],
)
def test_nothing_is_converted_in_silence(ranks: object) -> None:
    with pytest.raises(TypeError):
        _native.average_precision(ranks)  # type: ignore[arg-type]


def test_the_input_is_left_as_it_was() -> None:
    ranks = np.array([1, 5, 9])
    ranks.setflags(write=False)
    _native.average_precision(ranks)
    assert ranks.tolist() == [1, 5, 9]


def test_the_instruction_set_follows_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DML_FAST_ISA", raising=False)
    highest = _native.instruction_set()
    for level in LEVELS[: LEVELS.index(highest) + 1]:
        monkeypatch.setenv("DML_FAST_ISA", level)
        assert _native.instruction_set() == level
    for level in LEVELS[LEVELS.index(highest) + 1 :]:
        monkeypatch.setenv("DML_FAST_ISA", level)
        with pytest.raises(ValueError, match=f"DML_FAST_ISA={level} is not supported"):
            _native.instruction_set()
    monkeypatch.setenv("DML_FAST_ISA", "")
    assert _native.instruction_set() == highest


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DML_FAST_ISA", "AVX2")
    with pytest.raises(ValueError, match="DML_FAST_ISA=AVX2 is not an instruction set"):
        _native.instruction_set()


def test_the_highest_level_is_what_the_kernel_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = Path("/proc/cpuinfo")
    flags_line = (
        next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), None)
        if cpuinfo.exists()
        else None
    )
    if flags_line is None:
        pytest.skip("no x86 flags in /proc/cpuinfo")
    flags = set(flags_line.split())
    expected = "baseline"
    if {"avx2", "fma", "bmi2"} <= flags:
        expected = "avx2"
        if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
            expected = "avx512"
    monkeypatch.delenv("DML_FAST_ISA", raising=False)
    assert _native.instruction_set() == expected


def test_a_level_above_the_machines_is_refused(tmp_path: Path) -> None:
    """On a machine with AVX-512 no level is too high, so the choice itself is compiled alone."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler on the path")
    source = tmp_path / "choose.cpp"
    source.write_text(
        '#include "isa.hpp"\n#include <iostream>\n'
        "int main() {\n"
        "    using namespace dml_fast;\n"
        '    std::cout << isa_name(choose_isa("baseline", Isa::avx2)) << std::endl;\n'
        '    try { choose_isa("avx512", Isa::avx2); }\n'
        "    catch (const std::invalid_argument& error) { std::cout << error.what(); }\n"
        "}\n"
    )
    program = tmp_path / "choose"
    command = [compiler, "-std=c++17", "-Wall", "-Werror", f"-I{CSRC}", str(source)]
    subprocess.run([*command, "-o", str(program)], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert printed == (
        "baseline\nDML_FAST_ISA=avx512 is not supported here: unset it, or choose at most avx2"
    )
