"""Bad options and objects are refused when the engine's objects are made, in one sentence."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import CPU, batch, engine_of, networks, sgd, student
from torch import Tensor, nn

from dml_fast.engine import Cohort, Engine, Graph, Precision, Streams, Student, Threads
from dml_fast.engine.choice import make_executor
from dml_fast.engine.optim import lr_factor, make_optimizer
from dml_fast.errors import UserError, brief, check_choice
from dml_fast.loss import MIHashLoss

NAN, INF = math.nan, math.inf
MISSPELT = [
    ({"method": "Independent"}, "method is 'Independent', .*did you mean independent?"),
    ({"method": "kd"}, "method is 'kd', .*dml, dml_e, independent, distill: give one of these"),
    ({"method": "dml-e"}, "did you mean dml_e"),
    ({"method": None}, "method is None"),
    ({"update": "alternate"}, "update is 'alternate', .*did you mean alternating?"),
    ({"peer_reduction": "avg"}, "peer_reduction is 'avg'"),
    ({"executor": "threads"}, r"executor is 'threads': give an object, such as Threads\(2\)"),
    ({"executor": Threads}, "executor is"),
]
NUMBERS = [
    ("temperature", (0, -1, NAN, INF, "2", None, [1])),
    ("label_smoothing", (-0.1, 1.5, NAN, "0.1", None)),
    ("kl_weight", (NAN, INF, -INF, "1", None, torch.ones(2), [1.0])),
    ("feature_weight", (-1, NAN, INF, "1", None)),
    ("small_loss", (-0.1, 1, NAN, "0.1", None)),
]


@pytest.mark.parametrize(("options", "message"), MISSPELT, ids=[str(x) for x, _ in MISSPELT])
def test_a_misspelt_option_is_not_taken_for_another(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        engine_of(networks(2), **options)


@pytest.mark.parametrize(("name", "values"), NUMBERS, ids=[name for name, _ in NUMBERS])
def test_a_number_out_of_range_is_refused_at_once(name: str, values: tuple[Any, ...]) -> None:
    models = networks(2)
    for value in values:
        with pytest.raises(UserError, match=name):
            engine_of(models, **{name: value})


def test_numbers_of_numpy_and_tensors_are_taken() -> None:
    models = networks(2)
    engine_of(models, temperature=np.float32(2), label_smoothing=np.float64(0.1), kl_weight=2)
    engine = engine_of(models, kl_weight=torch.tensor(0.5))
    assert engine.step(*batch(0), kl_scale=0.5).losses.isfinite().all()


def test_what_is_no_cohort_is_refused() -> None:
    students = [student(m) for m in networks(2)]
    with pytest.raises(UserError, match=r"is a list of length 2: give Cohort\(students\)"):
        Engine(students)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="student 1 of a cohort is a ResNet: give networks and"):
        Cohort([students[0], students[1].model])  # type: ignore[list-item]
    with pytest.raises(UserError, match="no students"):
        Cohort([])
    with pytest.raises(UserError, match="students of a cohort are a ResNet: give a list"):
        Cohort(students[0].model, optimizers=sgd)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="two students of a cohort have one model"):
        Cohort([students[0], student(students[0].model)])
    models = networks(2, torch.float32)
    both = torch.optim.SGD([p for m in models for p in m.parameters()], lr=0.1, fused=True)
    with pytest.raises(UserError, match="two students of a cohort have one optimizer"):
        Cohort([Student(model, both, Precision(CPU)) for model in models])
    with pytest.raises(UserError, match=r"\(ResNet\) holds none of its model's parameters: build"):
        Student(models[0], sgd(models[1]), Precision(CPU))


def test_what_is_no_student_is_refused() -> None:
    model = networks(1, torch.float32)[0]
    optimizer, precision = sgd(model), Precision(CPU)
    for wrong, message in (
        ((optimizer, model, precision), "model of a student is a SGD"),
        ((model, precision, optimizer), "optimizer of a student is a Precision"),
        ((model, optimizer, "bf16"), "precision of a student is 'bf16'"),
    ):
        with pytest.raises(UserError, match=message):
            Student(*wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="on cpu and its precision is for cuda:0: move the model"):
        Student(model, optimizer, Precision(torch.device("cuda:0")))


def test_a_precision_is_of_a_device_and_a_half_type() -> None:
    with pytest.raises(UserError, match=r"device of a Precision is 'cpu': give torch\.device"):
        Precision("cpu")  # type: ignore[arg-type]
    for dtype in (torch.float32, torch.float64, "bf16"):
        with pytest.raises(UserError, match=r"dtype of a Precision is .*torch\.bfloat16"):
            Precision(CPU, dtype)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"amp_dtype is 'bf61', .*did you mean bf16"):
        Precision.choose(True, "bf61", CPU)


def test_misspelt_algorithms_schedules_and_executors() -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    with pytest.raises(UserError, match=r"algorithm is 'adam', .*did you mean adamw"):
        make_optimizer(parameters, algorithm="adam", lr=0.1)
    for name in ("lr", "momentum", "weight_decay"):
        for value in (NAN, -1, "0.1"):
            with pytest.raises(UserError, match=f"{name} is "):
                make_optimizer(parameters, **{"algorithm": "sgd", "lr": 0.1, name: value})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no parameters"):
        make_optimizer([], algorithm="sgd", lr=0.1)
    with pytest.raises(UserError, match=r"schedule is 'cosin', .*did you mean cosine"):
        lr_factor("cosin", 1, 2, 0)
    with pytest.raises(UserError, match=r"executor is 'thread', .*did you mean threads"):
        make_executor("thread", 2, CPU)
    for kind in (Streams, Graph):
        for device in (CPU, "cuda"):
            with pytest.raises(UserError, match="streams and graphs need a GPU"):
                kind(device)  # type: ignore[arg-type]
    for wrong in ((0,), (2, 0), (2, 1, -1), (1.5,), ("2",)):
        with pytest.raises(UserError, match="give a whole number of at least 1"):
            Threads(*wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("learners", [(0, 2), (-1,), (0, 0), ("0",), 0, ([0],)])
@pytest.mark.parametrize("update", ["simultaneous", "alternating"])
def test_learners_that_do_not_exist(learners: Any, update: str) -> None:
    with pytest.raises(UserError, match="give different numbers from 0 to 1"):
        engine_of(networks(2), update=update).step(*batch(0), learners=learners)


def test_a_teacher_that_does_not_exist_or_is_missing() -> None:
    for teacher in (0, 2, -1):
        with pytest.raises(UserError, match=f"the teacher is {teacher}: give a number from 0 to 1"):
            engine_of(networks(2)).step(*batch(0), learners=(0,), teacher=teacher)
    with pytest.raises(UserError, match="distill and several students learn without a teacher"):
        engine_of(networks(2), method="distill").step(*batch(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"feature_loss": MIHashLoss(), "feature_weight": 1.0},
            r"\(ResNet\) gives no features: leav",
        ),
        ({"feature_loss": MIHashLoss()}, "feature_weight is 0: give a weight above 0"),
        ({"feature_weight": 0.5}, "feature_weight is 0.5 and there is no feature_loss: give one"),
        (
            {"feature_loss": MIHashLoss, "feature_weight": 1.0},
            "feature_loss is .*: give a function",
        ),
        (
            {"feature_loss": "mihash", "feature_weight": 1.0},
            "feature_loss is 'mihash': give a func",
        ),
    ],
)
def test_a_loss_on_features_is_a_function_with_a_weight(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        engine_of(networks(2), **options)


def test_an_executor_that_alternating_updates_do_not_use_is_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("dml_fast"), "propagate", True)
    caplog.set_level(logging.INFO)
    engine_of(networks(2), update="alternating", executor=Threads(2))
    assert "the executor threads" in caplog.text and "is not used" in caplog.text


class Words(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.words, self.classifier = layer, nn.Linear(4, 5)

    def forward(self, ids: Tensor) -> Tensor:
        words: Tensor = self.words(ids)
        out: Tensor = self.classifier(words.mean(1) if words.dim() == 3 else words)
        return out


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_are_refused_when_the_student_is_made(kind: Any) -> None:
    with pytest.raises(UserError, match=r"layer 'words' .*build it with sparse=False"):
        student(Words(kind(10, 4, sparse=True)))
    with pytest.raises(UserError, match=f"layer '{kind.__name__}' "):
        student(kind(10, 4, sparse=True))


def test_sparse_gradients_of_a_layer_of_ones_own_are_named_in_the_first_step() -> None:
    model = Words(nn.Embedding(10, 4))
    engine = engine_of([model], method="independent")
    model.words.sparse = True  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"student \(Words\) has sparse gradients"):
        engine.step(torch.randint(10, (6, 3)), torch.randint(5, (6,)))


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda z: {"scores": z, "hidden": z}, "a dict with the keys 'scores', 'hidden'"),
        (lambda z: (z, z), "a tuple of length 2"),
        (lambda z: None, "None"),
    ],
)
@pytest.mark.parametrize("update", ["simultaneous", "alternating"])
def test_a_model_that_returns_no_logits(wrap: Any, said: str, update: str) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(64, 5).double()

        def forward(self, x: Tensor) -> Any:
            return wrap(self.body(x.flatten(1)))

    with pytest.raises(UserError) as refused:
        engine_of([Wrapped(), Wrapped()], update=update).step(*batch(0))
    assert f"(Wrapped) returned {said} in place of logits (N, C)" in str(refused.value)
    assert len(str(refused.value)) < 300
    one = student(Wrapped())
    with pytest.raises(UserError, match="in place of logits"):
        one.predict(batch(0)[0])


def test_nearest_names_and_short_values() -> None:
    check_choice("name", "b", "abc")
    with pytest.raises(UserError) as refused:
        check_choice("name", "x" * 500, "abc")
    assert len(str(refused.value)) < 200
    assert brief("x" * 500) == repr("x" * 77 + "...")
    assert brief(torch.zeros(3, 4)) == "a Tensor of shape (3, 4)"
    assert brief(np.zeros(3)) == "a ndarray of shape (3,)"
    assert brief(object()) == "an object"
