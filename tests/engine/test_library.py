"""The engine in one's own loop: networks, any optimizers, accumulation, clipping, any inputs."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_cases import CPU
from fake_streams import FakeStreams
from torch import Tensor, nn

from dml_fast.engine import Cohort, Engine, Graph, Sequential, Threads
from dml_fast.errors import UserError
from dml_fast.loss import mutual_loss

ALL = [
    kind
    for _, kind in inspect.getmembers(torch.optim, inspect.isclass)
    if issubclass(kind, torch.optim.Optimizer)
    and kind not in (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)
]


def nets(count: int = 2) -> list[nn.Module]:
    torch.manual_seed(3)
    return [
        nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 5, bias=False))
        for _ in range(count)
    ]


def rows(seed: int, count: int = 16) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=g), torch.randint(5, (count,), generator=g)


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def plain_step(
    models: list[nn.Module],
    optimizers: list[torch.optim.Optimizer],
    batches: list[tuple[Tensor, Tensor]],
    clip: float | None = None,
) -> None:
    for x, y in batches:
        losses = mutual_loss([m(x) for m in models], y)
        assert isinstance(losses, Tensor)
        losses.sum().backward()
    for model, optimizer in zip(models, optimizers, strict=True):
        if len(batches) > 1:
            for p in model.parameters():
                assert p.grad is not None
                p.grad.mul_(1 / len(batches))
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def assert_equal(mine: list[nn.Module], theirs: list[nn.Module], tolerance: float = 0.0) -> None:
    for a, b in zip(mine, theirs, strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ALL, ids=[kind.__name__ for kind in ALL])
def test_any_optimizer_gives_the_bits_of_a_plain_loop_and_skips_a_bad_step(kind: Any) -> None:
    mine = nets()
    theirs = copy.deepcopy(mine)
    engine = Engine(Cohort(mine, optimizers=lambda net: kind(net.parameters(), lr=0.01)))
    optimizers = [kind(net.parameters(), lr=0.01) for net in theirs]
    bad = rows(9)[0] * torch.nan, rows(9)[1]
    assert engine.step(*bad).skipped.all()  # the very first, before an optimizer has any state
    for seed in range(3):
        assert not engine.step(*rows(seed)).skipped.any()
        assert engine.step(*bad).skipped.all()
        plain_step(theirs, optimizers, [rows(seed)])
    assert_equal(mine, theirs)


def test_a_fused_sgd_skips_its_first_step_too() -> None:
    """Torch's own would start its momentum from memory that nobody wrote."""
    mine = nets()
    theirs = copy.deepcopy(mine)

    def fused(net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)

    engine = Engine(Cohort(mine, optimizers=fused))
    x, y = rows(0)
    assert engine.step(x * torch.nan, y).skipped.all()
    optimizers = [fused(net) for net in theirs]
    for seed in range(3):
        engine.step(*rows(seed))
        plain_step(theirs, optimizers, [rows(seed)])
    assert_equal(mine, theirs)


@pytest.mark.parametrize("executor", [Sequential(), Threads(2)], ids=str)
def test_accumulated_batches_are_one_batch(executor: Any) -> None:
    mine = nets()
    theirs, whole = copy.deepcopy(mine), copy.deepcopy(mine)
    engine = Engine(Cohort(mine, optimizers=sgd), clip_norm=0.5, executor=executor)
    optimizers, of_whole = [*map(sgd, theirs)], [*map(sgd, whole)]
    for seed in range(3):
        x, y = rows(seed, 64)
        parts = [*zip(x.split(16), y.split(16), strict=True)]
        for part in parts[:-1]:
            before = copy.deepcopy(mine)
            assert not engine.step(*part, accumulate=True).skipped.any()
            assert_equal(mine, before)
        engine.step(*parts[-1])
        plain_step(theirs, optimizers, parts, clip=0.5)
        plain_step(whole, of_whole, [(x, y)], clip=0.5)
    assert_equal(mine, theirs)
    assert_equal(mine, whole, 1e-5)


def test_one_bad_batch_of_several_skips_their_update_and_all_statistics() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
    engine = Engine(Cohort([net], optimizers=sgd), method="independent")
    engine.step(*rows(0))
    before = copy.deepcopy(net.state_dict())
    x, y = rows(1)
    engine.step(x, y, accumulate=True)
    engine.step(x * torch.nan, y, accumulate=True)
    assert engine.step(x, y).skipped.all()
    for name, now in net.state_dict().items():
        torch.testing.assert_close(now, before[name], rtol=0, atol=0)
    assert not engine.step(x, y).skipped.any()


