"""K students as one object: checked, saved and loaded together."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from dml_fast.distributed.exchange import Exchange
from dml_fast.distributed.world import World, agreed
from dml_fast.engine.making import Optimizers, students_of
from dml_fast.engine.student import Student
from dml_fast.engine.together import Together
from dml_fast.errors import UserError, brief

logger = logging.getLogger(__name__)


class Cohort:
    """K students, or those of them that this process holds.

    Args:
        students: at least one: networks on their devices, or objects `Student`.
        world: whose ``students`` these are; by default the only process.
        optimizers: of networks: one for each, or a function that makes one for a network.
        precision: of networks' passes: ``fp32``, ``bf16`` or ``fp16``.

    Raises:
        UserError: there is no student, one is something else, two have one model or optimizer, or
            networks come without optimizers.
    """

    def __init__(
        self,
        students: Sequence[Student] | Sequence[nn.Module],
        world: World | None = None,
        *,
        optimizers: Optimizers | None = None,
        precision: str = "fp32",
    ) -> None:
        given: Any = students
        if isinstance(given, nn.Module | Student) and not isinstance(given, nn.ModuleList):
            raise UserError(f"the students of a cohort are {brief(given)}: give a list of them")
        self.students = students_of(list(students), optimizers, precision)
        if not self.students:
            raise UserError("a cohort got no students: give at least one")
        for part in ("model", "optimizer"):
            if len({id(getattr(student, part)) for student in self.students}) < len(self.students):
                raise UserError(f"two students of a cohort have one {part}: give each its own")
        _keep_apart(self.students)
        self.world = world or World.alone(len(self.students))
        self.together: Together | None = None

    def compile(self, *, combo_kernels: bool = True) -> None:
        """Compile the training passes of all students as one function.

        `Student.compile` compiles a student's alone.

        Args:
            combo_kernels: whether one kernel of a GPU may do work of several students.

        Raises:
            UserError: a student is shared by several processes, or they are on several devices.
        """
        self.together = Together(self.students, combo_kernels)

    def __len__(self) -> int:
        return len(self.students)

    def __iter__(self) -> Iterator[Student]:
        return iter(self.students)

    @property
    def total(self) -> int:
        """K, the number of students in all processes."""
        return self.world.total

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of the students of this process, among 0..K-1."""
        return self.world.students

    @property
    def exchange(self) -> Exchange | None:
        """Exchanges logits with other processes; None where this one holds all students."""
        return self.world.exchange

    def student(self, number: int) -> Student:
        """Return a student of this process by its number among 0..K-1."""
        return self.students[self.numbers.index(number)]

    @property
    def models(self) -> list[nn.Module]:
        """The networks of this process, in order."""
        return [student.model for student in self.students]

    @property
    def shared_out(self) -> bool:
        """Whether students are shared out (FSDP2): all ranks must run their passes in one order."""
        return any(student.shared_out for student in self.students)

    def check_distinct(self) -> None:
        """Refuse identical students, which would stay identical and teach each other nothing.

        Students with dropout pass, since it makes them differ from the first step on.

        Raises:
            UserError: naming the two.
        """
        mine = {
            k: (student.arch, weights_digest(student.model))
            for k, student in zip(self.numbers, self.students, strict=True)
            if not _has_dropout(student.model)
        }
        found: dict[str, int] = {}
        together = {k: v for part in self.world.all_gather(mine) for k, v in part.items()}
        for k, (arch, digest) in sorted(together.items()):
            if (j := found.setdefault(digest, k)) != k:
                raise agreed(
                    UserError(
                        f"students {j} and {k} ({arch}) start with the same weights "
                        "and would stay the same: initialise each differently, "
                        "or choose the method independent"
                    )
                )

    @contextmanager
    def whole(self, weights: str = "student") -> Iterator[list[nn.Module]]:
        """Inside, this process may run each of its students' networks, which it gets, by itself.

        Args:
            weights: whose, as of `Student.network`.
        """
        with ExitStack() as stack:
            for student in self.students:
                stack.enter_context(student.whole(weights))
            yield [student.network(weights) for student in self.students]

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the state of each student of this process."""
        return [student.state_dict() for student in self.students]

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Put back what ``state_dict`` returned.

        Raises:
            UserError: the states are of other architectures.
        """
        saved = [state["arch"] for state in states]
        mine = [student.arch for student in self.students]
        if saved != mine:
            raise UserError(
                f"the checkpoint holds {', '.join(saved)} and the cohort is {', '.join(mine)}: "
                "build the cohort of the checkpoint's architectures"
            )
        for student, state in zip(self.students, states, strict=True):
            student.load_state_dict(state)


def _keep_apart(students: Sequence[Student]) -> None:
    """Let students that share layers run them as torch does: they may run at the same time."""
    owners = Counter(id(m) for student in students for m in set(student.model.modules()))
    shared = [
        k for k, s in enumerate(students) if any(owners[id(m)] > 1 for m in s.model.modules())
    ]
    for k in shared:
        students[k].gathers = False
    if shared:
        logger.info(
            "students %s share layers: their weights are cast, and batches counted, layer by layer",
            ", ".join(map(str, shared)),
        )


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 of a model's parameters and buffers, of this rank's part if shared out."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        found.update(name.encode())
        found.update(local.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _has_dropout(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())
