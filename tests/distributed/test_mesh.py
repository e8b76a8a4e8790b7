"""Meshes and shares: pure functions of the configuration and the number of processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dml_fast.config import TrainConfig
from dml_fast.distributed.launch import Launch
from dml_fast.distributed.mesh import Mesh, balanced, choose_mesh, choose_shares
from dml_fast.distributed.world import World
from dml_fast.errors import UserError
from dml_fast.training.meter import Meter
from dml_fast.training.shares import place
from dml_fast.training.signals import StopRequest


@given(st.integers(1, 12), st.integers(1, 16))
def test_the_default_mesh_shares_students_out_equally(students: int, world: int) -> None:
    mesh = choose_mesh("", students, world)
    assert mesh.cohort * mesh.data == world
    assert students % mesh.cohort == 0
    assert not any(  # no larger number of rows would do
        students % rows == 0 and world % rows == 0 for rows in range(mesh.cohort + 1, world + 1)
    )
    shares = choose_shares("", students, mesh.cohort)
    assert [k for row in shares for k in row] == list(range(students))
    assert len({len(row) for row in shares}) == 1


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=10), st.integers(1, 10))
def test_measured_shares_are_within_a_student_of_even(costs: list[float], rows: int) -> None:
    rows = min(rows, len(costs))
    shares = balanced(costs, rows)
    assert sorted(k for row in shares for k in row) == list(range(len(costs)))
    assert all(row and list(row) == sorted(row) for row in shares)
    work = [sum(costs[k] for k in row) for row in shares]
    if len(costs) > rows:  # LPT: the longest row is at most 4/3 of the best possible
        best = max(sum(costs) / rows, max(costs))
        assert max(work) <= 4 / 3 * best + max(costs) / 3 + 1e-9


def test_measured_shares_give_the_slow_student_a_row_of_its_own() -> None:
    assert balanced([9.0, 1.0, 1.0, 1.0], 2) == ((0,), (1, 2, 3))
    assert balanced([1.0, 9.0, 1.0, 1.0], 2) == ((0, 2, 3), (1,))


@pytest.mark.parametrize(
    ("students", "world", "mesh"),
    [(4, 1, "1x1"), (4, 2, "2x1"), (4, 4, "4x1"), (4, 8, "4x2"), (2, 4, "2x2"), (3, 2, "1x2")],
)
def test_the_default(students: int, world: int, mesh: str) -> None:
    assert str(choose_mesh("", students, world)) == mesh


@pytest.mark.parametrize(
    ("changes", "processes", "says"),
    [
        ({"mesh": "2"}, 2, "give COHORTxDATA"),
        ({"mesh": "0x2"}, 2, "give COHORTxDATA"),
        ({"mesh": "2x2"}, 2, "needs 4 processes and there are 2 processes"),
        ({"mesh": "2x1"}, 1, "needs 2 processes and there is one process"),
        ({"mesh": "8x1"}, 8, "8 rows for 4 students"),
        ({"mesh": "3x1"}, 3, "--shares such as 2,1,1"),
        ({"mesh": "2x1", "shares": "a"}, 2, "give measured, or numbers such as 3,1"),
        ({"mesh": "2x1", "shares": "4,0"}, 2, "give measured, or numbers such as 3,1"),
        ({"mesh": "2x1", "shares": "3,2"}, 2, "give 2 numbers that add up to 4"),
        ({"mesh": "2x1", "shares": "4"}, 2, "give 2 numbers that add up to 4"),
        ({"mesh": "1x3"}, 3, "give a multiple of that"),
        ({"fsdp": True}, 2, "leave it out, or give more processes"),
        ({"fsdp": True, "mesh": "1x2", "executor": "threads"}, 2, "give auto or sequential"),
        ({"mesh": "1x2", "executor": "graph"}, 2, "--executor graph does not capture"),
        (
            {"mesh": "1x2", "data": "market1501:x", "num_instances": 4, "batch_size": 12},
            2,
            "give a multiple of --num-instances 4 per column",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], processes: int, says: str) -> None:
    config = replace(TrainConfig(cohort=4), **changes)
    with pytest.raises(UserError, match=says):
        place(config, processes)


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "x", "RANK": "0"}])
def test_half_an_environment_is_refused(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="start the processes with torchrun"):
        Launch.from_environment()


def test_sums_of_a_batch_go_over_to_another_number_of_columns() -> None:
    """Losses and images add up over columns; skips are the same in all of them."""
    state = torch.arange(2 * 3 * 10, dtype=torch.float64).reshape(2, 3, 10)
    state[1, :, 5:7] = state[0, :, 5:7]
    whole = Meter(3, torch.device("cpu"))
    whole.load(state)
    expected = state.sum(0)
    expected[:, 5:7] = state[0, :, 5:7]
    assert torch.equal(torch.stack(whole.totals, -1), expected)
    parts = []
    for rank in range(3):
        world = World(Launch(rank=rank, size=3), Mesh(1, 3), ((0, 1, 2),))
        part = Meter(3, torch.device("cpu"), world)
        part.load(state)
        parts.append(torch.stack(part.totals, -1))
    together = torch.stack(parts).sum(0)
    together[:, 5:7] = parts[2][:, 5:7]
    assert torch.equal(together, expected)
    assert torch.equal(parts[1][:, 5:7], expected[:, 5:7])


def test_a_signal_that_comes_twice_at_once_is_one_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun passes Ctrl-C on to processes that have already got it from the terminal."""
    ends: list[int] = []
    monkeypatch.setattr("os._exit", ends.append)
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stop = StopRequest(twice=True)
    stop._handle(2, None)
    stop._handle(15, None)
    assert not ends
    assert stop.exit_code == 130
    now[0] += 60
    stop._handle(15, None)
    assert ends == [143]
