"""Casts and counters in one launch each: the bits of passes that cast and count layer by layer."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_cases import CPU, Trap, assert_same, sgd
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from training_cases import cohort_of, train

from dml_fast.engine import Engine, Sequential
from dml_fast.engine.cohort import Cohort
from dml_fast.engine.precision import Precision, keep_in_full_precision
from dml_fast.engine.student import Student
from dml_fast.engine.threads import Threads, intra_op_threads
from dml_fast.loss.triplet import TripletLoss

BF16 = Precision(CPU, torch.bfloat16)


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(f)] += 1
        return f(*args, **(kwargs or {}))


def layer_by_layer(cohort: Cohort) -> Cohort:
    """Make the passes of all students plain torch's."""
    for student in cohort:
        student.gathers = False
    return cohort


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "parts": {"parts": 2},
    "averages": {"teach_with": "ema"},
    "alternating": {"update": "alternating"},
    "clipped": {"clip_norm": 0.5},
    "features": {"feature_loss": TripletLoss(), "feature_weight": 0.5},
    "threads": {"executor": lambda: Threads(2, workers=2, threads_each=1)},
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_same_bit_for_bit(case: str) -> None:
    options = dict(CASES[case])
    executor = options.pop("executor", Sequential)

    def cohort() -> Cohort:
        ema = 0.9 * (case == "averages")
        return cohort_of(["resnet8"] * 2, dtype=torch.bfloat16, embed=case == "features", ema=ema)

    mine, plain = cohort(), layer_by_layer(cohort())
    with intra_op_threads(1):
        expected = train(Engine(plain, **options), 3)
        found = train(Engine(mine, executor=executor(), **options), 3)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    for one, other in zip(mine, plain, strict=True):
        assert_same(one.model, other.model)
        states = [s.optimizer.state_dict()["state"] for s in (one, other)]
        torch.testing.assert_close(*states, rtol=0, atol=0)


def test_casts_and_counters_are_one_launch_each() -> None:
    cohort = cohort_of(["resnet8"] * 3, dtype=torch.bfloat16)
    engine = Engine(cohort)
    train(engine, 1)
    with Operators() as gathered:
        train(engine, 1)
    layer_by_layer(cohort)
    with Operators() as plain:
        train(engine, 1)
    weights = sum(isinstance(m, nn.Conv2d) for m in cohort.models[0].modules()) + 2
    cast, add = "aten._to_copy.default", "aten.add_.Tensor"
    assert plain.found[cast] - gathered.found[cast] == 3 * 2 * weights
    assert gathered.found["aten._foreach_copy_.default"] == 3 * 2
    assert plain.found[add] - gathered.found[add] == 3 * (len(cohort.students[0].norms) - 1)


class OddLinear(nn.Linear):
    """Normalises its weight, in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight), self.bias)


class CountingNorm(nn.BatchNorm1d):
    """Reads its counter."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.num_batches_tracked.float().clamp(min=1)


class Odd(nn.Module):
    """Uses layers in every way but once, and reads their weights itself."""

    def __init__(self) -> None:
        super().__init__()
        self.thrice, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.half_frozen, self.plain = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.half_frozen.bias.requires_grad = False
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.conv = nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular")
        self.odd, self.read, self.in_fp32 = OddLinear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.spectral = parametrizations.spectral_norm(nn.Linear(8, 8))
        self.again, self.again_2 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.deep = nn.Conv2d(2, 2, 1, groups=2)
        self.up = nn.ConvTranspose1d(1, 1, 3, padding=1)
        self.embed = nn.Embedding(5, 8)
        self.once, self.twice, self.never = (nn.BatchNorm1d(8) for _ in range(3))
        self.fixed, self.mean = nn.BatchNorm1d(8), nn.BatchNorm1d(8, momentum=None)
        self.counting, self.without = CountingNorm(8), nn.BatchNorm1d(8, track_running_stats=False)
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.fixed.eval()
        y: Tensor = self.once(self.plain(x))
        for _ in range(3):
            y = self.thrice(y).relu() + y
        y = self.twice(self.twice(self.half_frozen(self.frozen(y))) * 2)
        # far apart, so that the order in which the gradients of a tied weight are added up tells
        y = self.first(y) + 2**-20 * self.second(y) + self.first(y).tanh()
        y = self.mean(self.up(self.conv(y[:, None]))[:, 0])
        y = y + self.deep(y.reshape(-1, 2, 2, 2)).flatten(1)
        y = self.read(y) * self.read.weight.norm() + F.linear(y, F.normalize(self.read.weight))
        with torch.autocast("cpu", enabled=False):
            y = self.in_fp32(y.float())
        y = self.counting(self.spectral(self.normed(self.odd(y))))
        y = checkpoint(self.again, y, use_reentrant=False)
        y = y + checkpoint(self.again_2, y, use_reentrant=True)
        y = y + self.attention(y, y, y)[0] + self.embed.weight[:1]
        return self.without(self.fixed(y))[:, :5]


@pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad")
def test_an_odd_network_learns_what_plain_torch_lets_it() -> None:
    torch.manual_seed(0)
    mine = Odd()
    theirs = copy.deepcopy(mine)
    student, optimizer = Student(mine, sgd(mine), BF16), sgd(theirs)
    keep_in_full_precision(theirs, BF16)
    engine = Engine(Cohort([student]), method="independent")
    before = {m: dict(m.__dict__) for m in mine.modules()}
    for seed in range(4):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
        y = torch.arange(16) % 5
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            logits = theirs(x)
        F.cross_entropy(logits.float(), y).backward()
        given: list[Tensor | None] = [p.grad for p in theirs.parameters()]
        F.cross_entropy(student.forward(x).float(), y).backward()
        for (name, p), expected in zip(mine.named_parameters(), given, strict=True):
            assert (p.grad is None) == (expected is None), name
            assert p.grad is None or torch.equal(p.grad, expected), name
        student.forget_step()
        optimizer.zero_grad()
        assert engine.step(x, y).losses.isfinite().all()
        with torch.no_grad():
            theirs.load_state_dict(mine.state_dict())
    counts = {"once": 8, "twice": 16, "never": 0, "fixed": 0, "mean": 8, "counting": 8}
    for name, expected in counts.items():
        assert int(mine.get_buffer(f"{name}.num_batches_tracked")) == expected, name
    assert {m: m.__dict__.keys() for m in mine.modules()} == {
        m: found.keys() for m, found in before.items()
    }


class Momentum(nn.Module):
    """Has an average of itself, a copy made in its first pass, and updates it within the pass."""

    def __init__(self, update: str) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 5, bias=False))
        self.copy: nn.Module | None = None
        self.update = update

    def forward(self, x: Tensor) -> Tensor:
        if self.update == "given":
            other = {"0.weight": self.trunk[0].weight * 2}
            return torch.func.functional_call(self.trunk, other, x) + self.trunk(x)
        with torch.no_grad():
            if self.update == "norm":
                self.trunk[2].weight.copy_(F.normalize(self.trunk[2].weight))
            elif self.update == "data":
                self.trunk[0].weight.data = self.trunk[0].weight.data * 0.9
        if self.copy is None:
            self.copy = copy.deepcopy(self.trunk).requires_grad_(False)
        for mine, theirs in zip(self.copy.parameters(), self.trunk.parameters(), strict=True):
            mine.data.mul_(0.5).add_(theirs.data, alpha=0.5)
        for mine, theirs in zip(self.copy.buffers(), self.trunk.buffers(), strict=True):
            mine.copy_(theirs)
        self.copy.load_state_dict(self.copy.state_dict())
        return self.trunk(x) + self.copy(x)


@pytest.mark.parametrize("update", ["norm", "given", "data", "none"])
def test_a_pass_that_copies_or_changes_weights_learns_the_same(update: str) -> None:
    found = []
    for gathers in (True, False):
        torch.manual_seed(0)
        model = Momentum(update)
        student = Student(model, sgd(model), BF16)
        student.gathers = gathers
        engine = Engine(Cohort([student]), method="independent")
        x, y = torch.randn(16, 8), torch.arange(16) % 5
        found.append([engine.step(x, y).losses for _ in range(3)] + [*model.parameters()])
        assert all(type(t) is Tensor for t in model.state_dict().values())
        assert int(model.trunk[1].num_batches_tracked) == (6 if update == "given" else 3)
        copy.deepcopy(model)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_second_derivative_is_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, found = torch.randn(5, 4), []
    for gathers in (True, False):
        student = Student(model, sgd(model), BF16)
        student.gathers = gathers
        weights = [*model.parameters()]
        grads = torch.autograd.grad(student.forward(x).square().sum(), weights, create_graph=True)
        penalty = torch.stack([grad.norm() for grad in grads]).sum()
        found.append(torch.autograd.grad(penalty, weights))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_pass_that_fails_leaves_the_layers_as_they_were() -> None:
    class Fails(Trap):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise ValueError("no")

    model = Fails()
    student = Student(model, sgd(model), BF16)
    with pytest.raises(ValueError, match="no"):
        student.forward(torch.ones(2, 1, 8, 8))
    assert not any("forward" in vars(m) for m in model.modules())
    assert int(model.body[1].num_batches_tracked) == 1  # as in torch


def test_students_that_share_layers_run_as_torch_runs_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8))
    models = [nn.Sequential(nn.Flatten(), trunk, nn.Linear(8, 5)) for _ in range(2)]
    models.append(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)))
    with caplog.at_level(logging.INFO, "dml_fast"):
        cohort = Cohort([Student(m, sgd(m), BF16) for m in models])
    assert [student.gathers for student in cohort] == [False, False, True]
    assert "students 0, 1 share layers" in caplog.text


def test_what_is_compiled_is_left_to_the_compiler() -> None:
    class Inside(Trap):
        def __init__(self) -> None:
            super().__init__()
            self.fast = torch.compile(self.slow, backend="eager")

        def slow(self, x: Tensor) -> Tensor:
            return x

    class OfTheClass(Trap):
        slow = torch.compile(lambda self, x: x, backend="eager")

    compiled = Trap()
    compiled.compile(backend="eager")
    whole = torch.compile(Trap(), backend="eager")
    for model in (Inside(), OfTheClass(), compiled, whole, nn.Sequential(compiled)):
        assert not Student(model, sgd(model), BF16).gathers
    plain = Trap()
    assert Student(plain, sgd(plain), BF16).gathers
    assert not Student(plain, sgd(plain), BF16, logits=torch.compile(plain)).gathers
