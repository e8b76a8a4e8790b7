"""What ranks send each other per step, counted at their TCP sockets, is what the docs say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from distributed_bytes_worker import CLASSES, STEPS
from distributed_cases import finish, start

pytestmark = pytest.mark.processes

BATCH = 192
CASES: dict[str, dict[str, Any]] = {
    "2x1": {"cohort": 2, "mesh": "2x1"},
    "4x1": {"cohort": 4, "mesh": "4x1"},
    "4 students on 2x1, bf16": {"cohort": 4, "mesh": "2x1", "amp": True, "amp_dtype": "bf16"},
    "2 and 1 students": {"cohort": 3, "mesh": "2x1", "shares": "2,1"},
    "1x2": {"cohort": 2, "mesh": "1x2"},
    "1x3": {"cohort": 2, "mesh": "1x3"},
    "2x2": {"cohort": 2, "mesh": "2x2"},
}


@pytest.mark.parametrize("name", CASES)
def test_bytes_a_step_are_those_of_the_formula(name: str, tmp_path: Path) -> None:
    options = {"arch": "resnet8", "batch_size": BATCH, **CASES[name]}
    (tmp_path / "options.json").write_text(json.dumps(options))
    rows, columns = map(int, options["mesh"].split("x"))
    arguments = str(tmp_path / "options.json"), str(tmp_path / "out.json")
    finish(start(rows * columns, *arguments, module="distributed_bytes_worker"))
    ranks = json.loads((tmp_path / "out.json").read_text())
    assert len(ranks) == rows * columns
    places = max(len(rank["parameters"]) for rank in ranks)
    itemsize = 2 if options.get("amp") else 4
    logits = (rows - 1) * places * (BATCH // columns) * CLASSES * itemsize
    for number, rank in enumerate(ranks):
        assert rank["calls"] == (STEPS + 2 if rows > 1 else 0)  # one per step
        assert rank["exchanged"] == STEPS * logits
        expected = logits
        if columns > 1:
            expected += sum(2 * (columns - 1) * 4 * p // columns for p in rank["parameters"])
            expected += sum(rank["statistics"]) if number % columns else 0
        found = rank["received"] / STEPS
        # above it: gloo's headers, the acknowledgements of a broadcast's root, the barrier
        assert expected <= found <= 1.01 * expected + 1000, (number, expected, found)
