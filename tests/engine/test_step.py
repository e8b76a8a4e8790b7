"""The cohort step against plain autograd, its guards, and its update orders."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from engine_cases import (
    CPU,
    Trap,
    assert_same,
    batch,
    engine_of,
    networks,
    optimizer_of,
    sgd,
    student,
)
from torch import Tensor, nn

from dml_fast.engine import Engine
from dml_fast.engine.cohort import Cohort
from dml_fast.engine.precision import Precision
from dml_fast.engine.student import Student
from dml_fast.errors import UserError
from dml_fast.training.meter import Meter


def kl(peer: Tensor, own: Tensor, temperature: float = 1.0) -> Tensor:
    return temperature**2 * F.kl_div(
        F.log_softmax(own / temperature, 1),
        F.softmax(peer.detach() / temperature, 1),
        reduction="batchmean",
    )


def naive_step(
    models: list[nn.Module], optimizers: list[torch.optim.SGD], x: Tensor, y: Tensor, weight: float
) -> list[Tensor]:
    logits = [m(x) for m in models]
    losses = [
        F.cross_entropy(z, y)
        + weight * torch.stack([kl(p, z) for p in logits if p is not z]).mean()
        for z in logits
    ]
    for loss, optimizer in zip(losses, optimizers, strict=True):
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        optimizer.step()
    return [loss.detach() for loss in losses]


def test_dml_is_the_naive_loop() -> None:
    mine = networks(3)
    theirs = copy.deepcopy(mine)
    engine = engine_of(mine, kl_weight=0.7)
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
        for m in theirs
    ]
    for seed in range(4):
        x, y = batch(seed)
        losses = naive_step(theirs, optimizers, x, y, weight=0.35)
        result = engine.step(x, y, kl_scale=0.5)
        torch.testing.assert_close(result.losses, torch.stack(losses), rtol=1e-9, atol=1e-9)
        assert not result.skipped.any()
    for a, b in zip(mine, theirs, strict=True):
        assert_same(a, b, 1e-9)


def test_independent_students_are_each_as_if_alone() -> None:
    together = networks(2)
    alone = copy.deepcopy(together)
    engine = engine_of(together, method="independent")
    singles = [engine_of([model], method="independent") for model in alone]
    for seed in range(3):
        x, y = batch(seed)
        engine.step(x, y)
        for single in singles:
            single.step(x, y)
    for a, b in zip(together, alone, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_dml_e_trains_like_dml_and_reports_the_mean_peer(reduction: str) -> None:
    first, second = networks(3), networks(3)
    options = {"peer_reduction": reduction, "kl_weight": 0.3}
    engines = engine_of(first, **options), engine_of(second, method="dml_e", **options)
    x, y = batch(0)
    with torch.no_grad():
        logits = [m(x) for m in copy.deepcopy(first)]
    results = [e.step(x, y) for e in engines]
    for a, b in zip(first, second, strict=True):
        assert_same(a, b)
    for k, own in enumerate(logits):
        peers = torch.stack([z.softmax(1) for j, z in enumerate(logits) if j != k]).mean(0)
        expected = F.kl_div(own.log_softmax(1), peers, reduction="batchmean")
        expected = expected * (2 if reduction == "sum" else 1)
        torch.testing.assert_close(results[1].kl[k], expected)
        torch.testing.assert_close(results[1].losses[k], results[1].ce[k] + 0.3 * expected)
        assert results[1].kl[k] < results[0].kl[k]


def test_alternating_is_algorithm_1() -> None:
    mine = networks(3)
    theirs = copy.deepcopy(mine)
    engine = engine_of(mine, update="alternating")
    optimizers = [sgd(m) for m in theirs]
    for seed in range(3):
        x, y = batch(seed)
        engine.step(x, y)
        logits = [m(x) for m in theirs]
        for k, (model, optimizer) in enumerate(zip(theirs, optimizers, strict=True)):
            own = logits[k]
            peers = [kl(z, own) for j, z in enumerate(logits) if j != k]
            loss = F.cross_entropy(own, y) + torch.stack(peers).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            refresher = copy.deepcopy(model)  # its running statistics may change
            logits[k] = refresher(x).detach()
    for a, b in zip(mine, theirs, strict=True):
        assert_same(a, b, 1e-9)
        assert a.bn.num_batches_tracked == 3


def test_distillation_listens_to_the_teacher_alone() -> None:
    models = networks(3)
    teacher_before = copy.deepcopy(models[0].state_dict())
    alone = copy.deepcopy(models[1])
    optimizer = sgd(alone)
    engine = engine_of(models, method="distill", temperature=2.0)
    x, y = batch(0)
    with torch.no_grad():
        lesson = copy.deepcopy(models[0]).eval()(x)
    result = engine.step(x, y, learners=(1, 2), teacher=0)
    own = alone(x)
    (F.cross_entropy(own, y) + kl(lesson, own, 2.0)).backward()
    optimizer.step()
    assert_same(models[1], alone, 1e-9)
    assert len(result.losses) == 2
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, teacher_before[name]), name
    assert models[0].training


@pytest.mark.parametrize("update", ["simultaneous", "alternating"])
def test_no_learner_is_not_all_of_them(update: str) -> None:
    models = networks(2)
    before = copy.deepcopy(models)
    result = engine_of(models, update=update).step(*batch(0), learners=())
    assert [len(column) for column in result] == [0] * 8
    for a, b in zip(models, before, strict=True):
        assert_same(a, b)


def test_a_bad_step_leaves_no_trace_and_does_not_touch_the_peers() -> None:
    torch.manual_seed(0)
    bad, *good = [Trap().double(), *networks(2)]
    peers_alone = copy.deepcopy(good)
    engine = engine_of([bad, *good])
    smaller = engine_of(peers_alone)
    x, y = batch(0)
    engine.step(x, y)
    smaller_first = copy.deepcopy(good)  # from here on the Trap teaches
    for target, source in zip(peers_alone, smaller_first, strict=True):
        target.load_state_dict(source.state_dict())
    for mine, theirs in zip(engine.cohort.students[1:], smaller.cohort, strict=True):
        theirs.optimizer.load_state_dict(copy.deepcopy(mine.optimizer.state_dict()))
    weights = copy.deepcopy(bad.state_dict())
    momentum = copy.deepcopy(engine.cohort.students[0].optimizer.state_dict()["state"])

    x, y = batch(1)
    x[0, 0, 0, 0] = 99.0
    result = engine.step(x, y)
    alone = smaller.step(x, y)
    assert result.skipped.tolist() == [True, False, False]
    torch.testing.assert_close(result.losses[1:], alone.losses)
    for a, b in zip(good, peers_alone, strict=True):
        assert_same(a, b, 1e-9)
    for name, tensor in bad.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    after = engine.cohort.students[0].optimizer.state_dict()["state"]
    for key, state in momentum.items():
        assert torch.equal(after[key]["momentum_buffer"], state["momentum_buffer"])

    x[0, 0, 0, 0] = 0.0
    assert not engine.step(x, y).skipped.any()


def test_an_overflow_halves_the_scale_of_that_student_only() -> None:
    half = Precision(CPU, torch.float16)
    models = networks(2, torch.float32)
    students = [student(m, half) for m in models]
    engine = Engine(Cohort(students))
    students[1].scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    x, y = batch(0, torch.float32)
    result = engine.step(x, y)
    assert result.skipped.tolist() == [False, True]
    assert [s.scaler.get_scale() for s in students] == [2.0**16, 2.0**39]
    assert torch.isfinite(result.losses).all()


def test_fp16_follows_fp32() -> None:
    models = networks(2, torch.float32)
    others = copy.deepcopy(models)
    full = engine_of(others)
    half = Engine(Cohort([student(m, Precision(CPU, torch.float16)) for m in models]))
    for seed in range(3):
        x, y = batch(seed, torch.float32)
        a, b = full.step(x, y), half.step(x, y)
        torch.testing.assert_close(a.losses, b.losses, rtol=0.05, atol=0.05)


def test_bf16_follows_fp32_and_keeps_weights_in_fp32() -> None:
    models = networks(2, torch.float32)
    full = engine_of(copy.deepcopy(models))
    half = Engine(Cohort([student(m, Precision(CPU, torch.bfloat16)) for m in models]))
    for seed in range(3):
        x, y = batch(seed, torch.float32)
        a, b = full.step(x, y), half.step(x, y)
        torch.testing.assert_close(a.losses, b.losses, rtol=0.05, atol=0.05)
    assert {p.dtype for p in models[0].parameters()} == {torch.float32}


@pytest.mark.parametrize("method", ["dml", "dml_e"])
def test_identical_students_are_refused(method: str) -> None:
    model = networks(1)[0]
    with pytest.raises(UserError, match=r"students 0 and 1 .* same weights"):
        engine_of([model, copy.deepcopy(model)], method=method)


def test_identical_students_are_let_pass_where_they_can_part() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 5))
    engine_of([model, copy.deepcopy(model)])
    model[1].p = 0.0
    engine_of([model, copy.deepcopy(model)], method="independent")
    with pytest.raises(UserError):
        engine_of([model, copy.deepcopy(model)])


@pytest.mark.parametrize("update", ["simultaneous", "alternating"])
def test_statistics_move_once_a_step(update: str) -> None:
    models = networks(2)
    engine = engine_of(models, update=update)
    engine.step(*batch(0))
    assert [int(m.bn.num_batches_tracked) for m in models] == [1, 1]


def test_an_autocast_around_the_step_changes_nothing() -> None:
    models = networks(2, torch.float32)
    others = copy.deepcopy(models)
    half = Precision(CPU, torch.bfloat16)
    a, b = (
        Engine(Cohort([student(m, half) for m in ms]), update="alternating")
        for ms in (models, others)
    )
    for seed in range(3):
        x, y = batch(seed, torch.float32)
        losses = a.step(x, y).losses
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(b.step(x, y).losses, losses)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["dml", "dml_e", "alternating", "distill"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_never_waits_for_the_gpu(
    dtype: torch.dtype | None, method: str, optimizer: str
) -> None:
    cuda = torch.device("cuda")
    students = [
        Student(m, optimizer_of(m, optimizer), Precision(cuda, dtype))
        for m in (m.to(cuda) for m in networks(3, torch.float32))
    ]
    alternating = method == "alternating"
    engine = Engine(
        Cohort(students),
        method="dml" if alternating else method,
        update="alternating" if alternating else "simultaneous",
    )
    learners, teacher = ((1, 2), 0) if method == "distill" else ((0, 1, 2), None)
    meter = Meter(3, cuda)
    x, y = (t.to(cuda) for t in batch(0, torch.float32))

    def step() -> None:
        for one in students:
            one.set_lr(0.01)
        meter.add(engine.step(x, y, learners=learners, teacher=teacher), len(y), learners)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