@pytest.mark.parametrize("clip", [0.01, 100.0])
def test_a_clipped_norm_is_that_of_torch(clip: float) -> None:
    mine = nets(3)
    theirs = copy.deepcopy(mine)
    engine = Engine(Cohort(mine, optimizers=[*map(sgd, mine)]), clip_norm=clip)
    optimizers = [*map(sgd, theirs)]
    for seed in range(3):
        engine.step(*rows(seed))
        plain_step(theirs, optimizers, [rows(seed)], clip)
    assert_equal(mine, theirs)


def test_schedulers_groups_and_hooks_are_torchs_own() -> None:
    def grouped(net: nn.Module) -> torch.optim.Optimizer:
        first, last = net[0], net[2]  # type: ignore[index]
        groups = [{"params": first.parameters(), "lr": 0.3}, {"params": last.parameters()}]
        return torch.optim.AdamW(groups, lr=0.01, fused=True)

    mine = nets()
    theirs = copy.deepcopy(mine)
    engine = Engine(Cohort(mine, optimizers=grouped))
    optimizers = [grouped(net) for net in theirs]
    ours = [torch.optim.lr_scheduler.StepLR(s.optimizer, 1, 0.5) for s in engine.cohort]
    others = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in optimizers]
    seen: list[str] = []
    first = engine.cohort.students[0].optimizer
    first.register_step_pre_hook(lambda *_: seen.append("before"))
    first.register_step_post_hook(lambda *_: seen.append("after"))
    for seed in range(3):
        engine.step(*rows(seed))
        plain_step(theirs, optimizers, [rows(seed)])
        for scheduler in ours + others:
            scheduler.step()
    assert_equal(mine, theirs)
    assert seen == ["before", "after"] * 3


def test_a_state_goes_on_where_it_was() -> None:
    whole, begun = nets(), nets()
    engine = Engine(Cohort(whole, optimizers=sgd))
    part = Engine(Cohort(begun, optimizers=sgd))
    scheduler = torch.optim.lr_scheduler.StepLR(part.cohort.students[0].optimizer, 2, 0.1)
    other = torch.optim.lr_scheduler.StepLR(engine.cohort.students[0].optimizer, 2, 0.1)
    for seed in range(5):
        engine.step(*rows(seed))
        other.step()
    for seed in range(3):
        part.step(*rows(seed))
        scheduler.step()
    state = copy.deepcopy(part.state_dict()), scheduler.state_dict()
    fresh = nets()
    after = Engine(Cohort(fresh, optimizers=sgd))
    later = torch.optim.lr_scheduler.StepLR(after.cohort.students[0].optimizer, 2, 0.1)
    after.load_state_dict(state[0])
    later.load_state_dict(state[1])
    for seed in range(3, 5):
        after.step(*rows(seed))
        later.step()
    assert_equal(fresh, whole)
    after.step(*rows(0), accumulate=True)
    with pytest.raises(UserError, match="take it after a step without accumulate"):
        after.state_dict()


class Reader(nn.Module):
    """Takes token ids and a mask, as a text model does, and returns an object."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.words, self.head, self.wrap = nn.Embedding(9, 6), nn.Linear(6, 5), wrap

    def forward(self, ids: Tensor, mask: Tensor, scale: float = 1.0) -> Any:
        words = self.words(ids) * mask[..., None] * scale
        return self.wrap(self.head(words.sum(1) / mask.sum(1, keepdim=True)))


class Output(dict[str, Any]):
    """As Hugging Face's ModelOutput: a mapping whose entries are attributes too."""

    __getattr__ = dict.__getitem__


@pytest.mark.parametrize(
    "wrap",
    [
        lambda z: z,
        lambda z: SimpleNamespace(logits=z, loss=None),
        lambda z: {"logits": z},
        lambda z: Output(logits=z, hidden_states=z),
    ],
    ids=["tensor", "object", "dict", "output"],
)
def test_mappings_and_tuples_are_taken_apart_and_logits_found(wrap: Any) -> None:
    ids, y = torch.randint(9, (8, 4)), torch.randint(5, (8,))
    mask = torch.ones(8, 4)
    found = []
    for inputs in ({"ids": ids, "mask": mask}, (ids, mask), [ids, mask]):
        torch.manual_seed(0)
        readers = [Reader(wrap), Reader(wrap)]
        engine = Engine(Cohort(readers, optimizers=sgd))
        engine.step(inputs, y)
        assert engine.cohort.students[0].predict(inputs).shape == (8, 5)
        found.append(readers)
    assert_equal(found[0], found[1])
    assert_equal(found[0], found[2])


