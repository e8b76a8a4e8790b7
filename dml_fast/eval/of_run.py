"""Evaluation of a finished run's students on a split of its data or of other data."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from dml_fast.config import TrainConfig
from dml_fast.data import DataSet, ImageSet
from dml_fast.data.loaders import evaluation_batches
from dml_fast.data.loaders.assemble import Batch
from dml_fast.engine.precision import Precision, keep_in_full_precision, pick_device
from dml_fast.errors import UserError
from dml_fast.eval.classification import evaluate
from dml_fast.runs.folder import Run
from dml_fast.runs.history import percent
from dml_fast.runs.trained import Trained, open_data

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Students of a checkpoint in front of the images that they are evaluated on.

    Attributes:
        trained: the checkpoint.
        models: the students, on their device, in evaluation mode.
        images: of the split.
        batches: of all images, once.
        precision: the run's own, as far as the device has it.
        facts: what was evaluated on what, for ``--json``.
    """

    trained: Trained
    models: Sequence[nn.Module]
    images: ImageSet
    batches: Iterator[Batch]
    precision: Precision
    facts: dict[str, Any]

    @classmethod
    def prepare(
        cls, run: Run, *, spec: str, split: str, which: str, device: str, batch_size: int
    ) -> Evaluation:
        """Read a run's students and images.

        Args:
            run: the run.
            spec: data in place of the run's own, or "".
            split: train, val or test.
            which: the checkpoint: best, last or previous.
            device: auto, cpu, cuda or cuda:N.
            batch_size: images at a time.

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
        for model in models:  # as in training
            keep_in_full_precision(model, precision)
        batches = evaluation_batches(
            images,
            batch_size=batch_size,
            mean=trained.facts.mean,
            std=trained.facts.std,
            device=place,
            channels_last=run.config.channels_last,
        )
        line = trained.validation
        facts = {
            "run": str(run.folder),
            "checkpoint": which,
            "step": trained.step,
            "epoch": line["epoch"] if line else 0,
            "data": spec or run.config.data,
            "split": split,
            "images": len(images),
            "device": str(place),
            "precision": str(precision),
        }
        return cls(trained, models, images, batches, precision, facts)

    def student_facts(self, key: str) -> list[dict[str, Any]]:
        """For each student its architecture, its size and its validation score by ``key``."""
        line = self.trained.validation
        return [
            {
                "arch": arch,
                "parameters": sum(p.numel() for p in self.models[k].parameters()),
                key: line["students"][k][key] if line else None,
            }
            for k, arch in enumerate(self.trained.archs)
        ]


def classify(evaluation: Evaluation) -> dict[str, Any]:
    """Accuracies of the students and their ensemble.

    Returns:
        What ``--json`` prints: accuracies in 0..1, and what they were measured on.
    """
    accuracy = evaluate(evaluation.models, evaluation.batches, evaluation.precision)
    students = evaluation.student_facts("val_acc")
    return {
        **evaluation.facts,
        "students": [
            {**facts, "accuracy": accuracy.students[k]} for k, facts in enumerate(students)
        ],
        "best_student": evaluation.trained.best,
        "ensemble_accuracy": accuracy.ensemble,
    }


def show(result: Mapping[str, Any]) -> None:
    """Print the result of ``classify`` to stdout as a table."""
    rows = [[student["val_acc"], student["accuracy"]] for student in result["students"]]
    ensemble = ["mean of probabilities", "", "", percent(result["ensemble_accuracy"])]
    show_table(result, ["validation, %", f"{result['split']}, %"], rows, ensemble)
    show_facts(result)


def show_table(
    result: Mapping[str, Any],
    columns: Sequence[str],
    shares: Sequence[Sequence[float | None]],
    ensemble: Sequence[str],
    title: str | None = None,
) -> None:
    """Print a row a student, the best one marked, and one for the ensemble.

    Args:
        result: with ``students`` and ``best_student``.
        columns: what the shares are.
        shares: a row a student, in 0..1.
        ensemble: the last row's cells, from the second on.
        title: above the table.
    """
    table = Table(box=box.SIMPLE_HEAD, title=title)
    for name in ("student", "architecture", "parameters", *columns):
        justify: Literal["left", "right"] = "left" if name == "architecture" else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for k, (student, row) in enumerate(zip(result["students"], shares, strict=True)):
        mark = "* " if k == result["best_student"] else ""
        name, size = student["arch"], f"{student['parameters']:,}"
        table.add_row(f"{mark}{k}", name, size, *(percent(share) for share in row))
    table.add_row("ensemble", *ensemble)
    console = Console()
    console.width = max(console.width, 110)  # a narrower table would lose its figures
    console.print(table)


def show_facts(result: Mapping[str, Any], images: str = "images") -> None:
    """Print what was evaluated on what.

    Args:
        result: with the evaluation's facts.
        images: what the images are.
    """
    Console().print(
        f"{result['images']:,} {images} of the {result['split']} split of {result['data']}; "
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
    return Precision.choose(config.amp, config.amp_dtype, device)


def _part(data: DataSet, split: str, spec: str) -> ImageSet:
    part: ImageSet | None = getattr(data, split)
    if part is None:
        raise UserError(f"{spec} has no test split: give --split val")
    return part
