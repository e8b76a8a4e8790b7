"""The kernels under torch.compile and torch.export, as operators of torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from dml_fast.errors import UserError
from dml_fast.loss import MutualStats, mutual_loss, mutual_loss_and_grad
from dml_fast.loss.checks import prepare

pytest.importorskip("triton")
from dml_fast.kernels import ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "by row": {"reduction": "none"},
    "weighted": {
        "temperature": 2.0,
        "label_smoothing": 0.1,
        "class_weight": torch.linspace(0.5, 1.5, 7, device=DEVICE),
        "row_weight": torch.linspace(0.0, 1.0, 5, device=DEVICE),
        "kl_weight": torch.tensor(0.5, device=DEVICE),
    },
    "reverse": {"divergence": "reverse"},
    "jsd": {"divergence": "jsd", "beta": 0.3, "temperature": 2.0},
    "teacher": {"teacher_logits": [torch.linspace(-1, 1, 35, device=DEVICE).reshape(5, 7)]},
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.slow,
    pytest.mark.compat,
]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(rows: int = 5) -> tuple[list[Tensor], Tensor]:
    """Logits of three students, labels of which one is missing."""
    g = torch.Generator().manual_seed(0)
    logits = [torch.randn(rows, 7, generator=g).to(DEVICE).requires_grad_() for _ in range(3)]
    target = torch.randint(7, (rows,), generator=g)
    target[1] = -100
    return logits, target.to(DEVICE)


def loss(logits: Any, target: Tensor, **options: Any) -> Any:
    return mutual_loss(logits, target, backend="triton", **options)


def grads(losses: Tensor, logits: list[Tensor]) -> list[Tensor]:
    outer = torch.arange(1, losses.numel() + 1, device=DEVICE).reshape(losses.shape)
    return list(torch.autograd.grad((losses * outer).sum(), logits))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_compiled_is_eager(options: dict[str, Any], dynamic: bool | None) -> None:
    """In one graph, forward and backward, and to the bit: the same kernels run."""
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    logits, target = batch()
    want, got = loss(logits, target, **options), compiled(logits, target, **options)
    assert torch.equal(want, got)
    for g, h in zip(grads(want, logits), grads(got, logits), strict=True):
        assert torch.equal(g, h)


def test_a_stack_of_logits() -> None:
    logits, target = batch()
    stack = torch.stack(logits).detach().requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (got,) = grads(compiled(stack, target), [stack])
    assert torch.equal(got, torch.stack(grads(loss(logits, target), logits)))


def test_the_engine_s_path() -> None:
    logits, target = batch()
    scale = torch.tensor([1.0, 2.0, 4.0], device=DEVICE)

    def step(logits: list[Tensor], target: Tensor) -> tuple[Tensor, list[Tensor], MutualStats]:
        return mutual_loss_and_grad(
            logits, target, backend="triton", grad_scale=scale, return_stats=True
        )

    logits = [z.detach() for z in logits]
    want = step(logits, target)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(logits, target)
    flat_want, _ = torch.utils._pytree.tree_flatten(want)
    flat_got, _ = torch.utils._pytree.tree_flatten(got)
    assert all(torch.equal(a, b) for a, b in zip(flat_want, flat_got, strict=True))


def test_another_batch_size_compiles_once_more_at_most() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for rows in (5, 6, 9, 12):
        logits, target = batch(rows)
        assert torch.equal(compiled(logits, target), loss(logits, target))
    assert counter.frame_count <= 2


def test_exported() -> None:
    class Loss(torch.nn.Module):
        def forward(self, logits: list[Tensor], target: Tensor) -> Tensor:
            losses: Tensor = loss(logits, target)
            return losses

    logits, target = batch()
    logits = [z.detach() for z in logits]
    program = torch.export.export(Loss(), (logits, target), strict=True)
    graphs = [
        m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)
    ]
    names = [str(node.target) for graph in graphs for node in graph.nodes]
    assert names.count("dml_fast.mutual_forward.default") == 1
    assert torch.equal(program.module()(logits, target), loss(logits, target))


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_opcheck(options: dict[str, Any], save: bool) -> None:
    logits, target = batch()
    if not save:
        logits = [z.detach() for z in logits]
    defaults: dict[str, Any] = {
        "kl_weight": 1.0,
        "temperature": 1.0,
        "label_smoothing": 0.0,
        "class_weight": None,
        "ignore_index": -100,
        "peer_reduction": "mean",
        "reduction": "mean",
        "peer_weight": None,
        "row_weight": None,
        "teacher_logits": None,
    }
    problem = prepare(logits, target, **{**defaults, **options})
    arguments = (*ops._arguments(problem), not save, save, "all")
    assert set(opcheck(torch.ops.dml_fast.mutual_forward.default, arguments).values()) == {
        "SUCCESS"
    }


def test_no_second_derivative() -> None:
    logits, target = batch()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    first = torch.autograd.grad(compiled(logits, target).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|autograd formula|does not require"):
        torch.autograd.grad(sum(g.square().sum() for g in first), logits)


def test_vmap_is_refused() -> None:
    logits, target = batch()
    stack = torch.stack([torch.stack([z.detach() for z in logits])] * 2)
    with pytest.raises(UserError, match=r"a transform of torch\.func"):
        torch.vmap(lambda z: loss(z, target))(stack)