def test_a_tuple_that_forward_takes_whole_stays_whole() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(6, 5)

        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            out: Tensor = self.body(pair[0] - pair[1])
            return out

    x, y = rows(0)
    engine = Engine(Cohort([Pairs(), Pairs()], optimizers=sgd))
    assert engine.step((x, x.roll(1, 0)), y).losses.shape == (2,)


@pytest.mark.parametrize("method", ["dml", "dml_e"])
def test_tokens_and_pixels_are_rows(method: str) -> None:
    """(B, T, C), and (B, C, H, W) with class_dim=1, give the bits of the flat (B T, C)."""

    class Shaped(nn.Module):
        def __init__(self, body: nn.Module, shape: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.body, self.shape = body, shape

        def forward(self, x: Tensor) -> Tensor:
            return self.shape(self.body(x))

    flat, tokens, pixels = nets(), nets(), nets()
    x, y = rows(0, 24)
    y[:5] = -100
    forms: list[tuple[list[nn.Module], Any, Tensor, int]] = [
        (flat, lambda z: z, y, -1),
        (tokens, lambda z: z.reshape(4, 6, 5), y.reshape(4, 6), -1),
        (pixels, lambda z: z.reshape(4, 2, 3, 5).movedim(-1, 1), y.reshape(4, 2, 3), 1),
    ]
    results = []
    for bodies, shape, target, dim in forms:
        models = [Shaped(body, shape) for body in bodies]
        engine = Engine(Cohort(models, optimizers=sgd), method=method, class_dim=dim)
        results.append(engine.step(x, target).pack())
    assert results[0][5].tolist() == [19, 19]  # labelled
    for other, bodies in zip(results[1:], (tokens, pixels), strict=True):
        torch.testing.assert_close(results[0], other, rtol=0, atol=0)
        assert_equal(flat, bodies)


def test_bf16_is_autocast() -> None:
    mine = nets()
    engine = Engine(Cohort(mine, optimizers=sgd, precision="bf16"))
    assert str(engine.cohort.students[0].precision) == "bf16"
    assert engine.cohort.students[0].predict(rows(0)[0]).dtype == torch.bfloat16
    assert not engine.step(*rows(0)).skipped.any()


def test_a_graph_leaves_such_steps_to_the_streams(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("dml_fast"), "propagate", True)
    caplog.set_level(logging.INFO)
    mine = nets()
    graph = Graph(CPU, FakeStreams())
    Engine(Cohort(mine, optimizers=sgd), executor=graph).step(*rows(0))
    assert "the optimizer SGD of student 0 is not fused" in caplog.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cohort(nets()), "a cohort of networks has no optimizers: give optimizers="),
        (lambda: Cohort(nets(), optimizers=[sgd(nets()[0])]), "has 1 optimizers: give one for"),
        (lambda: Cohort(nets(), optimizers=sgd, precision="bf61"), "did you mean bf16"),
        (lambda: Cohort(nets(), optimizers=sgd, precision="fp16"), "the device is a CPU"),
        (lambda: Cohort([nn.ReLU()], optimizers=sgd), "network 0 .* has no parameters"),
        (lambda: Cohort([*nets(1), 3], optimizers=sgd), "student 1 of a cohort is 3: give"),
        (lambda: Cohort(Cohort(nets(), optimizers=sgd).students, precision="bf16"), "leave them"),
        (
            lambda: Cohort(nets(), optimizers=lambda n: torch.optim.LBFGS(n.parameters())),
            "LBFGS .* computes the loss again",
        ),
        (
            lambda: Cohort(nets(), optimizers=lambda n: torch.optim.SparseAdam(n.parameters())),
            "SparseAdam .* takes sparse gradients only",
        ),
        (lambda: engine(clip_norm=0), "clip_norm is 0: give a number above 0"),
        (lambda: engine(class_dim=2).step(*rows(0)), r"class_dim is 2 and the logits have shape"),
        (
            lambda: engine(update="alternating").step(*rows(0), accumulate=True),
            "leave it out, or choose simultaneous",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def engine(**options: Any) -> Engine:
    return Engine(Cohort(nets(), optimizers=sgd), **options)
