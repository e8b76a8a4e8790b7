"""From options to the students of a run, each with the input of its own view."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from dml_fast.config import TrainConfig
from dml_fast.config.fields import names_in
from dml_fast.distributed.world import World
from dml_fast.engine import Cohort, Precision, Student
from dml_fast.engine.averaging import Average
from dml_fast.engine.decay import in_groups, without_decay
from dml_fast.engine.optim import make_optimizer
from dml_fast.errors import UserError, reason
from dml_fast.models import InputSpec
from dml_fast.models.heads import Head, new_network
from dml_fast.rng import derive_seed, seed_everything
from dml_fast.training.extra import extra_of
from dml_fast.training.start import NEW, Start

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)


def build_cohort(
    config: TrainConfig,
    precision: Precision,
    *,
    num_classes: int,
    inputs: Sequence[InputSpec],
    world: World | None = None,
    start: Start = NEW,
) -> Cohort:
    """Create those students of a run that this process holds, each from its own seed.

    Afterwards the global generators are at the start of the training's own stream, which differs
    on each rank.

    Args:
        config: checked.
        precision: device and type.
        num_classes: C.
        inputs: what each of V views of the data gives; student k reads view k % V.
        world: the processes that train together; by default there is one.
        start: where their weights come from.

    Raises:
        UserError: a student cannot be made, or cannot be trained on such inputs.
    """
    world = world or World.alone(len(config.architectures))
    groups = world.row_groups()
    students = []
    with world.all_or_none():
        for k in world.students:
            arch = config.architectures[k]
            seed_everything(derive_seed(config.seed, "student", k))
            spec = inputs[k % len(inputs)]
            model = new_network(arch, num_classes, spec, head_of(config))
            start.load(model, k, arch)
            model = model.to(precision.device)
            if config.channels_last:
                model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            average = None if config.ema == "off" else Average(model, config.ema)
            spared = without_decay(model, names_in(config.no_decay))
            optimizer = _optimizer(config, k, _trainable(model), spared)
            student = Student(model, optimizer, precision, arch, average=average)
            rows = config.rows_of_pass(world.mesh.data)
            smaller = ", a smaller --accumulate" if config.accumulate > 1 else ""
            _try(student, blank(min(2, rows), spec, precision), spec, num_classes, smaller)
            students.append(student)
    if groups:
        students = [
            _joined(s, k, config, world, group)
            for s, k, group in zip(students, world.students, groups, strict=False)
        ]
    if config.compile == "student":
        for student in students:
            student.compile()
    if any(student.depthwise for student in students):
        logger.info("depthwise convolutions run in fp32: on a CPU they are slower in bf16")
    rank = (world.launch.rank,) if world.launch.rank else ()
    seed_everything(derive_seed(config.seed, "training", *rank))
    cohort = Cohort(students, world)
    if config.compile == "cohort" and students:
        cohort.compile()
    return cohort


def head_of(config: TrainConfig) -> Head:
    """Return what stands on each student's backbone."""
    kind = config.head_kind
    return Head(kind, config.bits if kind == "hash" else 0)


def _optimizer(
    config: TrainConfig, k: int, parameters: Sequence[nn.Parameter], spared: Sequence[bool]
) -> torch.optim.Optimizer:
    return make_optimizer(
        parameters,
        algorithm=config.algorithms[k],
        lr=config.peak_lrs[k],
        momentum=config.each("momentum")[k],
        weight_decay=config.each("weight_decay")[k],
        spared=spared,
    )


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require a gradient, at least one.

    Raises:
        UserError: there is none.
    """
    found = [p for p in model.parameters() if p.requires_grad]
    if not found:
        raise UserError(
            f"a student ({type(model).__name__}) has no parameter that requires a gradient: "
            "give an --arch that can be trained"
        )
    return found


def _joined(
    student: Student, k: int, config: TrainConfig, world: World, group: ProcessGroup
) -> Student:
    """Return student k as the ranks of ``group``, which have all made it, train it together."""
    from dml_fast.engine.replicas import (
        ReplicatedStudent,
        ShardedStudent,
        local_parameters,
        shard,
    )

    model, precision, arch, average = (
        student.model,
        student.precision,
        student.arch,
        student.average,
    )
    assert world.device_mesh is not None
    if config.fsdp:
        shard(model, world.device_mesh["data"])
        if average is not None:
            shard(average.model, world.device_mesh["data"], trained=False)
        spared = without_decay(model, names_in(config.no_decay))
        shards = _trainable(model)
        optimizer = _optimizer(config, k, local_parameters(shards), spared)
        shards = [parameter for group in in_groups(shards, spared) for parameter in group]
        return ShardedStudent(
            model, optimizer, precision, arch, group=group, shards=shards, average=average
        )
    features = extra_of(config).loss is not None
    return ReplicatedStudent(
        model,
        student.optimizer,
        precision,
        arch,
        group=group,
        with_features=features,
        average=average,
    )


def blank(rows: int, spec: InputSpec, precision: Precision) -> torch.Tensor:
    """Return inputs of zeros, (rows, ...)."""
    return torch.zeros((rows, *spec.tensor_shape), device=precision.device)


def _try(
    student: Student, rows: torch.Tensor, spec: InputSpec, num_classes: int, smaller: str
) -> None:
    """Refuse a student that cannot do in training what it does in evaluation."""
    subject = f"{student.arch} cannot train on batches of {len(rows)} {spec.words}"
    try:
        logits = student.predict(rows, training=True)
    except Exception as error:
        raise UserError(
            f"{subject} ({reason(error)}): give a larger --batch-size{smaller} or another --arch"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (len(rows), num_classes):
        raise UserError(f"{subject}: it must return logits ({len(rows)}, {num_classes})")
    if not all(isinstance(v, torch.Tensor) for v in student.model.state_dict().values()):
        raise UserError(f"{student.arch} keeps state that is no tensor, which cannot be saved")
