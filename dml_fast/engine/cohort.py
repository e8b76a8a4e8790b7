"""K students as one object: built from a configuration, checked, saved and loaded together."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dml_fast.config import TrainConfig
from dml_fast.distributed.world import World, agreed
from dml_fast.engine.optim import make_optimizer
from dml_fast.engine.precision import Precision
from dml_fast.engine.replicas import (
    ReplicatedStudent,
    ShardedStudent,
    local_parameters,
    shard,
)
from dml_fast.engine.student import Student
from dml_fast.errors import UserError, reason
from dml_fast.models import create_model
from dml_fast.models.embedding import create_embedding_net
from dml_fast.models.pretrained import load_pretrained
from dml_fast.rng import derive_seed, seed_everything

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)


class Cohort:
    """K students, or those of them that this process holds.

    Args:
        students: at least one.
        world: whose ``students`` these are; by default there is one process.
    """

    def __init__(self, students: Sequence[Student], world: World | None = None) -> None:
        self.students = list(students)
        self.world = world or World.alone(len(self.students))

    @classmethod
    def from_config(
        cls,
        config: TrainConfig,
        precision: Precision,
        *,
        num_classes: int,
        in_channels: int,
        image_size: tuple[int, int],
        world: World | None = None,
    ) -> Cohort:
        """Create the students of a run that this process holds, each from a seed of its own.

        Afterwards the global generators are at the start of the training's own stream, which is
        another one on every rank.
        """
        world = world or World.alone(len(config.architectures))
        groups = world.row_groups()
        students = []
        with world.phase():
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
                student = Student(model, make_optimizer(model, config), precision, arch)
                images = torch.zeros(
                    (min(2, config.batch_size), in_channels, *image_size), device=precision.device
                )
                _try(student, images, num_classes)
                students.append(student)
        if groups:
            students = [
                _joined(s, config, world, g) for s, g in zip(students, groups, strict=False)
            ]
        if config.compile:
            for student in students:
                student.compile()
        if any(student.depthwise for student in students):
            logger.info("depthwise convolutions run in fp32: on a CPU they are slower in bf16")
        rank = (world.launch.rank,) if world.launch.rank else ()
        seed_everything(derive_seed(config.seed, "training", *rank))
        return cls(students, world)

    def __len__(self) -> int:
        return len(self.students)

    def __iter__(self) -> Iterator[Student]:
        return iter(self.students)

    @property
    def models(self) -> list[nn.Module]:
        """The networks, in order."""
        return [student.model for student in self.students]

    @property
    def shared_out(self) -> bool:
        """Whether students are in shards (FSDP2), whose passes are collectives of one order."""
        return any(isinstance(student, ShardedStudent) for student in self.students)

    def check_distinct(self) -> None:
        """Refuse identical students, which would stay identical and teach each other nothing.

        Students with dropout are let pass, since that parts them at the first step.

        Raises:
            UserError: naming the two.
        """
        mine = {
            k: (student.arch, weights_digest(student.model))
            for k, student in zip(self.world.students, self.students, strict=True)
            if not _has_dropout(student.model)
        }
        found: dict[str, int] = {}
        everyone = {k: v for part in self.world.all_gather(mine) for k, v in part.items()}
        for k, (arch, digest) in sorted(everyone.items()):
            if (j := found.setdefault(digest, k)) != k:
                raise agreed(
                    UserError(
                        f"students {j} and {k} ({arch}) start with the same weights "
                        "and would stay the same: initialise each differently, "
                        "or give --method independent"
                    )
                )

    def state_dict(self) -> list[dict[str, Any]]:
        """One state a student."""
        return [student.state_dict() for student in self.students]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Put back what ``state_dict`` gave.

        Raises:
            UserError: the states are of other architectures.
        """
        saved = [state["arch"] for state in states]
        mine = [student.arch for student in self.students]
        if saved != mine:
            raise UserError(
                f"the checkpoint holds {', '.join(saved)} and the cohort is {', '.join(mine)}: "
                "give the checkpoint's --arch and --cohort"
            )
        for student, state in zip(self.students, states, strict=True):
            student.load_state_dict(state)


def _joined(student: Student, config: TrainConfig, world: World, group: ProcessGroup) -> Student:
    """The student as the ranks of ``group``, which all have made it, train it together."""
    model, precision, arch = student.model, student.precision, student.arch
    assert world.device_mesh is not None
    if config.fsdp:
        shard(model, world.device_mesh["data"])
        optimizer = make_optimizer(model, config, local_parameters(model))
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


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers, with their names; of a shard, of this part."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        found.update(name.encode())
        found.update(local.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _has_dropout(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())
