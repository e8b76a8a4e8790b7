"""From options to objects: the students of a run, their optimizers, and what the ranks compare."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from dml_fast.config import TrainConfig
from dml_fast.distributed.world import World
from dml_fast.engine.cohort import Cohort
from dml_fast.engine.optim import make_optimizer
from dml_fast.engine.precision import Precision
from dml_fast.engine.student import Student
from dml_fast.errors import UserError, reason
from dml_fast.models import create_model
from dml_fast.models.embedding import create_embedding_net
from dml_fast.models.pretrained import load_pretrained
from dml_fast.rng import derive_seed, seed_everything

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)


def facts_of(config: TrainConfig) -> dict[str, object]:
    """Return the options by flag, which must be the same on all ranks."""
    return {f"--{name.replace('_', '-')}": value for name, value in config.to_dict().items()}


def build_cohort(
    config: TrainConfig,
    precision: Precision,
    *,
    num_classes: int,
    in_channels: int,
    image_size: tuple[int, int],
    world: World | None = None,
) -> Cohort:
    """Create those students of a run that this process holds, each from its own seed.

    Afterwards the global generators are at the start of the training's own stream, which differs
    on each rank.

    Args:
        config: checked.
        precision: device and type.
        num_classes: C.
        in_channels: of the images.
        image_size: height and width.
        world: the processes that train together; by default there is one.

    Raises:
        UserError: a student cannot be made, or cannot be trained on such images.
    """
    world = world or World.alone(len(config.architectures))
    groups = world.row_groups()
    students = []
    with world.all_or_none():
        for k in world.students:
            arch = config.architectures[k]
            seed_everything(derive_seed(config.seed, "student", k))
            create = create_embedding_net if config.retrieval else create_model
            model = create(
                arch, num_classes=num_classes, in_channels=in_channels, image_size=image_size
            )
            if config.pretrained:
                load_pretrained(model, config.pretrained, arch)
            model = model.to(precision.device)
            if config.channels_last:
                model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            student = Student(model, _optimizer(config, _trainable(model)), precision, arch)
            images = torch.zeros(
                (min(2, config.batch_size), in_channels, *image_size), device=precision.device
            )
            _try(student, images, num_classes)
            students.append(student)
    if groups:
        students = [_joined(s, config, world, g) for s, g in zip(students, groups, strict=False)]
    if config.compile:
        for student in students:
            student.compile()
    if any(student.depthwise for student in students):
        logger.info("depthwise convolutions run in fp32: on a CPU they are slower in bf16")
    rank = (world.launch.rank,) if world.launch.rank else ()
    seed_everything(derive_seed(config.seed, "training", *rank))
    return Cohort(students, world)


def _optimizer(config: TrainConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return make_optimizer(
        parameters,
        algorithm=config.algorithm,
        lr=config.peak_lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
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


def _joined(student: Student, config: TrainConfig, world: World, group: ProcessGroup) -> Student:
    """Return the student as the ranks of ``group``, which have all made it, train it together."""
    from dml_fast.engine.replicas import (
        ReplicatedStudent,
        ShardedStudent,
        local_parameters,
        shard,
    )

    model, precision, arch = student.model, student.precision, student.arch
    assert world.device_mesh is not None
    if config.fsdp:
        shard(model, world.device_mesh["data"])
        optimizer = _optimizer(config, local_parameters(model))
        return ShardedStudent(model, optimizer, precision, arch, group=group)
    features = config.triplet_weight > 0
    return ReplicatedStudent(
        model, student.optimizer, precision, arch, group=group, with_features=features
    )


def _try(student: Student, images: torch.Tensor, num_classes: int) -> None:
    """Refuse a student that cannot do in training what it does in evaluation."""
    size = " x ".join(map(str, images.shape[1:]))
    subject = f"{student.arch} cannot train on batches of {len(images)} images of {size}"
    try:
        logits = student.predict(images, training=True)
    except Exception as error:
        raise UserError(
            f"{subject} ({reason(error)}): give a larger --batch-size or another --arch"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (len(images), num_classes):
        raise UserError(f"{subject}: it must return logits ({len(images)}, {num_classes})")
    if not all(isinstance(v, torch.Tensor) for v in student.model.state_dict().values()):
        raise UserError(f"{student.arch} keeps state that is no tensor, which cannot be saved")
