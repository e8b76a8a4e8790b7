"""The fixed teachers of a run: students of finished runs, copied into its folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dml_fast.config import TrainConfig
from dml_fast.config.fields import names_in
from dml_fast.engine import Precision, Teacher
from dml_fast.errors import UserError
from dml_fast.models import check_code
from dml_fast.models.inputs import views_in_words
from dml_fast.runs.facts import DataFacts
from dml_fast.runs.files import writing
from dml_fast.runs.folder import Run
from dml_fast.runs.named import students_named
from dml_fast.runs.trained import Trained, trained_of_run
from dml_fast.runs.weights import load_student, save_student

logger = logging.getLogger(__name__)

OPTION = "--teachers"


@dataclass(frozen=True)
class RunTeacher:
    """A student of another run.

    Attributes:
        name: for messages.
        arch: its architecture.
        model: in evaluation mode, on the CPU.
        facts: of the data that it was trained on.
        view: which of that data's views it reads.
    """

    name: str
    arch: str
    model: nn.Module
    facts: DataFacts
    view: int

    @property
    def bytes(self) -> int:
        """Of its weights."""
        return sum(t.numel() * t.element_size() for t in self.model.state_dict().values())

    def for_engine(self, facts: DataFacts, config: TrainConfig, precision: Precision) -> Teacher:
        """Put it on the device, for a run on data with such facts."""
        model = self.model.to(precision.device)
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        other = (self.facts.mean, self.facts.std) != (facts.mean, facts.std)
        prepare = Renormalised(facts, self.facts, precision.device) if other else None
        return Teacher(model, precision, self.view, prepare, self.arch)


class Renormalised:
    """Turns images (N, C, H, W), normalised for one data set, into those of another.

    Args:
        mine: facts of the data whose images come.
        theirs: facts of the data as which they are wanted.
        device: where they are.
    """

    def __init__(self, mine: DataFacts, theirs: DataFacts, device: torch.device) -> None:
        m, s, their_m, their_s = (
            torch.tensor(x, dtype=torch.float64).view(-1, 1, 1)
            for x in (mine.mean, mine.std, theirs.mean, theirs.std)
        )
        self.scale = (s / their_s).float().to(device)
        self.shift = ((m - their_m) / their_s).float().to(device)

    def __call__(self, images: Tensor) -> Tensor:
        """Return (x * std + mean - their mean) / their std, in a new tensor."""
        return images.mul(self.scale).add_(self.shift)


def read_teachers(
    config: TrainConfig, run: Run, begun: bool
) -> tuple[list[RunTeacher], TrainConfig]:
    """Read the teachers from the runs that are named or, of a run that has begun, from its folder.

    Args:
        config: of the run.
        run: its folder.
        begun: whether it has begun.

    Returns:
        The teachers, and the configuration, which names each of them.

    Raises:
        UserError: a teacher cannot be read, would be built by code that ``--arch`` does not name,
            or was trained with another ``--prior``.
    """
    if not config.teachers:
        return [], config
    if begun:
        count = len(names_in(config.teachers))
        return [_copied(_file(run, m), config) for m in range(count)], config
    named = students_named(config.teachers, OPTION)
    read: dict[str, Trained] = {}
    found = []
    for one in named:
        prior = one.run.config.prior
        if prior != config.prior:
            raise UserError(
                f"{OPTION} {one} was trained with --prior {prior} and this run has --prior "
                f"{config.prior}, so their logits mean different things: give the same"
            )
        if one.path not in read:
            read[one.path] = trained_of_run(one.path, OPTION)
        trained, k = read[one.path], one.number
        check_code([trained.archs[k]], config.architectures, one.path, "name it in --arch too")
        model, view = trained.model(k), trained.facts.view_of(k)
        found.append(RunTeacher(str(one), trained.archs[k], model, trained.facts, view))
    return found, replace(config, teachers=",".join(map(str, named)))


def check_fit(teachers: Sequence[RunTeacher], facts: DataFacts, config: TrainConfig) -> None:
    """Refuse teachers that learned something else, or that read something else.

    Args:
        teachers: from `read_teachers`.
        facts: of this run's data.
        config: of this run.

    Raises:
        UserError: the teacher's name, what it has, and what the data have.
    """
    other = []
    for one in teachers:
        for theirs, mine in _differences(one.facts, facts):
            raise UserError(
                f"{OPTION} {one.name} {theirs}, and --data {config.data} {mine}: give a run on "
                "data of the same kind"
            )
        if one.facts.fingerprint != facts.fingerprint:
            other.append(one.name)
    if other:
        logger.info(
            "teachers: %s learned from other images or labels than these, perhaps from those of "
            "this validation",
            ", ".join(other),
        )


def copy_teachers(teachers: Sequence[RunTeacher], run: Run) -> None:
    """Copy them into a run's folder.

    Raises:
        UserError: it cannot be written to.
    """
    with writing(f"the run folder {run.folder}", "give another one with --out"):
        for m, one in enumerate(teachers):
            save_student(_file(run, m), one.model.state_dict(), one.arch, one.facts, one.view)


def _file(run: Run, number: int) -> Path:
    return run.folder / f"teacher_{number}.safetensors"


def _copied(path: Path, config: TrainConfig) -> RunTeacher:
    model, header = load_student(path, config.architectures)
    facts = DataFacts.from_json(header, "its header")
    return RunTeacher(str(path), header["arch"], model, facts, header["view"])


def _differences(theirs: DataFacts, mine: DataFacts) -> Iterator[tuple[str, str]]:
    """Yield what a teacher has and what the data have, where these are not the same."""
    if theirs.learned != mine.learned:
        yield f"learned {theirs.learned}", f"has {mine.learned}"
    if len(theirs.classes) != len(mine.classes):
        yield f"knows {len(theirs.classes)} classes", f"has {len(mine.classes)}"
    for index, (name, other) in enumerate(zip(theirs.classes, mine.classes, strict=False)):
        if name != other:
            yield f"calls class {index} {name!r}", f"calls it {other!r}"
    if theirs.inputs != mine.inputs:
        yield f"takes {views_in_words(theirs.inputs)}", f"gives {views_in_words(mine.inputs)}"
    if theirs.features != mine.features:
        yield "takes other features of texts or vectors", "gives those of its own rows"
