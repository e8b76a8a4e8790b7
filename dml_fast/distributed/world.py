"""The processes of a run: who holds what, and how they talk to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dml_fast.distributed.exchange import Exchange
from dml_fast.distributed.launch import Launch
from dml_fast.distributed.mesh import Mesh, Shares
from dml_fast.errors import TrainingError, UserError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from dml_fast.distributed.failure import Watch

T = TypeVar("T")


class World:
    """This process, and its place among the processes of the run.

    With one process nothing here communicates, and that process holds every student.

    Args:
        launch: how this process was started.
        mesh: of the ranks.
        shares: the students of each row.
        device_mesh: of torch.distributed, with the dimensions ``cohort`` and ``data``; None for one
            process.
        watch: reports the end of other ranks.

    Attributes:
        row, column: the place of this rank in the mesh.
        students: the numbers of this rank's students.
        total: K.
        exchange: of the logits of training; None where one row holds all students.
    """

    def __init__(
        self,
        launch: Launch,
        mesh: Mesh,
        shares: Shares,
        device_mesh: DeviceMesh | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.launch, self.mesh, self.watch = launch, mesh, watch
        self.device_mesh = device_mesh
        self.row, self.column = divmod(launch.rank, mesh.data)
        self._vote: tuple[Any, Tensor] | None = None
        self.share_out(shares)

    @classmethod
    def alone(cls, students: int) -> World:
        """Return the world of one process that holds all students."""
        return cls(Launch(), Mesh(1, 1), (tuple(range(students)),))

    def share_out(self, shares: Shares) -> None:
        """Set which row holds which students."""
        self.shares = shares
        self.students = shares[self.row]
        self.total = sum(map(len, shares))
        self.exchange: Exchange | None = None
        self._evaluation: Exchange | None = None
        if self.device_mesh is not None and self.mesh.cohort > 1:
            column = self.device_mesh["cohort"].get_group()
            self.exchange = Exchange(shares, self.row, column)
            self._evaluation = Exchange(shares, self.row, column)  # its dtypes may differ

    def __str__(self) -> str:
        rows = " | ".join(" ".join(map(str, students)) for students in self.shares)
        how = dist.get_backend() if dist.is_initialized() else "none"
        return (
            f"mesh {self.mesh} (cohort x data) of {self.launch.size} processes, backend {how}; "
            f"students by row: {rows}"
        )

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which alone writes files and prints."""
        return self.launch.main

    @property
    def single(self) -> bool:
        """Whether this is the only process."""
        return self.launch.size == 1

    def row_groups(self) -> list[ProcessGroup]:
        """Return a process group of this row for each of its students; none for one column.

        Students may run on several threads, and all ranks of a group must communicate in one order.
        """
        if self.mesh.data == 1:
            return []
        rows = range(self.mesh.cohort)
        ranks = [[*range(r * self.mesh.data, (r + 1) * self.mesh.data)] for r in rows]
        places = range(max(map(len, self.shares)))  # every rank must take part in making each
        return [dist.new_subgroups_by_enumeration(ranks)[0] for _ in places]  # type: ignore[no-untyped-call]

    # ------------------------------------------------------------ students' numbers

    def all_students(self, mine: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors of all K students in order, on every rank; all have one shape.

        Args:
            mine: those of this rank's students.
        """
        if self._evaluation is None:
            return list(mine)
        found = self._evaluation(dict(zip(self.students, mine, strict=True)))
        return [found[k] for k in range(self.total)]

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """Return the sum of the columns' tensors, on every rank; ``tensor`` may be overwritten."""
        if self.device_mesh is not None and self.mesh.data > 1:
            dist.all_reduce(tensor, group=self.device_mesh["data"].get_group())
        return tensor

    def gather_rows(self, mine: Tensor) -> Tensor:
        """Return the rows of a whole batch (N, ...) on every rank, from those of each column.

        Args:
            mine: (N / DATA, ...), as many in every column.
        """
        if self.device_mesh is None or self.mesh.data == 1:
            return mine
        parts = [torch.empty_like(mine) for _ in range(self.mesh.data)]
        dist.all_gather(parts, mine, group=self.device_mesh["data"].get_group())
        return torch.cat(parts)

    def gather_students(self, mine: Tensor) -> Tensor:
        """Return the numbers of each column and student, on every rank.

        Args:
            mine: (students of this rank, ...); it is copied to the CPU.

        Returns:
            (DATA, K, ...) on the CPU.
        """
        mine = mine.cpu()
        if self.single:
            return mine[None]
        places = max(map(len, self.shares))
        sent = mine.new_zeros((places, *mine.shape[1:]))
        sent[: len(mine)] = mine
        found = [torch.empty_like(sent) for _ in range(self.launch.size)]
        dist.all_gather(found, sent)
        numbers = mine.new_zeros((self.mesh.data, self.total, *mine.shape[1:]))
        for rank, received in enumerate(found):
            row, column = divmod(rank, self.mesh.data)
            students = list(self.shares[row])
            numbers[column, students] = received[: len(students)]
        return numbers

    # ------------------------------------------------------------ whole objects

    def gather(self, value: T) -> list[T] | None:
        """Return every rank's object, in order, on rank 0, and None on the others."""
        if self.single:
            return [value]
        found: list[Any] | None = [None] * self.launch.size if self.main else None
        dist.gather_object(value, found)
        return found

    def all_gather(self, value: T) -> list[T]:
        """Return every rank's object, in order, on every rank."""
        if self.single:
            return [value]
        found: list[Any] = [None] * self.launch.size
        dist.all_gather_object(found, value)
        return found

    def from_main(self, make: Callable[[], T]) -> T:
        """Call ``make`` on rank 0, and return its result, or raise its error, on every rank."""
        found: list[Any] = [None]
        with self.all_or_none():
            if self.main:
                found[0] = make()
        if not self.single:
            dist.broadcast_object_list(found, src=0)
        value: T = found[0]
        return value

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Inside, an error of one rank becomes an error of all at the end: that of the first rank.

        Nothing inside may communicate.

        Raises:
            UserError: one rank raised it; its number is in the text, unless it is rank 0.
            TrainingError: likewise.
        """
        if self.single:
            yield
            return
        mine: UserError | TrainingError | None = None
        try:
            yield
        except (UserError, TrainingError) as error:
            mine = error
        errors = self.all_gather(mine and (type(mine).__name__, str(mine)))
        rank = next((r for r, error in enumerate(errors) if error), None)
        if rank is None:
            return
        name, text = errors[rank] or ("", "")
        text = text if rank == 0 else f"rank {rank}: {text}"
        if name == "TrainingError":
            raise agreed(TrainingError(text)) from mine
        raise agreed(UserError(text)) from mine

    def vote(self, *mine: bool) -> tuple[bool, ...]:
        """Cast votes, and return for each whether any rank cast it in the previous call.

        The answer is the same on all ranks: votes travel while the next step is computed. With one
        process the answer is about this call.
        """
        if self.single:
            return mine
        said = torch.tensor(mine, dtype=torch.int32)
        before = self._vote
        self._vote = dist.all_reduce(said, op=dist.ReduceOp.MAX, async_op=True), said
        if before is None:
            return (False,) * len(mine)
        before[0].wait()
        return tuple(bool(v) for v in before[1].tolist())

    def slowest(self, seconds: Sequence[float]) -> list[float]:
        """Return the maximum over all ranks of each of several times."""
        times = torch.tensor(seconds, dtype=torch.float64)
        if not self.single:
            dist.all_reduce(times, op=dist.ReduceOp.MAX)
        found: list[float] = times.tolist()
        return found

    def close(self) -> None:
        """End communication, together with all other ranks."""
        if self.single:
            return
        if self._vote is not None:
            self._vote[0].wait()
        dist.barrier()
        if self.watch is not None:
            self.watch.stop()
        dist.destroy_process_group()


Shared = TypeVar("Shared", UserError, TrainingError)


def agreed(error: Shared) -> Shared:
    """Mark an error that all ranks raise, so that rank 0 alone prints it."""
    error.on_all_ranks = True
    return error
