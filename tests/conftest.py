"""What every test shares: which hardware and optional packages are here, and the real data."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

# Tensors in tests are tiny: more threads only get into each other's way, several times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when a kernel module is imported, so it must stand before any test does so.
    os.environ["TRITON_INTERPRET"] = "1"


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package of a dotted name is missing
        return False


def _missing() -> dict[str, str]:
    """For each marker that this environment cannot serve: why."""
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "no CUDA device"
    absent = [name for name in ("timm", "torchvision") if not _installed(name)]
    if absent:
        missing["zoo"] = f"{' and '.join(absent)} not installed: pip install 'dml_fast[zoo]'"
    if not _installed("nvidia.dali"):
        missing["dali"] = "NVIDIA DALI not installed: pip install 'dml_fast[dali]'"
    return missing


@pytest.hookimpl(tryfirst=True)  # before -m looks for marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what follows from other marks, skip what cannot run here, and begin with long files."""
    for item in items:
        if item.get_closest_marker("zoo") or item.get_closest_marker("dali"):
            item.add_marker("compat")
    _skip(items)
    if "PYTEST_XDIST_WORKER" in os.environ:
        _sort(items)


def _sort(items: list[pytest.Item]) -> None:
    """By files: those that start processes, those with slow tests, others; the last are short."""
    length: dict[Path, list[int]] = {}
    for item in items:
        marks = [bool(item.get_closest_marker(name)) for name in ("processes", "slow")]
        known = length.setdefault(item.path, [0, 0, 0])
        known[:] = [known[0] | marks[0], known[1] | marks[1], known[2] + 1]
    items.sort(key=lambda item: [*length[item.path], str(item.path)], reverse=True)


def _skip(items: list[pytest.Item]) -> None:
    """Skip what cannot run here, except what DML_FAST_REQUIRE names (a comma-separated list)."""
    missing = _missing()
    required = {name for name in os.environ.get("DML_FAST_REQUIRE", "").split(",") if name}
    if unknown := required - {"gpu", "zoo", "dali"}:
        raise pytest.UsageError(f"DML_FAST_REQUIRE names no marker of ours: {sorted(unknown)}")
    unmet = sorted(f"{name}: {missing[name]}" for name in required & missing.keys())
    if unmet:
        raise pytest.UsageError(f"DML_FAST_REQUIRE cannot be met: {'; '.join(unmet)}")
    for item in items:
        for name, reason in missing.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


TWO_SWEEP = pytest.param("two_sweep", marks=pytest.mark.slow)


@pytest.fixture(params=["one_pass", TWO_SWEEP])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each Triton kernel of the loss in turn; every launch is of that one."""
    from kernel_cases import forced

    with forced(request.param):
        yield request.param


@pytest.fixture(params=["native", "closed form", "closed form with guards", "one_pass", TWO_SWEEP])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each way to compute the mutual loss in turn, whatever backend a test asks for."""
    torch.manual_seed(0)
    if request.param == "native":
        yield request.param
        return
    monkeypatch.setattr("dml_fast.loss.native.unsupported_reason", lambda problem: "another way")
    if request.param.startswith("closed form"):
        if request.param.endswith("guards"):  # which are always on off the CPU
            monkeypatch.setattr("dml_fast.loss.closed_form.may_look", lambda device: False)
        yield request.param
        return
    from kernel_cases import answer_with

    with answer_with(request.param):
        yield request.param


@pytest.fixture(scope="session", autouse=True)
def _curves_are_left_out() -> None:
    import blank_curves

    blank_curves.leave_out()


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    """A run takes the package's logger over; later tests listen to it."""
    logger = logging.getLogger("dml_fast")
    before = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers, logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


@pytest.fixture
def as_without_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training in this process has given the logger a handler, which prints to another stderr."""
    monkeypatch.setattr(logging.getLogger("dml_fast"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("dml_fast"), "handlers", [])


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no real data: {path} is missing")
    return path
