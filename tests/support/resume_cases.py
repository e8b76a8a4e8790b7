"""Runs that are stopped after some steps, in this process, and the SHA-256 of what they leave."""

from __future__ import annotations

import hashlib
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from dml_fast.config import TrainConfig
from dml_fast.runs import checkpoint
from dml_fast.runs.folder import Run
from dml_fast.training.build import build_trainer
from dml_fast.training.signals import StopRequest

SHORT = {"arch": "resnet8", "epochs": 3, "train_fraction": 0.25, "seed": 5}


class StopAfter(StopRequest):
    """Asks to stop once some steps are done, as SIGTERM would."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.trainer: Any = None

    @property
    def signal(self) -> int:
        return 15 if self.trainer is not None and self.trainer.progress.step >= self.steps else 0

    @signal.setter
    def signal(self, number: int) -> None:
        pass


def train(folder: Path, config: TrainConfig, steps: int = 10**9, resume: bool = False) -> bool:
    run = Run(folder)
    if not resume:
        run.prepare(0)
    stop = StopAfter(steps)
    stop.trainer = build_trainer(config, run, folder if resume else None, stop)
    with closing(stop.trainer):
        complete: bool = stop.trainer.fit()
        if complete:
            stop.trainer.finish(brief=True)  # curves cost more than the training
    return complete


def digest(folder: Path) -> str:
    """SHA-256 of every student's state and of the metrics, times aside."""
    sums = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sums.update(str(value.dtype).encode() + value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                sums.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list):
            for item in value:
                add(item)
        else:
            sums.update(repr(value).encode())

    state = checkpoint.load(folder / "last.pt")
    add([state["students"], state["step"], state["meter"], state["rng"]])
    lines = Run(folder).metrics()
    assert lines == json.loads(state["history"])
    for line in lines:
        add({key: line[key] for key in line if key not in ("seconds", "images_per_s")})
    for weights in sorted(folder.glob("*.safetensors")):
        sums.update(weights.read_bytes())
    best = checkpoint.load(folder / "best.pt")
    add([best["students"], best["step"]])
    return sums.hexdigest()
