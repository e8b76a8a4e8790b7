"""What a step of each student costs, measured, so that a mixed cohort can be shared out evenly."""

from __future__ import annotations

import logging
import statistics
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from dml_fast.distributed.mesh import balanced
from dml_fast.distributed.world import World
from dml_fast.training.build import build_cohort

if TYPE_CHECKING:
    from dml_fast.config import TrainConfig
    from dml_fast.data import DataSet
    from dml_fast.engine.precision import Precision

logger = logging.getLogger(__name__)

_STEPS = 3


def share_out_by_cost(
    config: TrainConfig, data: DataSet, precision: Precision, world: World
) -> None:
    """Let rank 0 time a step of each architecture, and share the students out by that.

    Args:
        config: of the run.
        data: what it trains on.
        precision: how.
        world: whose shares are set, on all ranks alike.
    """
    archs = config.architectures
    seconds = world.from_main(
        lambda: {arch: _seconds(arch, config, data, precision, world) for arch in sorted({*archs})}
    )
    world.share_out(balanced([seconds[arch] for arch in archs], world.mesh.cohort))
    times = ", ".join(f"{arch} {1e3 * s:.0f} ms" for arch, s in seconds.items())
    logger.info("shares measured: a step of %s", times)


def _seconds(
    arch: str, config: TrainConfig, data: DataSet, precision: Precision, world: World
) -> float:
    """The median time of a step of one student on a column's part of a batch."""
    channels, *size = data.train.images.shape[1:]
    alone = replace(config, arch=arch, cohort=1, method="independent", compile=False)
    (student,) = build_cohort(
        alone,
        precision,
        num_classes=len(data.classes),
        in_channels=channels,
        image_size=(size[0], size[1]),
    )
    rows = config.batch_size // world.mesh.data
    images = torch.zeros((rows, channels, *size), device=precision.device)
    student.model.train()
    times = []
    for _ in range(_STEPS + 1):
        begun = time.perf_counter()
        logits = student.forward(images)
        student.update(logits, torch.zeros_like(logits))
        if precision.device.type == "cuda":
            torch.cuda.synchronize(precision.device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])
