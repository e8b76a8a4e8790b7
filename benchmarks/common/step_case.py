"""Ways to one step of a cohort: what users write, what they could pick, and our executors.

All do one job: K networks from seeds 0..K-1, one batch, the paper's losses, SGD with Nesterov
momentum. The first step's losses are compared before any is timed. A name is, in this order:
how many students, if others than the case has; who; "graph", if its step is one CUDA graph; the
precision; and what else is special.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers.hour import hour_step, in_one_graph
from benchmarks.peers.loss import COMPILE, AbsentError, naive_losses
from dml_fast.engine import Engine
from dml_fast.engine.choice import make_executor
from dml_fast.engine.cohort import Cohort
from dml_fast.engine.optim import make_optimizer
from dml_fast.engine.precision import Precision
from dml_fast.engine.student import Student
from dml_fast.engine.threads import intra_op_threads
from dml_fast.models import create_model

Step = Callable[[], Tensor]  # one update of all students; their losses (K,) before it

DTYPES = {"fp32": None, "bf16": torch.bfloat16}
INDEPENDENT = " independent"
ONE_THREAD = " one thread"
TOGETHER = COMPILE + " cohort"  # all students as one function
COMBO = ", combo kernels"  # several operations in one kernel of a GPU; not inductor's default
NO_COMBO = ", no combo kernels"  # which the cohort has by default
HOUR = "hour"  # what a good engineer writes in an hour: benchmarks/peers/hour.py
COUNTS = {"one": 1, "two": 2, "eight": 8}  # students
CLASSES, SIZE = 100, 32
SGD = {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}


def names(device: torch.device) -> list[str]:
    """All contestants on a device."""
    others = ["naive fp32", "naive fp32" + COMPILE, "pytorch-dml fp32"]
    others += ["naive bf16", "hour bf16", "hour bf16" + COMPILE]
    if device.type == "cpu":
        mine = [f"{how} {kind}" for how in ("sequential", "threads") for kind in DTYPES]
        more = ["sequential bf16" + ONE_THREAD, "sequential bf16" + COMPILE]
        more.append("sequential bf16" + TOGETHER)
        rivals = ["sequential bf16" + INDEPENDENT, "threads bf16" + INDEPENDENT]
        return [*others, *mine, *more, *rivals]
    others += ["hour graph bf16", "hour graph bf16" + COMPILE, "one student bf16"]
    mine = [f"{how} bf16" for how in ("sequential", "streams", "graph")]
    more = ["graph fp32", "graph bf16" + COMPILE, "graph bf16" + COMPILE + COMBO]
    more += ["graph bf16" + TOGETHER, "graph bf16" + TOGETHER + NO_COMBO]
    more.append("graph bf16" + INDEPENDENT)
    counts = ["one student", "two students", "eight students"]
    return [*others, *mine, *more, *(f"{count} graph bf16" for count in counts)]


def is_baseline(name: str) -> bool:
    """Whether it is a whole step that a user would write or choose without us."""
    return name.split(" ")[0] in ("naive", "pytorch-dml", HOUR)


def is_replay(name: str) -> bool:
    """Whether a step is the replay of a graph."""
    return "graph" in name.split(" ")


def precision(name: str) -> str:
    """Return a key of `DTYPES`."""
    return next(word for word in name.split(" ") if word in DTYPES)


@dataclass
class StepCase:
    """K networks of one architecture and a batch of (N, 3, 32, 32) with 100 classes.

    Attributes:
        arch: of every student.
        students: K.
        batch: N.
        device: where.
    """

    arch: str
    students: int
    batch: int
    device: torch.device
    images: Tensor = field(init=False)
    target: Tensor = field(init=False)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.images = torch.randn(self.batch, 3, SIZE, SIZE, generator=g).to(self.device)
        self.target = torch.randint(CLASSES, (self.batch,), generator=g).to(self.device)

    def models(self, count: int | None = None) -> list[nn.Module]:
        """The students, always with the same weights at the start."""
        found = []
        for k in range(count or self.students):
            torch.manual_seed(k)
            model = create_model(
                self.arch, num_classes=CLASSES, in_channels=3, image_size=(SIZE, SIZE)
            )
            found.append(model.to(self.device))
        return found

    def count(self, name: str) -> int:
        """How many students that contestant has."""
        return COUNTS.get(name.split(" ")[0], self.students)

    def contestant(self, name: str) -> Step:
        """The contestant of that name.

        Raises:
            AbsentError: it cannot run here.
        """
        words = name.split(" ")
        if words[0] in COUNTS:
            words = words[2:]
        who = "naive" if words[0] in DTYPES else words[0]
        dtype, compiled = DTYPES[precision(name)], COMPILE in name
        models = self.models(self.count(name))
        if who == "naive":
            return naive_step(self, models, dtype, compiled)
        if who == HOUR:
            return self._hour(models, dtype, compiled, is_replay(name))
        if who == "pytorch-dml":
            return pytorch_dml(self, models)
        compiled_as = name[name.index(COMPILE) :] if compiled else ""
        return ours(self, models, who, dtype, INDEPENDENT in name, ONE_THREAD in name, compiled_as)

    def _hour(
        self, models: list[nn.Module], dtype: torch.dtype | None, compiled: bool, graph: bool
    ) -> Step:
        models = [m.to(memory_format=torch.channels_last) for m in models]  # type: ignore[call-overload]
        images = self.images.contiguous(memory_format=torch.channels_last)
        parameters = [p for m in models for p in m.parameters()]
        optimizer = torch.optim.SGD(parameters, **SGD, fused=True)  # type: ignore[arg-type]
        step = hour_step(models, images, self.target, optimizer, dtype, compiled)
        return in_one_graph(step, models, optimizer) if graph else step

    def flops(self) -> int:
        """Of convolutions and matrix products, forward and back, all students; by torch."""
        (model,) = self.models(1)
        with FlopCounterMode(display=False) as counter:
            model(self.images).sum().backward()
        return int(counter.get_total_flops()) * self.students


def naive_step(
    case: StepCase, models: list[nn.Module], dtype: torch.dtype | None, compiled: bool
) -> Step:
    """As most re-implementations have it: torch's plain optimizers, K(K-1) calls of F.kl_div."""
    optimizers = [torch.optim.SGD(m.parameters(), **SGD) for m in models]  # type: ignore[arg-type]
    passes = [torch.compile(m, dynamic=False) for m in models] if compiled else models

    def step() -> Tensor:
        with torch.autocast(case.device.type, dtype, enabled=dtype is not None):
            logits = [one(case.images) for one in passes]
        losses = naive_losses(logits, case.target)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return torch.stack(losses).detach()

    return step


