"""Streams and the captured graph on a real GPU: the numbers, the waits, the memory.

Written without one; skipped where there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_cases import Trap, batch, optimizer_of
from torch import Tensor, nn

from dml_fast.engine import Engine
from dml_fast.engine.averaging import Average
from dml_fast.engine.choice import make_executor, pick
from dml_fast.engine.cohort import Cohort
from dml_fast.engine.precision import Precision
from dml_fast.engine.student import Student
from dml_fast.models import create_model
from dml_fast.training.meter import Meter

pytestmark = pytest.mark.gpu

KINDS = ["streams", "graph"]


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def engine(
    executor: str,
    dtype: torch.dtype | None = None,
    optimizer: str = "sgd",
    models: list[nn.Module] | None = None,
    ema: float = 0.0,
    **options: Any,
) -> Engine:
    cuda = torch.device("cuda")
    if models is None:
        models = []
        for k, arch in enumerate(("resnet8", "wrn_10_1_drop0.3", "resnet8")):
            torch.manual_seed(k)
            models.append(create_model(arch, num_classes=5, in_channels=1, image_size=(8, 8)))
    students = [
        Student(
            m,
            optimizer_of(m, optimizer),
            Precision(cuda, dtype),
            average=Average(m, ema) if ema else None,
        )
        for m in (m.to(cuda) for m in models)
    ]
    return Engine(
        Cohort(students), executor=make_executor(executor, len(students), cuda), **options
    )


def run(made: Engine, steps: int, lr: float = 0.01) -> Tensor:
    torch.manual_seed(9)
    losses = []
    for seed in range(steps):
        x, y = (t.cuda() for t in batch(seed, torch.float32))
        if seed % 10 == 7:  # a short batch
            x, y = x[:4], y[:4]
        for one in made.cohort:
            one.set_lr(lr / (1 + seed / 10))
        losses.append(made.step(x, y, kl_scale=min(1.0, seed / 20)).losses)
    return torch.stack(losses)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_steps_are_those_of_sequential(kind: str, optimizer: str) -> None:
    reference, other = engine("sequential", optimizer=optimizer), engine(kind, optimizer=optimizer)
    lr = 0.01 if optimizer == "sgd" else 1e-4
    expected, found = run(reference, 50, lr), run(other, 50, lr)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)  # roundings grow over steps
    for mine, theirs in zip(other.cohort, reference.cohort, strict=True):
        for a, b in zip(mine.model.buffers(), theirs.model.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_follows(kind: str, dtype: torch.dtype) -> None:
    expected, found = run(engine("sequential", dtype), 10), run(engine(kind, dtype), 10)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_that_are_left_out_are_those_of_sequential(kind: str) -> None:
    options = {"small_loss": 0.4, "prior": torch.arange(5.0).neg()}
    expected, found = (run(engine(name, **options), 10, 0.01) for name in ("sequential", kind))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_averages_teach_as_with_sequential(kind: str) -> None:
    made = [engine(name, ema=0.9, teach_with="ema") for name in ("sequential", kind)]
    expected, found = (run(one, 10, 0.01) for one in made)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    for mine, theirs in zip(*(one.cohort for one in made), strict=True):
        for a, b in zip(
            mine.network("ema").parameters(), theirs.network("ema").parameters(), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["sequential", *KINDS])
@pytest.mark.parametrize("small_loss", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_step_never_waits_for_the_gpu(
    kind: str, dtype: torch.dtype | None, small_loss: float
) -> None:
    prior = torch.zeros(5) if small_loss else None
    ema = 0.9 if small_loss else 0.0
    teach_with = "ema" if small_loss else "student"
    made = engine(kind, dtype, small_loss=small_loss, prior=prior, ema=ema, teach_with=teach_with)
    meter = Meter(3, torch.device("cuda"))
    x, y = (t.cuda() for t in batch(0, torch.float32))

    def step() -> None:
        for one in made.cohort:
            one.set_lr(0.01)
        meter.add(made.step(x, y), len(y), (0, 1, 2))

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["sequential", *KINDS])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_overflow_at_the_first_step(kind: str, optimizer: str) -> None:
    made = engine(kind, torch.float16, optimizer)
    made.cohort.students[1].scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    before = [p.detach().clone() for p in made.cohort.students[1].parameters]
    x, y = (t.cuda() for t in batch(0, torch.float32))
    assert made.step(x, y).skipped.tolist() == [False, True, False]
    for now, then in zip(made.cohort.students[1].parameters, before, strict=True):
        assert torch.equal(now, then)
    assert made.cohort.students[1].scaler.get_scale() == 2.0**39
    for _ in range(30):
        result = made.step(x, y)
    assert not result.skipped.any()
    assert torch.isfinite(result.losses).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_batch_leaves_no_trace_in_a_replay(kind: str) -> None:
    torch.manual_seed(0)
    models = [Trap(), create_model("resnet8", num_classes=5, in_channels=1, image_size=(8, 8))]
    made = engine(kind, models=models)
    x, y = (t.cuda() for t in batch(0, torch.float32))
    made.step(x, y)
    before = {name: t.clone() for name, t in models[0].state_dict().items()}
    poisoned = x.clone()
    poisoned[0, 0, 0, 0] = 99.0
    assert made.step(poisoned, y).skipped.tolist() == [True, False]
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, before[name]), name


class Waits(nn.Module):
    """Waits for a number from the device in its forward pass, as many real networks do."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.classifier = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(x.flatten(1), 0.2, self.training)
        return self.classifier(x * min(2.0, x.abs().max().item()))  # type: ignore[no-any-return]


def test_a_capture_that_cuda_breaks_off_leaves_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    expected = run(engine("sequential", models=[Waits(1), Waits(2)]), 20)
    made = engine("graph", models=[Waits(1), Waits(2)])
    with caplog.at_level("INFO"):
        found = run(made, 20)
    assert "the step cannot be captured" in caplog.text
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)  # dropout's draws as well


def test_memory_does_not_grow_over_a_thousand_replays() -> None:
    made = engine("graph", torch.bfloat16)
    x, y = (t.cuda() for t in batch(0, torch.float32))
    for _ in range(10):
        made.step(x, y)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(1000):
        made.step(x, y)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def test_the_graph_is_replayed_and_auto_keeps_one() -> None:
    made = engine("auto", torch.bfloat16)
    x, y = (t.cuda() for t in batch(0, torch.float32))
    before = [p.detach().clone() for s in made.cohort for p in s.parameters]
    chosen = pick(made, x, y, learners=(0, 1, 2))
    for now, then in zip((p for s in made.cohort for p in s.parameters), before, strict=True):
        assert torch.equal(now, then)
    assert chosen.name in ("sequential", "streams", "graph")
    graph = engine("graph")
    graph.step(x, y)
    assert graph.executor._captured is not None  # type: ignore[attr-defined]
