"""Kernel B as a launch may ask for it: columns apart or adjacent, sums in batches, clusters."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from kernel_cases import QUIET, assert_solves, checked, cohort

from dml_fast.kernels import choice, launch, launch_table
from dml_fast.kernels.launch_table import Config, choose

pytestmark = QUIET
LAUNCHES = [
    Config("two_sweep", 1, 64, 1),
    Config("two_sweep", 1, 128, 2, batch=2),
    Config("two_sweep", 1, 128, 1, spread=True, batch=4),
    Config("two_sweep", 1, 128, 1, hints=True, spread=True, batch=32),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 2.0, "label_smoothing": 0.1},
    {"divergence": "symmetric"},
]


@pytest.mark.parametrize("config", LAUNCHES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("students", [1, 3])
def test_every_launch_gives_the_same_answers(
    config: Config, options: dict[str, Any], students: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "choose", lambda *_, **__: config)
    logits, target = cohort(students, 3, 2 * config.block + 7)
    logits[0][1, 70:] = -torch.inf  # one more sweep, with guards
    target[1] = 3
    assert_solves(checked(logits, target, **options))
    if not options:
        soft = torch.rand_like(logits[0])
        assert_solves(checked(logits, soft / soft.sum(1, keepdim=True)), stats="cheap")


def of_long_rows(classes: int = 32768, itemsize: int = 4, **options: Any) -> Config:
    given: dict[str, Any] = {"distributions": 4, "width": 16 // itemsize, "in_place": False}
    return choose(4, classes, itemsize, False, **given | options)


def test_a_thread_reads_what_the_rows_alignment_allows() -> None:
    assert of_long_rows().block == 128 * 4
    assert of_long_rows(itemsize=2).block == 128 * 8
    assert of_long_rows(32770, width=2).block == 128 * 2
    assert not of_long_rows(32770, width=2).spread
    odd = of_long_rows(50257, itemsize=2, width=1)
    assert odd.spread and odd.block == 128 * 4


@pytest.mark.parametrize(
    ("classes", "dtype", "width"),
    [(32, "float32", 4), (32, "bfloat16", 8), (36, "bfloat16", 4), (34, "float32", 2),
     (33, "float32", 1)],
)  # fmt: skip
def test_the_width_is_of_all_rows(classes: int, dtype: str, width: int) -> None:
    logits, target = cohort(2, 3, classes, getattr(torch, dtype))
    size = logits[0].element_size()
    assert choice.read_width(checked(logits, target), size) == width
    padded = torch.zeros(3, classes + 1, dtype=logits[0].dtype, device=logits[0].device)
    odd = [z[:, :classes] for z in (padded, padded)]
    assert choice.read_width(checked(odd, target), size) == 1


def test_sums_are_batched_where_registers_allow() -> None:
    assert [of_long_rows(distributions=n).batch for n in (1, 5, 6, 8)] == [8, 8, 1, 1]


def test_the_switch_changes_what_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_long_rows() == Config("two_sweep", 1, 512, 4, batch=8)
    monkeypatch.setattr(launch_table, "SWITCH", "16,hints,batch=32")
    assert of_long_rows() == Config("two_sweep", 1, 2048, 16, hints=True, batch=32)
    monkeypatch.setattr(launch_table, "SWITCH", "hints")
    assert of_long_rows() == Config("two_sweep", 1, 512, 4, hints=True, batch=8)


@pytest.mark.parametrize(
    ("version", "in_place", "given"),
    [("3.7.1", False, 1), ("3.9.0", False, 8), ("3.9.0", True, 1), ("3.10.0", False, 8)],
)
def test_a_cluster_where_it_can_be_had_and_else_one_log_line(
    version: str,
    in_place: bool,
    given: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(launch_table, "SWITCH", "8,ctas=8")
    monkeypatch.setattr(launch_table.triton, "__version__", version)
    launch_table.possible.cache_clear()
    with caplog.at_level(logging.WARNING, "dml_fast"):
        for _ in range(2):
            config = of_long_rows(in_place=in_place)
    assert (config.ctas, config.block) == (given, 8 * 32 * 4 * given)
    assert choice.forward_kernel(config, {})[1].get("num_ctas", 1) == given
    assert [r.message.partition(":")[0] for r in caplog.records] == (
        [] if given == 8 else ["two sweeps run without a cluster per row"]
    )
    launch_table.possible.cache_clear()
