"""A batch in parts is the batch: its loss, its update, on every executor."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from engine_cases import CPU, optimizer_of, student
from fake_streams import FakeStreams
from torch import Tensor, nn

from dml_fast.engine import (
    Cohort,
    Engine,
    Graph,
    Precision,
    Sequential,
    Streams,
    Student,
    Threads,
)
from dml_fast.engine.averaging import Average
from dml_fast.engine.executor import StepResult
from dml_fast.engine.teacher import Teacher
from dml_fast.errors import UserError
from dml_fast.loss import mutual_loss


def nets(count: int = 3, dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    torch.manual_seed(3)
    return [
        nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 5)).to(dtype)
        for _ in range(count)
    ]


def engine_of(models: list[nn.Module], **options: Any) -> Engine:
    return Engine(Cohort(models, optimizers=optimizer_of), **options)


def rows(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(64, 6, generator=g, dtype=dtype), torch.randint(5, (64,), generator=g)


def unlabelled(y: Tensor) -> Tensor:
    """Of four parts one has no label, and one has a few."""
    return y.masked_fill((torch.arange(64) < 16) | (torch.arange(64) > 50), -100)


def soft(y: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.rand(64, 5, generator=g, dtype=torch.float64).softmax(1)


WEIGHTS = torch.tensor([2.0, 0.0, 0.5, 1.0, 30.0])
TAUGHT = {"learners": (1, 2), "teacher": 0}
WHOLE: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "dml": ({"label_smoothing": 0.1, "clip_norm": 0.3}, None, {}),
    "rows without a label": ({"temperature": 2.0}, unlabelled, {"kl_scale": 0.5}),
    "no label at all": ({}, lambda y: torch.full_like(y, -100), {}),
    "probabilities": ({}, soft, {}),
    "class weights": ({"class_weight": WEIGHTS}, unlabelled, {}),
    "class weights of probabilities": ({"class_weight": WEIGHTS}, soft, {}),
    "several labels": ({"distribution": "bernoulli"}, lambda y: (soft(y) > 0.2).double(), {}),
    "dml_e": ({"method": "dml_e", "peer_reduction": "sum"}, None, {}),
    "independent": ({"method": "independent"}, unlabelled, {}),
    "distill": ({"method": "distill", "temperature": 2.0}, unlabelled, TAUGHT),
}


@pytest.mark.parametrize(("options", "change", "step"), WHOLE.values(), ids=WHOLE.keys())
def test_four_parts_of_16_rows_are_a_batch_of_64(options: Any, change: Any, step: Any) -> None:
    mine = nets(dtype=torch.float64)
    whole = copy.deepcopy(mine)
    engines = engine_of(mine, parts=4, **options), engine_of(whole, **options)
    for seed in range(3):
        x, y = rows(seed, torch.float64)
        y = y if change is None else change(y)
        found, expected = (engine.step(x, y, **step) for engine in engines)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-12, atol=1e-12)
    for a, b in zip(mine, whole, strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def test_fixed_teachers_and_averages_teach_each_part() -> None:
    """Averages move once a step, after the last part."""
    precision = Precision(CPU)
    fixed = nets(1, torch.float64)[0].requires_grad_(False)
    fixed[0].weight.mul_(2)  # type: ignore[operator]
    for taught in ({"teachers": [Teacher(fixed, precision)]}, {"teach_with": "ema"}):
        made = []
        for parts in (4, 1):
            models = nets(dtype=torch.float64)
            averages = [Average(model, 0.9) for model in models]
            students = [
                Student(m, optimizer_of(m), precision, average=average)
                for m, average in zip(models, averages, strict=True)
            ]
            engine = Engine(Cohort(students), parts=parts, **taught)  # type: ignore[arg-type]
            for seed in range(3):
                x, y = rows(seed, torch.float64)
                result = engine.step(x, unlabelled(y))
            tensors = [t for m in models for t in m.state_dict().values()]
            tensors += [t for a in averages for t in a.model.state_dict().values()]
            made.append([result.losses, result.kl, *tensors])
        for a, b in zip(*made, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_logits_of_several_tokens_and_views_are_cut_by_their_rows() -> None:
    mine = nets(dtype=torch.float64)
    whole = copy.deepcopy(mine)
    g = torch.Generator().manual_seed(0)
    views = [torch.randn(8, 3, 6, generator=g, dtype=torch.float64) for _ in mine]
    y = torch.randint(5, (8, 3), generator=g).masked_fill(torch.rand(8, 3, generator=g) < 0.4, -100)
    found, expected = (
        engine_of(models, parts=parts).step(views, y, views=True)
        for models, parts in ((mine, 4), (whole, 1))
    )
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-12, atol=0)
    for a, b in zip(mine, whole, strict=True):
        torch.testing.assert_close(a[0].weight, b[0].weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_it_is_a_plain_loop_over_parts_bit_for_bit(clip: float | None) -> None:
    mine = nets()
    theirs = copy.deepcopy(mine)
    engine = engine_of(mine, parts=4, clip_norm=clip)
    optimizers = [optimizer_of(model) for model in theirs]
    for seed in range(3):
        x, y = rows(seed)
        engine.step(x, y)
        for xs, ys in zip(x.split(16), y.split(16), strict=True):
            losses = mutual_loss([m(xs) for m in theirs], ys, reduction="sum")
            assert isinstance(losses, Tensor)
            (losses.sum() / 64).backward()
        for model, optimizer in zip(theirs, optimizers, strict=True):
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(mine, theirs, strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(p, q)


def normed() -> Cohort:
    torch.manual_seed(0)
    return Cohort(
        [
            student(
                nn.Sequential(
                    nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2 * k), nn.Linear(8, 5)
                )
            )
            for k in range(3)
        ]
    )


@pytest.mark.parametrize("kind", [Threads, Streams, Graph])
def test_every_executor_gives_the_numbers_of_sequential(kind: Any) -> None:
    """Of networks with BatchNorm and dropout, with rows without a label; a bad part skips all."""
    found = []
    for executor in (Sequential, kind):
        made = normed()
        if executor is Threads:
            chosen = Threads(3, workers=3, threads_each=1)
        else:
            chosen = executor(*() if executor is Sequential else (CPU, FakeStreams(made)))
        engine = Engine(made, parts=4, clip_norm=0.5, executor=chosen)
        torch.manual_seed(5)
        results: list[StepResult] = []
        for seed in range(4):
            x, y = rows(seed)
            if seed == 2:
                x[20] = torch.nan
            results.append(engine.step(x, unlabelled(y), kl_scale=0.3 * seed))
            assert results[-1].skipped.all() == (seed == 2)
        state = [t for one in made for t in one.model.state_dict().values()]
        found.append([*state, *(t for r in (results[1], results[3]) for t in r)])
        norm = made.students[0].model[1]
        assert norm.num_batches_tracked == 3 * 4
    for a, b in zip(*found, strict=True):  # a graph's weight is a tensor
        torch.testing.assert_close(b, a.to(b.dtype), rtol=1e-6, atol=1e-7)
        assert kind is Graph or torch.equal(b, a)


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 4), nn.Linear(4, 5)

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return features, self.head(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.features_and_logits(x)[1]


def test_a_loss_on_features_is_the_mean_over_the_parts() -> None:
    def made() -> list[nn.Module]:
        torch.manual_seed(0)
        return [Embedding().double() for _ in range(2)]

    def spread(features: Tensor, target: Tensor) -> Tensor:
        assert len(features) == len(target) == 16
        return features.var()

    mine, theirs = made(), made()
    options = {"feature_loss": spread, "feature_weight": 0.5, "method": "independent"}
    x, y = rows(0, torch.float64)
    found = engine_of(mine, parts=4, **options).step(x, y)
    for k, model in enumerate(theirs):
        extra = torch.stack([model.body(part).var() for part in x.split(16)]).mean()
        ce = nn.functional.cross_entropy(model(x), y)
        torch.testing.assert_close(found.extra[k], extra)
        torch.testing.assert_close(found.losses[k], ce + 0.5 * extra)
        optimizer = optimizer_of(model)
        (ce + 0.5 * extra).backward()
        optimizer.step()
        for p, q in zip(mine[k].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_parts_that_cannot_be_are_refused() -> None:
    x, y = rows(0)
    for make, words in (
        (lambda: engine_of(nets(), parts=0), "parts is 0: give a whole number of at least 1"),
        (
            lambda: engine_of(nets(), parts=2, update="alternating"),
            "parts is 2 and update is alternating.*: give parts=1, or simultaneous",
        ),
        (
            lambda: engine_of(nets(), parts=2, small_loss=0.3),
            r"parts is 2 and small_loss 0\.3, .*: leave out one or the other",
        ),
        (
            lambda: engine_of(nets(), parts=5).step(x, y),
            "a batch of 64 rows does not divide into 5 equal parts: give a multiple of 5 rows",
        ),
        (
            lambda: engine_of(nets(), parts=2).step((x, x[:3]), y),
            r"the inputs hold a tensor \(3, 6\) beside a target of 64 rows",
        ),
    ):
        with pytest.raises(UserError, match=words):
            make()
