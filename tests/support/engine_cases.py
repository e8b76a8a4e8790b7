"""Small cohorts for the tests of the engine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dml_fast.engine import Engine
from dml_fast.engine.cohort import Cohort
from dml_fast.engine.optim import make_optimizer, zero_momentum
from dml_fast.engine.precision import Precision
from dml_fast.engine.student import Student
from dml_fast.models import create_model

CPU = torch.device("cpu")
SHAPE = {"num_classes": 5, "in_channels": 1, "image_size": 8}


class Trap(nn.Module):
    """Gives NaN for a batch whose first pixel is above 50: a student that fails once."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x * torch.where(x[0, 0, 0, 0] > 50, torch.nan, 1.0))
        return out


def sgd(model: nn.Module) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3, fused=True
    )
    zero_momentum(optimizer)
    return optimizer


def optimizer_of(model: nn.Module, algorithm: str = "sgd") -> torch.optim.Optimizer:
    """Make the optimizer that a run has by default."""
    lr = 0.1 if algorithm == "sgd" else 1e-3
    return make_optimizer([*model.parameters()], algorithm=algorithm, lr=lr, weight_decay=5e-4)


def student(model: nn.Module, precision: Precision = Precision(CPU)) -> Student:  # noqa: B008
    return Student(model, sgd(model), precision)


def networks(count: int, dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    torch.manual_seed(1)
    return [create_model("resnet8", **SHAPE).to(dtype) for _ in range(count)]


def batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(6, 1, 8, 8, generator=g, dtype=dtype), torch.randint(5, (6,), generator=g)


def engine_of(models: list[nn.Module], **options: object) -> Engine:
    return Engine(Cohort([student(m) for m in models]), **options)  # type: ignore[arg-type]


def assert_same(a: nn.Module, b: nn.Module, tolerance: float = 0.0) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=name)
