"""A run's students as a committee: what they say about rows of its data."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dml_fast.data import ImageSet
from dml_fast.data.loaders import evaluation_batches
from dml_fast.data.loaders.assemble import input_of
from dml_fast.data.vectors import VectorSet
from dml_fast.engine.precision import Precision, pick_device
from dml_fast.errors import UserError
from dml_fast.eval.classification import Classified, evaluate, evaluating
from dml_fast.eval.of_run import run_precision, run_students
from dml_fast.runs.folder import Run
from dml_fast.runs.trained import Trained
from dml_fast.selection.scores import Floats, Ids, Scores, judged

Rows: TypeAlias = ImageSet | VectorSet


class Opinions(NamedTuple):
    """What the students say about n rows of a set of N.

    Attributes:
        ids: (n,) the rows' indices; those of files that cannot be decoded are left out.
        scores: of these rows.
        predicted: (n,) int64, the class with the highest mean probability; -1 where no student has
            usable logits.
        probability: (n,) of that class; NaN there.
        of_label: (n,) the mean probability of the row's own label; NaN without one.
    """

    ids: Ids
    scores: Scores
    predicted: Ids
    probability: Floats
    of_label: Floats


@dataclass(frozen=True)
class Committee:
    """The students of a checkpoint.

    Attributes:
        run: theirs; it learned classes.
        trained: the checkpoint.
        models: K networks.
        precision: of the run, and where they compute.
        batch_size: rows at a time.
    """

    run: Run
    trained: Trained
    models: Sequence[nn.Module]
    precision: Precision
    batch_size: int

    @classmethod
    def load(
        cls,
        run: Run,
        checkpoint: str,
        *,
        allow_code: Collection[str] = (),
        device: str = "auto",
        batch_size: int = 512,
    ) -> Committee:
        """Build the students of a run.

        Raises:
            UserError: the run has no such checkpoint, or there is no such device; the run learned
                identities; as `Trained.load`.
        """
        if run.config.retrieval:
            raise UserError(
                f"{run.folder} learned identities, which are no classes to choose rows by: give a "
                "run that learned classes"
            )
        if run.facts.several_labels:
            raise UserError(
                f"{run.folder} learned several labels for a row, and rows are chosen by their one "
                "class: give a run that learned classes"
            )
        if run.facts.of_pairs:
            raise UserError(
                f"{run.folder} learned displacements of pairs, which need no labels: give a run "
                "that learned classes"
            )
        trained = Trained.load(run, checkpoint, allow_code, run.config.weights)
        precision = run_precision(run.config, pick_device(device))
        models = run_students(trained, run.config, precision)
        return cls(run, trained, models, precision, batch_size)

    def __str__(self) -> str:
        count = len(self.models)
        students = f"{count} students" if count > 1 else "one student"
        where = f"{self.trained.path.name} of {self.run.folder}"
        return f"{students}; {where}; {self.precision} on {self.precision.device}"

    def classify(self, part: Rows) -> Classified:
        """Return how well the students predict labelled rows."""
        classes = len(self.trained.facts.classes)
        return evaluate(self.models, self._batches(part), self.precision, classes)

    @torch.inference_mode()
    def ask(self, part: Rows, rows: Ids) -> Opinions:
        """Return what the students say about some rows, with their indices in ``part``.

        Args:
            part: N rows.
            rows: (n,) int64, indices of them.
        """
        asked = part.subset(rows)
        parts = [_none()]
        with closing(self._batches(asked)) as batches, evaluating(self.models):
            for batch in batches:
                if not len(batch.ids):  # none of its files can be decoded
                    continue
                with self.precision.autocast():
                    logits = [
                        model(input_of(batch.inputs, place)).float()
                        for place, model in enumerate(self.models)
                    ]
                ids = batch.ids.cpu().numpy()
                parts.append(_opinions(ids, torch.stack(logits).cpu().numpy(), asked.labels[ids]))
        ids, scores, *rest = zip(*parts, strict=True)
        together = Scores(*map(np.concatenate, zip(*scores, strict=True)))
        return Opinions(rows[np.concatenate(ids)], together, *map(np.concatenate, rest))

    def _batches(self, part: Rows) -> Any:
        facts = self.trained.facts
        return evaluation_batches(
            part,
            batch_size=self.batch_size,
            mean=facts.mean,
            std=facts.std,
            device=self.precision.device,
            channels_last=self.run.config.channels_last,
            students=range(len(self.models)),
        )


def _opinions(ids: Ids, logits: NDArray[Any], labels: Ids) -> Opinions:
    """Return opinions on B rows from logits (K, B, C) and labels (B,)."""
    scores, mean = judged(logits)
    rows = np.arange(len(ids))
    none = np.isnan(mean).any(1)
    predicted = np.where(none, -1, mean.argmax(1))
    of_label = np.where(labels < 0, np.nan, mean[rows, labels])
    return Opinions(ids, scores, predicted, mean[rows, predicted], of_label)


def _none() -> Opinions:
    whole, real = np.empty(0, np.int64), np.empty(0)
    return Opinions(whole, Scores(real, real, real), whole, real, real)
