"""The results of a run: its trained students, the best of them, and the data they learned."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from dml_fast.config import flag
from dml_fast.data import (
    DataSet,
    ImageSet,
    open_dataset,
    open_every_pair,
    open_part,
)
from dml_fast.data.files import ImageFiles
from dml_fast.data.sets import Part
from dml_fast.errors import UserError, check_choice
from dml_fast.foreign import Unfit, reading, shown
from dml_fast.models import check_code
from dml_fast.models.inputs import views_in_words
from dml_fast.runs import checkpoint
from dml_fast.runs.facts import DataFacts
from dml_fast.runs.folder import Run
from dml_fast.runs.history import EpochLine, best_student
from dml_fast.runs.weights import build_student

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """The students of one checkpoint.

    Attributes:
        path: of the checkpoint.
        archs: the architecture of each student, length K.
        states: the ``state_dict`` of each student's model, or of the average of its weights.
        facts: of the data that they were trained on.
        step: the number of steps before the checkpoint.
        validation: the newest line of metrics at that step; None before the first epoch's end.
    """

    path: Path
    archs: tuple[str, ...]
    states: tuple[dict[str, Any], ...]
    facts: DataFacts
    step: int
    validation: EpochLine | None

    @classmethod
    def load(
        cls, run: Run, which: str, allow_code: Collection[str] = (), weights: str = "student"
    ) -> Trained:
        """Read the checkpoint ``best``, ``last`` or ``previous``.

        Args:
            run: the run.
            which: the checkpoint.
            allow_code: the functions, as ``package.module:function``, that may build students.
            weights: ``student``, or ``ema`` for the averages that a run with ``--ema`` keeps.

        Raises:
            UserError: the run has no such checkpoint, it is damaged or of another run, a student
                would be built by a function that is not allowed, or no averages were kept.
        """
        check_choice("weights", weights, ("student", "ema"))
        if weights == "ema" and run.config.ema == "off":
            raise UserError(
                f"--weights ema is for averages of weights, and {run.folder} kept none: leave it "
                "out, or train with --ema 0.999"
            )
        path = run.checkpoint(which)
        if not path.exists():
            names = ("best", "last", "previous")
            there = [name for name in names if run.checkpoint(name).exists()]
            remedy = f"give --checkpoint {there[0]}" if there else "train it for an epoch first"
            raise UserError(f"{run.folder} has no checkpoint {which}.pt: {remedy}")
        state = checkpoint.load(path)
        checkpoint.check_run(run, state, path)
        history = checkpoint.history_of(run, state, path)
        archs = tuple(student["arch"] for student in state["students"])
        with reading(path):
            if archs != run.config.architectures:
                raise Unfit(f"it has {len(archs)} students")
            if weights == "ema" and any("average" not in one for one in state["students"]):
                raise Unfit("it has no averages")
        check_code(archs, allow_code, run.folder, "add --allow-code {}")
        return cls(
            path=path,
            archs=archs,
            states=tuple(
                one["average"] if weights == "ema" else one["model"] for one in state["students"]
            ),
            facts=run.facts,
            step=state["step"],
            validation=history[-1] if history else None,
        )

    @property
    def best(self) -> int | None:
        """The number of the student with the best validation score; None before any validation."""
        return None if self.validation is None else best_student(self.validation)

    def model(self, student: int) -> nn.Module:
        """Build one student's network: in evaluation mode, on the CPU.

        Raises:
            UserError: its weights do not fit its architecture.
        """
        with reading(self.path):
            return build_student(
                self.archs[student],
                self.facts,
                self.states[student],
                self.facts.view_of(student),
            )


def say_whose(run: Run, weights: str) -> None:
    """Log it where a command takes the students' own weights and validation measured averages."""
    if weights == "student" and run.config.weights == "ema":
        logger.info(
            "%s was validated by averages of weights, and these are the students' own: "
            "--weights ema takes the averages",
            shown(run.folder),
        )


def weights_of_run(source: str) -> tuple[dict[str, Any], ...]:
    """Return the weights of each student of a run, from which others start. No code of it is run.

    Args:
        source: its folder, for ``best.pt``, or where there is none ``last.pt``; or a checkpoint.

    Raises:
        UserError: there are none, or as `Trained.load`.
    """
    remedy = "give one of its files student_K.safetensors"
    return trained_of_run(source, "--pretrained", remedy).states


def trained_of_run(
    source: str, option: str, remedy: str = "train it for an epoch first"
) -> Trained:
    """Return the students of a run, from which others learn. No code of it is run.

    Args:
        source: its folder, for ``best.pt``, or where there is none ``last.pt``; or a checkpoint.
        option: by which the user gives it.
        remedy: what a message advises where there is no checkpoint.

    Raises:
        UserError: there is none, or as `Trained.load`.
    """
    path = Path(source).expanduser()
    run = Run.open(path)
    named = [path.stem] if path.suffix == ".pt" else ["best", "last"]
    for which in named:
        if run.checkpoint(which).exists():
            return Trained.load(run, which, allow_code=run.config.architectures)
    raise UserError(f"{option} {source} has no checkpoint to start from: {remedy}")


