"""A small cohort, and a comparison of states."""

from __future__ import annotations

import copy
from typing import Any

import torch
from engine_cases import CPU, optimizer_of
from torch import Tensor

from dml_fast.engine.averaging import Average
from dml_fast.engine.cohort import Cohort
from dml_fast.engine.precision import Precision
from dml_fast.engine.student import Student
from dml_fast.models import create_model


def cohort(
    count: int = 3,
    arch: str = "resnet8",
    optimizer: str = "sgd",
    dtype: Any = None,
    ema: float = 0.0,
) -> Cohort:
    students = []
    for k in range(count):
        torch.manual_seed(k)
        model = create_model(arch, num_classes=5, in_channels=1, image_size=(8, 8))
        average = Average(model, ema) if ema else None
        how = Precision(CPU, dtype)
        students.append(Student(model, optimizer_of(model, optimizer), how, average=average))
    return Cohort(students)


def state_of(made: Cohort) -> list[Any]:
    return copy.deepcopy(made.state_dict())


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b
