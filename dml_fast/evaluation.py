"""Accuracy of a finished run's students on a split of its data or of other data."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from dml_fast.amp import Precision, pick_device
from dml_fast.config import TrainConfig
from dml_fast.data import DataSet, ImageSet
from dml_fast.data.resident import evaluation_batches
from dml_fast.errors import UserError
from dml_fast.eval.classification import evaluate
from dml_fast.history import percent
from dml_fast.run import Run
from dml_fast.trained import Trained, open_data

logger = logging.getLogger(__name__)


def evaluate_run(
    run: Run, *, spec: str, split: str, which: str, device: str, batch_size: int
) -> dict[str, Any]:
    """Evaluate every student of a checkpoint, and their ensemble.

    Args:
        run: the run.
        spec: data in place of the run's own, or "".
        split: train, val or test.
        which: the checkpoint: best, last or previous.
        device: auto, cpu, cuda or cuda:N.
        batch_size: images at a time.

    Returns:
        What ``--json`` prints: accuracies in 0..1, and what they were measured on.

    Raises:
        UserError: no such checkpoint, split or device, or data that does not fit.
    """
    trained = Trained.load(run, which)
    place = pick_device(device)
    precision = _precision(run.config, place)
    images = _part(open_data(run, spec), split, spec or run.config.data)
    layout = torch.channels_last if run.config.channels_last else torch.contiguous_format
    models = [
        trained.model(k).to(place).to(memory_format=layout)  # type: ignore[call-overload]
        for k in range(len(trained.archs))
    ]
    batches = evaluation_batches(
        images,
        batch_size=batch_size,
        mean=trained.facts["mean"],
        std=trained.facts["std"],
        device=place,
        channels_last=run.config.channels_last,
    )
    accuracy = evaluate(models, batches, precision)
    line = trained.validation
    return {
        "run": str(run.folder),
        "checkpoint": which,
        "step": trained.step,
        "epoch": line["epoch"] if line else 0,
        "data": spec or run.config.data,
        "split": split,
        "images": accuracy.images,
        "device": str(place),
        "precision": str(precision),
        "students": [
            {
                "arch": arch,
                "parameters": sum(p.numel() for p in models[k].parameters()),
                "val_acc": line["students"][k]["val_acc"] if line else None,
                "accuracy": accuracy.students[k],
            }
            for k, arch in enumerate(trained.archs)
        ],
        "best_student": trained.best,
        "ensemble_accuracy": accuracy.ensemble,
    }


def show(result: dict[str, Any]) -> None:
    """Print ``evaluate_run``'s result to stdout as a table."""
    console = Console()
    console.width = max(console.width, 80)  # a narrower table would lose its figures
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("student", "architecture", "parameters", "validation, %", f"{result['split']}, %"):
        table.add_column(name, justify="left" if name == "architecture" else "right")
    for k, student in enumerate(result["students"]):
        mark = "* " if k == result["best_student"] else ""
        table.add_row(
            f"{mark}{k}",
            student["arch"],
            f"{student['parameters']:,}",
            percent(student["val_acc"]),
            percent(student["accuracy"]),
        )
    ensemble = percent(result["ensemble_accuracy"])
    table.add_row("ensemble", "mean of probabilities", "", "", ensemble)
    console.print(table)
    console.print(
        f"{result['images']:,} images of the {result['split']} split of {result['data']}; "
        f"{result['checkpoint']}.pt of {result['run']}, epoch {result['epoch']}; "
        f"{result['precision']} on {result['device']}\n"
        "* best on the validation split in that epoch",
        highlight=False,
        soft_wrap=True,
    )


def _precision(config: TrainConfig, device: torch.device) -> Precision:
    """The run's own, except that a CPU has no fp16: there full precision, which loses nothing."""
    if config.amp and config.amp_dtype == "fp16" and device.type == "cpu":
        logger.warning("the run used fp16, which a CPU lacks: evaluating in fp32")
        config = replace(config, amp=False)
    return Precision.from_config(config, device)


def _part(data: DataSet, split: str, spec: str) -> ImageSet:
    part: ImageSet | None = getattr(data, split)
    if part is None:
        raise UserError(f"{spec} has no test split: give --split val")
    return part
