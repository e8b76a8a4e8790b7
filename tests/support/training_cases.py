"""A cohort of any architectures, and some of its steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from engine_cases import CPU, optimizer_of
from torch import Tensor

from dml_fast.engine import Engine
from dml_fast.engine.averaging import Average
from dml_fast.engine.cohort import Cohort
from dml_fast.engine.precision import Precision
from dml_fast.engine.student import Student
from dml_fast.models import create_model
from dml_fast.models.embedding import create_embedding_net

IMAGES = {"num_classes": 5, "in_channels": 3, "image_size": (16, 16)}


def cohort_of(
    archs: list[str],
    optimizer: str = "sgd",
    dtype: Any = None,
    embed: bool = False,
    ema: float = 0.0,
) -> Cohort:
    students = []
    create = create_embedding_net if embed else create_model
    for k, arch in enumerate(archs):
        torch.manual_seed(k)
        model = create(arch, **IMAGES).to(memory_format=torch.channels_last)
        average = Average(model, ema) if ema else None
        how = Precision(CPU, dtype)
        students.append(Student(model, optimizer_of(model, optimizer), how, arch, average=average))
    return Cohort(students)


def train(engine: Engine, steps: int, **options: Any) -> list[Tensor]:
    """Run steps on images of 16 x 16; return the losses and what the generators give next."""
    torch.manual_seed(7)
    np.random.seed(7)
    g = torch.Generator().manual_seed(3)
    found = []
    for step in range(steps):
        views = [
            torch.randn(8, 3, 16, 16, generator=g).contiguous(memory_format=torch.channels_last)
            for _ in range(len(engine.cohort))
        ]
        target = torch.randint(5, (8,), generator=g)
        if engine.term.distribution == "bernoulli":
            target = (torch.rand(8, 5, generator=g) < 0.4).float()
        for one in engine.cohort:
            one.set_lr(0.05 * (step + 1))
        result = engine.step(views, target, views=True, kl_scale=step / steps, **options)
        found.append(torch.stack([result.losses, result.ce, result.kl, result.extra]))
    return [*found, torch.rand(3), torch.from_numpy(np.random.rand(3))]
