"""Parameters without weight decay are a group of their own, and all else is as with one group."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from engine_cases import CPU
from fake_streams import FakeStreams
from torch import Tensor, nn

from dml_fast.engine import Cohort, Engine, Graph, Precision, Sequential, Student, Threads
from dml_fast.engine.decay import in_groups, without_decay
from dml_fast.engine.optim import make_optimizer
from dml_fast.loss import mutual_loss


class RootNorm(nn.Module):
    """A layer of somebody else, with a vector and a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.mix = nn.Parameter(torch.eye(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x / x.square().mean(1, keepdim=True).sqrt()) @ self.mix


def network() -> nn.Sequential:
    made = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), RootNorm(), nn.LayerNorm(8), nn.Linear(8, 5)
    )
    made[5].weight.requires_grad_(False)
    return made


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ((), []),
        (("norm",), ["1.weight", "1.bias", "3.scale", "4.weight", "4.bias"]),
        (("bias",), ["0.bias", "1.bias", "4.bias", "5.bias"]),
        (
            ("norm", "bias"),
            ["0.bias", "1.weight", "1.bias", "3.scale", "4.weight", "4.bias", "5.bias"],
        ),
    ],
)
def test_which_parameters_have_no_decay(kinds: tuple[str, ...], expected: list[str]) -> None:
    net = network()
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    spared = without_decay(net, kinds)
    assert [name for name, free in zip(names, spared, strict=True) if free] == expected
    assert in_groups(names, spared)[1] == expected


def optimizers(net: nn.Module, algorithm: str) -> tuple[torch.optim.Optimizer, ...]:
    """Ours, and one made with torch alone over a copy."""
    theirs = copy.deepcopy(net)
    named = [(name, p) for name, p in theirs.named_parameters() if p.requires_grad]
    free = [p for name, p in named if name.endswith("bias") or name[0] in "14" or "scale" in name]
    rest = [p for _, p in named if all(p is not other for other in free)]
    groups = [{"params": rest}, {"params": free, "weight_decay": 0.0}]
    if algorithm == "sgd":
        other: Any = torch.optim.SGD(
            groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, fused=True
        )
    else:
        other = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1, fused=True)
    mine = make_optimizer(
        [p for p in net.parameters() if p.requires_grad],
        algorithm=algorithm,
        lr=1.0,
        weight_decay=0.1,
        spared=without_decay(net, ("norm", "bias")),
    )
    return mine, other, theirs  # type: ignore[return-value]


@pytest.mark.parametrize("kind", [Sequential, Threads, Graph])
def test_updates_are_those_of_torchs_groups_bit_for_bit(kind: Any) -> None:
    """One optimizer for each student, a rate for each at each step, and a state that goes on."""
    torch.manual_seed(0)
    algorithms = ("sgd", "adamw")
    nets = [network() for _ in algorithms]
    made = [optimizers(net, name) for net, name in zip(nets, algorithms, strict=True)]
    others: list[Any] = [other for _, other, _ in made]
    theirs: list[Any] = [copied for _, _, copied in made]

    def engine_over(models: list[nn.Module], own: list[torch.optim.Optimizer]) -> Engine:
        cohort = Cohort([Student(m, o, Precision(CPU)) for m, o in zip(models, own, strict=True)])
        args = {Threads: (2,), Graph: (CPU, FakeStreams(cohort))}.get(kind, ())
        return Engine(cohort, executor=kind(*args))

    engine = engine_over(nets, [mine for mine, _, _ in made])  # type: ignore[arg-type]
    for step in range(4):
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 6, generator=g), torch.randint(5, (16,), generator=g)
        if step == 2:
            state = copy.deepcopy(engine.cohort.state_dict())
            fresh = [network() for _ in nets]
            again = [optimizers(n, a)[0] for n, a in zip(fresh, algorithms, strict=True)]
            engine = engine_over(fresh, again)  # type: ignore[arg-type]
            engine.cohort.load_state_dict(state)
            nets = fresh
        for k, (one, other) in enumerate(zip(engine.cohort, others, strict=True)):
            one.set_lr((step + k) / 64)
            for group in other.param_groups:
                group["lr"] = (step + k) / 64
        engine.step(x, y)
        losses = mutual_loss([model(x) for model in theirs], y)
        assert isinstance(losses, Tensor)
        losses.sum().backward()
        for other in others:
            other.step()
            other.zero_grad()
    for a, b in zip(nets, theirs, strict=True):
        for name, p in a.named_parameters():
            torch.testing.assert_close(p, b.get_parameter(name), rtol=0, atol=0, msg=name)
