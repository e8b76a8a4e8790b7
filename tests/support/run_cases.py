"""What a run says about its data, made up; and a run with other options, as if begun with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from state_cases import cohort

from dml_fast import rng
from dml_fast.config import TrainConfig
from dml_fast.models import InputSpec
from dml_fast.runs import checkpoint
from dml_fast.runs.facts import DataFacts
from dml_fast.training.meter import Totals


def facts_of_three_classes(**changes: Any) -> DataFacts:
    facts: dict[str, Any] = {
        "name": "made up",
        "classes": ("a", "b", "c"),
        "inputs": (InputSpec("image", (1, 8, 8)),),
        "mean": (0.5,),
        "std": (0.2,),
        "fingerprint": "",
    }
    return DataFacts(**(facts | changes))


def facts_of_vectors() -> DataFacts:
    """Facts of three classes and three views, of 5, 3 and 7 columns."""
    views = tuple(InputSpec("vector", (size,)) for size in (5, 3, 7))
    return facts_of_three_classes(inputs=views, mean=(), std=())


def checkpoint_state(step: int, count: int = 2, history: Sequence[Any] = ()) -> dict[str, Any]:
    """What a run of students on images of 8 x 8 pixels saves after some steps."""
    return {
        "format": checkpoint.FORMAT,
        "version": checkpoint.VERSION,
        "config": json.dumps(TrainConfig(arch="resnet8", cohort=count).to_dict()),
        "fingerprint": "",
        "mesh": "1x1",
        "step": step,
        "seconds": 0.5,
        "history": json.dumps(list(history)),
        "meter": torch.zeros(1, count, len(Totals._fields)),
        "students": [s.state_dict() | {"arch": "resnet8"} for s in cohort(count)],
        "rng": [rng.state()],
    }


def reconfigure(folder: Path, **options: Any) -> None:
    """Change options of a finished run, in its description and in its checkpoints."""
    description = json.loads((folder / "config.json").read_text())
    assert options.keys() <= description["config"].keys()
    description["config"] |= options
    (folder / "config.json").write_text(json.dumps(description))
    for path in folder.glob("*.pt"):
        state = torch.load(path, weights_only=True)
        state["config"] = json.dumps(json.loads(state["config"]) | options)
        path.unlink()  # it may be another name of one that is still to come
        torch.save(state, path)
