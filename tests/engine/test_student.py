"""One student: its guarded update, its optimizer and its state."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from engine_cases import CPU, Trap, assert_same, batch, networks, optimizer_of, student
from torch import nn

from dml_fast.engine import Engine
from dml_fast.engine.cohort import Cohort
from dml_fast.engine.optim import zero_momentum
from dml_fast.engine.precision import FullPrecisionConv2d, Precision
from dml_fast.engine.student import Student
from dml_fast.models import create_model


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_skipped_first_step_does_not_spoil_the_second(optimizer: str) -> None:
    """If the first step is skipped, torch 2.13 leaves the momentum uninitialised."""

    def build(model: nn.Module) -> Student:
        return Student(model, optimizer_of(model, optimizer), Precision(CPU))

    torch.manual_seed(0)
    model = Trap()
    other = copy.deepcopy(model)
    skipping, plain = (Engine(Cohort([build(m)]), method="independent") for m in (model, other))
    x, y = batch(0, torch.float32)
    poisoned = x.clone()
    poisoned[0, 0, 0, 0] = 99.0
    assert skipping.step(poisoned, y).skipped.all()
    skipping.step(x, y)
    plain.step(x, y)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_zero_momentum_is_the_usual_first_step() -> None:
    a, b = networks(1, torch.float32)[0], networks(1, torch.float32)[0]
    usual = torch.optim.SGD(a.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True)
    ours = torch.optim.SGD(b.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True)
    zero_momentum(ours)
    for seed in range(2):
        x, y = batch(seed, torch.float32)
        for model, optimizer in ((a, usual), (b, ours)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert_same(a, b)


def test_moving_a_model_does_not_lose_the_guard_of_its_statistics() -> None:
    torch.manual_seed(0)
    model = Trap()
    one = student(model)
    one.forward(batch(0, torch.float32)[0])
    model._apply(torch.clone)  # what .to(device) does: new tensors under the old names
    engine = Engine(Cohort([one]), method="independent")
    x, y = batch(0, torch.float32)
    engine.step(x, y)
    before = copy.deepcopy(model.state_dict())
    x[0, 0, 0, 0] = 99.0
    assert engine.step(x, y).skipped.all()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_depthwise_convolutions_stay_out_of_bf16_on_a_cpu() -> None:
    shape = {"num_classes": 5, "in_channels": 1, "image_size": (8, 8)}
    torch.manual_seed(0)
    model = create_model("mobilenet_v1", **shape)
    plain, x = copy.deepcopy(model), batch(0, torch.float32)[0]
    one = student(model, Precision(CPU, torch.bfloat16))
    assert one.depthwise == 13
    seen = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda m, _, out: seen.append((m.groups > 1, out.dtype is torch.float32))
            )
    one.forward(x)
    assert len(seen) == 27 and all(depthwise == full for depthwise, full in seen)
    mine, theirs = (
        next(m for m in net.modules() if isinstance(m, nn.Conv2d) and m.groups > 1)
        for net in (model, plain)
    )
    images = torch.randn(2, 32, 8, 8).bfloat16()
    with one.precision.autocast():
        found = mine(images)
    assert torch.equal(found, theirs(images.float()))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert student(plain).depthwise == 0
    assert all(type(m) is not FullPrecisionConv2d for m in plain.modules())


def test_a_student_with_a_scaler_comes_back() -> None:
    half = Precision(CPU, torch.float16)
    first, second = (student(m, half) for m in networks(2, torch.float32))
    first.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9)
    engine = Engine(Cohort([first]), method="independent")
    engine.step(*batch(0, torch.float32))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert float(second.grad_scale) == 2.0**9
    assert second.scaler.state_dict() == first.scaler.state_dict()
    assert_same(first.model, second.model)


@pytest.mark.parametrize("training", [True, False])
def test_predicting_changes_nothing(training: bool) -> None:
    one = student(networks(1)[0])
    one.forward(batch(0)[0])  # changes the statistics
    before = copy.deepcopy(one.model.state_dict())
    x, _ = batch(1)
    logits = one.predict(x, training=training)
    with torch.no_grad():
        assert torch.equal(logits, copy.deepcopy(one.model).train(training)(x))
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert one.model.training
    assert all(norm.track_running_stats for norm in one.norms)