def trainer_of_pytorch_dml(
    models: list[nn.Module], optimizers: list[torch.optim.SGD], device: torch.device
) -> Any:
    """PyPI's pytorch-dml at the paper's temperature; its ``train_epoch`` takes any batches.

    Raises:
        AbsentError: it is not installed.
    """
    if find_spec("pydml") is None or find_spec("tqdm") is None:
        raise AbsentError("not installed: pip install --no-deps pytorch-dml tqdm")
    from pydml import DMLConfig, DMLTrainer
    from pydml.core import base_trainer

    base_trainer.tqdm = lambda batches, **_: _Silent(batches)  # its bar writes at every batch

    buffers = [{name: b.clone() for name, b in m.named_buffers()} for m in models]
    with contextlib.redirect_stdout(None):
        trainer = DMLTrainer(
            models, config=DMLConfig(temperature=1.0), device=str(device), optimizers=optimizers
        )
    for model, saved in zip(models, buffers, strict=True):  # its constructor moves BatchNorm
        for name, buffer in model.named_buffers():
            buffer.copy_(saved[name])
    return trainer


class _Silent(list[Any]):
    """Batches, as if with a progress bar."""

    def set_postfix(self, _: object) -> None:
        """Shows nothing."""


def pytorch_dml(case: StepCase, models: list[nn.Module]) -> Step:
    """An epoch of one batch."""
    optimizers = [torch.optim.SGD(m.parameters(), **SGD) for m in models]  # type: ignore[arg-type]
    trainer = trainer_of_pytorch_dml(models, optimizers, case.device)

    def step() -> Tensor:
        found = trainer.train_epoch([(case.images, case.target)], 0)
        return torch.tensor([found[f"train_loss_model_{k}"] for k in range(case.students)])

    return step


def ours(
    case: StepCase,
    models: list[nn.Module],
    executor: str,
    dtype: torch.dtype | None,
    independent: bool,
    one_thread: bool,
    compiled_as: str,
) -> Step:
    """The engine, in the memory order that it has by default; ``compiled_as``: a name's end."""
    students = []
    for model in models:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = make_optimizer(
            [*model.parameters()], algorithm="sgd", lr=SGD["lr"], weight_decay=SGD["weight_decay"]
        )
        passes = None
        if compiled_as == COMPILE + COMBO:
            passes = torch.compile(model, dynamic=False, options={"combo_kernels": True})
        student = Student(model, optimizer, Precision(case.device, dtype), logits=passes)
        if compiled_as == COMPILE:
            student.compile()
        students.append(student)
    cohort = Cohort(students)
    if compiled_as.startswith(TOGETHER):
        cohort.compile(combo_kernels=compiled_as == TOGETHER)
    engine = Engine(
        cohort,
        method="independent" if independent else "dml",
        executor=make_executor(executor, len(students), case.device),
    )
    images = case.images.contiguous(memory_format=torch.channels_last)
    threads = 1 if one_thread else torch.get_num_threads()

    def step() -> Tensor:
        with intra_op_threads(threads) if one_thread else contextlib.nullcontext():
            return engine.step(images, case.target).losses

    return step
