"""The average of a student's weights, and averages as teachers, against plain loops."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from engine_cases import CPU, Trap, assert_same, batch, networks, sgd
from state_cases import assert_equal, cohort, state_of
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dml_fast.engine import Cohort, Engine, Precision, Student
from dml_fast.engine.averaging import Average
from dml_fast.errors import UserError


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Return torch's own average, which starts as the model."""
    found = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    found.update_parameters(model)
    return found


def with_averages(models: list[nn.Module], decay: float = 0.9, **options: str) -> Engine:
    students = [
        Student(model, sgd(model), Precision(CPU), average=Average(model, decay))
        for model in models
    ]
    return Engine(Cohort(students), **options)  # type: ignore[arg-type]


def test_an_average_is_torchs_bit_for_bit_and_changes_no_student() -> None:
    models = networks(2, torch.float32)
    alone = copy.deepcopy(models)
    theirs = [averaged(model, 0.9) for model in models]
    engine, plain = with_averages(models), Engine(Cohort(alone, optimizers=sgd))
    for seed in range(4):
        x, y = batch(seed, torch.float32)
        engine.step(x, y)
        plain.step(x, y)
        for model, average in zip(models, theirs, strict=True):
            average.update_parameters(model)
    for student, other, average in zip(engine.cohort, alone, theirs, strict=True):
        assert_same(student.model, other)
        state = average.module.state_dict()
        for name, tensor in student.network("ema").state_dict().items():
            counts = name.endswith("num_batches_tracked")  # torch means whole numbers
            assert torch.equal(tensor, torch.tensor(4) if counts else state[name]), name
            assert counts or not torch.equal(tensor, student.model.state_dict()[name])
        assert not student.network("ema").training


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_averages_teach_as_in_a_plain_loop(reduction: str) -> None:
    models = networks(3)
    plain = copy.deepcopy(models)
    averages = [averaged(model, 0.8) for model in plain]
    optimizers = [sgd(model) for model in plain]
    engine = with_averages(models, 0.8, teach_with="ema", peer_reduction=reduction)
    for seed in range(3):
        x, y = batch(seed)
        result = engine.step(x, y)
        with torch.no_grad():  # batch statistics, and copies, whose running ones do not matter
            means = [copy.deepcopy(a.module).train()(x).softmax(1) for a in averages]
        for k, (model, optimizer) in enumerate(zip(plain, optimizers, strict=True)):
            model.train()
            log_p = model(x).log_softmax(1)
            terms = [(p * (p.log() - log_p)).sum(1).mean() for j, p in enumerate(means) if j != k]
            kl = torch.stack(terms).sum() / (len(terms) if reduction == "mean" else 1)
            loss = F.nll_loss(log_p, y) + kl
            torch.testing.assert_close(result.losses[k], loss.detach().to(result.losses))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for model, average in zip(plain, averages, strict=True):
            average.update_parameters(model)
    for student, model, average in zip(engine.cohort, plain, averages, strict=True):
        assert_same(student.model, model, 1e-9)
        for name, tensor in student.network("ema").named_parameters():
            torch.testing.assert_close(tensor, average.module.get_parameter(name))


def test_a_skipped_step_brings_the_average_closer_to_weights_that_stay() -> None:
    torch.manual_seed(0)
    models: list[nn.Module] = [Trap(), Trap()]
    engine = with_averages(models)
    x, y = batch(0, torch.float32)
    engine.step(x, y)
    average = averaged(models[0], 0.9)
    average.module.load_state_dict(engine.cohort.students[0].network("ema").state_dict())
    x[0, 0, 0, 0] = 99.0
    assert engine.step(x, y).skipped.all()
    average.update_parameters(models[0])
    for name, tensor in engine.cohort.students[0].network("ema").named_parameters():
        assert torch.equal(tensor, average.module.get_parameter(name))


def test_kept_gradients_move_no_average_until_the_update() -> None:
    engine = Engine(cohort(2, ema=0.9))
    before = copy.deepcopy(engine.cohort.students[0].network("ema").state_dict())
    engine.step(*batch(0, torch.float32), accumulate=True)
    assert_equal(dict(engine.cohort.students[0].network("ema").state_dict()), dict(before))
    engine.step(*batch(1, torch.float32))
    after = engine.cohort.students[0].network("ema").state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_a_state_has_the_average_and_goes_on_with_it() -> None:
    straight, split = (Engine(cohort(2, ema=0.9), teach_with="ema") for _ in range(2))
    for seed in range(4):
        straight.step(*batch(seed, torch.float32))
    for seed in range(2):
        split.step(*batch(seed, torch.float32))
    other = Engine(cohort(2, ema=0.9), teach_with="ema")
    other.load_state_dict(copy.deepcopy(split.state_dict()))
    for seed in range(2, 4):
        other.step(*batch(seed, torch.float32))
    assert_equal(state_of(other.cohort), state_of(straight.cohort))
    with pytest.raises(UserError, match="keeps no average, and its state has one: keep"):
        cohort(2).load_state_dict(state_of(straight.cohort))
    with pytest.raises(UserError, match="keeps an average, and its state has none: keep"):
        cohort(2, ema=0.9).load_state_dict(state_of(cohort(2)))


@pytest.mark.parametrize("decay", [0, 1, 1.5, -0.1, float("nan"), "0.9", True, None])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(UserError, match=r"ema is .*: give a number above 0 and below 1"):
        Average(nn.Linear(2, 2), decay)


def test_what_cannot_teach_by_averages_is_refused() -> None:
    def refuse(match: str, ema: float = 0.9, **options: object) -> None:
        with pytest.raises(UserError, match=match):
            Engine(cohort(2, ema=ema), teach_with="ema", **options)  # type: ignore[arg-type]

    refuse("goes with method dml, and method is distill: choose dml", method="distill")
    refuse("goes with method dml, and method is dml_e", method="dml_e")
    refuse("goes with update simultaneous, and update is alternating", update="alternating")
    refuse("there are 1 fixed teachers: leave out", teachers=[nn.Identity()])
    refuse(r"weights is ema and a student \(ResNet\) keeps no average", ema=0.0)
    with pytest.raises(UserError, match="teach_with is 'avg', which is none of student, ema"):
        Engine(cohort(2), teach_with="avg")
    with pytest.raises(UserError, match="weights is 'best', which is none of student, ema"):
        cohort(1).students[0].network("best")


def test_a_network_that_cannot_be_copied_is_named() -> None:
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"\(Linear\) has no average, .* be copied \(cannot pickle"):
        Average(model, 0.9)