def open_split(run: Run, spec: str, split: str) -> Part:
    """Open the rows that a run is evaluated on.

    Args:
        run: the run.
        spec: other data in place of the run's own, or "".
        split: train, val or test; for other vectors or texts that say no parts, and for other
            pairs, all rows.

    Raises:
        UserError: as `open_data`, or there are no such rows.
    """
    own = run.config.data
    alike = spec.partition(":")[0] == own.partition(":")[0]
    if run.features is not None and alike and spec != own:
        return open_part(spec, split, features=run.features, classes=run.facts.classes)
    if run.facts.of_pairs and alike and spec != own:
        _, _, patch, search = run.facts.inputs[0].shape
        return open_every_pair(spec, search=search, patch=patch, seed=run.config.seed)
    part: Part | None = getattr(open_data(run, spec, split), split)
    if part is None:
        raise UserError(f"{spec or own} has no test split: give --split val")
    return part


def open_data(
    run: Run, spec: str = "", split: str = "", *, unlabelled: bool = False, remedy: str = ""
) -> DataSet:
    """Open the data of a run, with the same split.

    Args:
        run: the run; its options for the data are used.
        spec: other data in place of the run's own.
        split: the only part that is wanted, or "": so other data to search in need not have
            identities to set aside for validation.
        unlabelled: whether to keep training rows without a label that the run did not train on.
        remedy: what a message advises where the data have changed; by default to restore them, or
            to give them as ``spec``.

    Raises:
        UserError: it cannot be read, or does not fit the run's students.
    """
    config, facts = run.with_own_files(run.config), run.facts
    if spec and spec != config.data:  # of rows with other names
        config = replace(config, labels="", labels_per_class=0, offsets="")
    download = config.download and not spec
    options = {**config.data_options, "features": run.features, "unlabelled": unlabelled}
    options["loader"] = "auto"  # the run's may not be installed here
    if spec and split == "test" and config.retrieval and spec.startswith("market1501:"):
        options["val_fraction"] = 0.0
    try:
        data = open_dataset(spec or config.data, download=download, **options)
        train = data.train
        streams = isinstance(train, ImageSet) and isinstance(train.images, ImageFiles)
        same = spec or data.fingerprint == facts.fingerprint
        if not same and config.skip_corrupt and not (streams and config.resized_crop):
            # only the resident loader leaves corrupt files out of the data set
            other = "resident" if streams else "fallback"
            data = open_dataset(config.data, download=download, **(options | {"loader": other}))
    except UserError as error:
        # the advice is for training; the commands that read a run have no such options
        theirs = [name for name in map(flag, config.data_options) if name in str(error)]
        if not theirs:
            raise
        raise UserError(f"{error} (here {', '.join(theirs)} is as the run was trained)") from error
    if spec:
        _check_fit(data, facts, spec)
    elif data.fingerprint != facts.fingerprint:
        raise UserError(
            f"{config.data} no longer holds the images and labels that {run.folder} was trained "
            f"on: {remedy or f'restore them, or accept the new ones with --data {config.data}'}"
        )
    return data


def _check_fit(data: DataSet, facts: DataFacts, spec: str) -> None:
    """Refuse images or vectors of another size, other views, and other classes."""
    new, old = data.inputs, facts.inputs
    if new != old and (new[0].kind != "image" or old[0].kind != "image"):
        raise UserError(
            f"--data {spec} gives {views_in_words(new)} for a row and the run's students take "
            f"{views_in_words(old)}: give data with the same columns"
        )
    _check_classes(data, facts, spec)
    if new == old:
        return
    (channels, *size), (wanted, height, width) = new[0].shape, old[0].shape
    if channels != wanted:
        raise UserError(
            f"--data {spec} has images of {channels} channels and the run's students take "
            f"{wanted}: give data with that many channels"
        )
    raise UserError(
        f"--data {spec} has images of {size[0]} x {size[1]} pixels and the run's are "
        f"{height} x {width}: give data of that size"
    )


def _check_classes(data: DataSet, facts: DataFacts, spec: str) -> None:
    """Refuse other classes; identities may be new, since students find them by embeddings."""
    learned, given = facts.learned, DataFacts.of(data, facts.head).learned
    if learned != given:
        raise UserError(
            f"--data {spec} has {given} and the run's students learned {learned}: give data with "
            f"{learned}"
        )
    if given == "identities":
        return
    theirs, mine = list(data.classes), facts.classes
    if len(theirs) != len(mine):
        raise UserError(
            f"--data {spec} has {len(theirs)} classes and the run's students know {len(mine)}: "
            "give data with the same classes"
        )
    for index, (new, old) in enumerate(zip(theirs, mine, strict=True)):
        if new != old:
            raise UserError(
                f"--data {spec} calls class {index} {new!r} and the run calls it {old!r}: "
                "give data with the same classes in the same order"
            )
