"""What must hold of the loss of linear heads: who learns, broken students, autograd's manners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_cases import cohort, exact
from torch import Tensor

from dml_fast.errors import UserError
from dml_fast.loss import closed_form, mutual_loss, mutual_loss_and_grad, products, reference
from dml_fast.loss.linear import FusedLinearMutualLoss, linear_mutual_loss


def test_one_weight_for_two_students_gets_both_gradients() -> None:
    hidden, (weight, *_), target = cohort()
    pair = [hidden[0], hidden[1][:, :3]]
    expected = torch.autograd.grad(exact(pair, [weight] * 2, target).sum(), weight)[0]
    found = linear_mutual_loss(pair, [weight] * 2, target, chunk_rows=5)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), weight)[0], expected)


def test_one_hidden_state_for_two_heads_gets_both_gradients() -> None:
    """Two heads on one trunk."""
    (h, *_), (w, *_), target = cohort()
    weights = [w, w.detach().flip(0).requires_grad_()]
    expected = torch.autograd.grad(exact([h, h], weights, target).sum(), [h, *weights])
    found = linear_mutual_loss([h, h], weights, target, chunk_rows=5)
    for a, b in zip(torch.autograd.grad(found.sum(), [h, *weights]), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("learning", ["hidden", "weight", "bias", "one student", "nobody"])
def test_only_those_who_ask_get_a_gradient(learning: str, reduction: str) -> None:
    """Frozen students still teach."""
    hidden, weight, target = cohort()
    bias = [torch.zeros(7, dtype=torch.float64) for _ in hidden]
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, tensors in leaves.items():
        for k, tensor in enumerate(tensors):
            tensor.requires_grad_(learning in (name, "one student" if k == 1 else ""))
    asked = [t for tensors in leaves.values() for t in tensors if t.requires_grad]
    losses = linear_mutual_loss(hidden, weight, target, bias, chunk_rows=5, reduction=reduction)
    assert losses.requires_grad == bool(asked)
    expected = exact(hidden, weight, target, reduction=reduction)
    torch.testing.assert_close(losses, expected)
    if not asked:
        return
    losses.sum().backward()
    logits = [F.linear(*each) for each in zip(hidden, weight, bias, strict=True)]
    whole = reference.mutual_loss(logits, target, reduction=reduction).sum()
    for tensor, g in zip(asked, torch.autograd.grad(whole, asked), strict=True):
        torch.testing.assert_close(tensor.grad, g)
    given = [t for tensors in leaves.values() for t in tensors]
    assert sum(t.grad is not None for t in given) == len(asked)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_loss_has_no_gradient_for_peers(reduction: str) -> None:
    hidden, weight, target = cohort()
    losses = linear_mutual_loss(hidden, weight, target, reduction=reduction)
    grads = torch.autograd.grad(losses[1].sum(), hidden + weight)
    assert [bool(g.any()) for g in grads] == [False, True, False] * 2


def test_no_grad_makes_losses_only() -> None:
    hidden, weight, target = cohort()
    with torch.no_grad():
        losses = linear_mutual_loss(hidden, weight, target, chunk_rows=5)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, exact(hidden, weight, target))


def test_backward_scales_repeats_and_adds_up() -> None:
    hidden, weight, target = cohort()
    base = torch.autograd.grad(exact(hidden, weight, target).sum(), hidden + weight)
    losses = linear_mutual_loss(hidden, weight, target, chunk_rows=5)
    (2 * losses).sum().backward(retain_graph=True)
    losses.sum().backward()
    for leaf, g in zip(hidden + weight, base, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * g)


def test_statistics_are_those_of_whole_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_form, "add_disagreement", None)  # the costly ones: not even made
    hidden, weight, target = cohort(rows=13)
    target[4] = -100
    options: dict[str, Any] = {"class_weight": torch.rand(7), "temperature": 2.0}
    logits = [F.linear(h, w).detach() for h, w in zip(hidden, weight, strict=True)]
    for reduction in ("mean", "sum", "none"):
        expected = mutual_loss_and_grad(logits, target, **options)[2]
        found = linear_mutual_loss(
            hidden, weight, target, chunk_rows=5, return_stats=True, reduction=reduction, **options
        )[1]
        assert found.correct.tolist() == expected.correct.tolist()
        torch.testing.assert_close(found[:2], expected[:2])
        assert found.finite.tolist() == [True, True, True]
        assert found[4:] == (None,) * 4


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_broken_student_keeps_it_to_itself(reduction: str) -> None:
    """One NaN in a hidden row: its own loss and weights, and what the reference makes of peers."""
    hidden, weight, target = cohort()
    with torch.no_grad():
        hidden[1][4, 0] = torch.nan
    expected = exact(hidden, weight, target, reduction=reduction)
    losses, stats = linear_mutual_loss(
        hidden, weight, target, chunk_rows=5, reduction=reduction, return_stats=True
    )
    assert stats.finite.tolist() == [True, False, True]
    torch.testing.assert_close(losses, expected, equal_nan=True)
    leaves = hidden + weight
    found = torch.autograd.grad(losses.sum(), leaves)
    for a, b in zip(found, torch.autograd.grad(expected.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert [bool(g.isnan().any()) for g in found] == [False, True, False] * 2
    assert found[1].isnan().any(1).nonzero().tolist() == [[4]]


def test_classes_masked_by_a_bias() -> None:
    hidden, weight, target = cohort()
    mask = torch.zeros(7, dtype=torch.float64).index_fill_(0, torch.tensor([0, 4]), -torch.inf)
    target = target.masked_fill((target == 0) | (target == 4), 1)
    losses = linear_mutual_loss(hidden, weight, target, [mask] * 3, chunk_rows=5)
    logits = [F.linear(h, w, mask) for h, w in zip(hidden, weight, strict=True)]
    expected = reference.mutual_loss(logits, target)
    torch.testing.assert_close(losses, expected)
    assert losses.isfinite().all()
    leaves = hidden + weight
    found = torch.autograd.grad(losses.sum(), leaves)
    for a, b in zip(found, torch.autograd.grad(expected.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_stacks_and_leading_dimensions() -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn((2, 3, 4, 5), generator=g).transpose(1, 2).requires_grad_()
    weight = torch.randn((2, 7, 5), generator=g, requires_grad=True)
    bias = torch.randn((2, 7), generator=g, requires_grad=True)
    target = torch.randint(7, (4, 3), generator=g)
    rows = linear_mutual_loss(hidden, weight, target, bias, chunk_rows=5, reduction="none")
    logits = [F.linear(*each) for each in zip(hidden, weight, bias, strict=True)]
    expected = reference.mutual_loss(logits, target, reduction="none")
    torch.testing.assert_close(rows, expected)
    leaves = (hidden, weight, bias)
    found = torch.autograd.grad(rows.sum(), leaves)
    for a, b in zip(found, torch.autograd.grad(expected.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_empty_batch_is_zero(reduction: str) -> None:
    hidden, weight, _ = cohort()
    none = [h.detach()[:0].requires_grad_() for h in hidden]
    target = torch.empty(0, dtype=torch.int64)
    losses = linear_mutual_loss(none, weight, target, reduction=reduction)
    assert losses.shape == ((3,) if reduction == "mean" else (3, 0))
    losses.sum().backward()
    assert losses.sum() == 0
    assert none[0].grad.shape == (0, 3)
    assert not weight[0].grad.any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused(reduction: str) -> None:
    hidden, weight, target = cohort()
    losses = linear_mutual_loss(hidden, weight, target, reduction=reduction)
    grads = torch.autograd.grad(losses.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        sum(g.pow(2).sum() for g in grads).backward()


@pytest.mark.parametrize("written", ["weight", "target"])
def test_what_the_backward_pass_needs_again_must_not_change(written: str) -> None:
    hidden, weight, target = cohort()
    losses = linear_mutual_loss(hidden, weight, target, reduction="none")
    with torch.no_grad():
        {"weight": weight[1], "target": target}[written].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_the_module_passes_every_option_on() -> None:
    hidden, weight, target = cohort()
    g = torch.Generator().manual_seed(1)
    target[2] = 4
    fixed: dict[str, Any] = {
        "kl_weight": 0.5,
        "temperature": 2.0,
        "label_smoothing": 0.1,
        "class_weight": torch.rand(7, generator=g),
        "ignore_index": 4,
        "peer_reduction": "sum",
        "reduction": "none",
    }
    called: dict[str, Any] = {
        "bias": list(torch.randn((3, 7), generator=g, dtype=torch.float64)),
        "row_weight": torch.rand(12, generator=g),
        "teacher_hidden": [torch.randn((12, 2), generator=g, dtype=torch.float64)],
        "teacher_weight": [torch.randn((7, 2), generator=g, dtype=torch.float64)],
        "teacher_bias": [torch.randn(7, generator=g, dtype=torch.float64)],
    }
    module = FusedLinearMutualLoss(**fixed, chunk_rows=5)
    expected = linear_mutual_loss(hidden, weight, target, chunk_rows=5, **fixed, **called)
    assert torch.equal(module(hidden, weight, target, **called), expected)
    weighted = {**called, "peer_weight": torch.rand(3, 4, generator=g)}
    assert not torch.equal(module(hidden, weight, target, **weighted), expected)
    for name in [*fixed, *called]:  # each one matters here: a dropped one would show
        others = {key: value for key, value in {**fixed, **called}.items() if key != name}
        if name in ("teacher_hidden", "teacher_weight"):
            continue
        changed = linear_mutual_loss(hidden, weight, target, **others)
        assert changed.shape != expected.shape or not torch.equal(changed, expected), name
    assert "class_weight" in module.state_dict()
    assert "temperature=2.0" in repr(module)
    assert "chunk_rows=5" in repr(module)
    assert module(hidden, weight, target, return_stats=True, **called)[1].ce.shape == (3,)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # of its interpreter
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_kernels_solve_the_chunks_as_well(reduction: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed (Linux only)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, weight, target = cohort(dtype=torch.float32)
    target[3] = -100
    leaves = [t.detach().to(device).requires_grad_() for t in hidden + weight]
    losses, stats = linear_mutual_loss(
        leaves[:3],
        leaves[3:],
        target.to(device),
        backend="triton",
        chunk_rows=5,
        reduction=reduction,
        return_stats=True,
    )
    expected = exact(hidden, weight, target, reduction=reduction)
    torch.testing.assert_close(losses.cpu(), expected)
    found = torch.autograd.grad(losses.sum(), leaves)
    for a, b in zip(found, torch.autograd.grad(expected.sum(), hidden + weight), strict=True):
        torch.testing.assert_close(a.cpu(), b)
    whole = mutual_loss_and_grad(
        [F.linear(*head) for head in zip(hidden, weight, strict=True)], target
    )[2]
    torch.testing.assert_close([s.cpu() for s in stats[:4]], list(whole[:4]))


def test_the_pages_example_runs() -> None:
    """docs/loss.md: its losses are those of whole logits, and every weight gets a gradient."""
    page = (Path(__file__).parents[2] / "docs" / "loss.md").read_text(encoding="utf-8")
    code = page.split("## Large heads")[1].split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"torch": torch}
    exec(code, names)
    tokens, trunks, heads = (names[name] for name in ("tokens", "trunks", "heads"))
    pairs = list(zip(trunks, heads, strict=True))
    logits = [head(trunk(tokens))[:, :-1] for trunk, head in pairs]
    torch.testing.assert_close(names["losses"], mutual_loss(logits, tokens[:, 1:]))
    assert all(part.weight.grad is not None for pair in pairs for part in pair)


def test_torch_compile_breaks_the_graph_and_gets_the_same_bits() -> None:
    hidden, weight, target = cohort(2)
    trunk = torch.nn.Linear(3, 3).double()
    loss = FusedLinearMutualLoss(chunk_rows=5)

    def step(x: Tensor) -> Tensor:
        return 2 * loss([trunk(x), hidden[1]], weight, target).sum()

    nodes = []

    def count(graph: torch.fx.GraphModule, _: object) -> Any:
        nodes.extend(graph.graph.nodes)
        return graph.forward

    expected = step(hidden[0])
    (g,) = torch.autograd.grad(expected, trunk.weight)
    found = torch.compile(step, backend=count)(hidden[0])
    assert 0 < len(nodes) < 20  # the chunks are not unrolled into the graph
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad(found, trunk.weight)[0], g)


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_call_waits_for_the_device(reduction: str) -> None:
    on_cpu, weights, target = cohort(dtype=torch.float32)
    target[3] = -100
    options: dict[str, Any] = {"class_weight": torch.rand(7), "row_weight": torch.rand(12)}
    hidden = [h.detach().cuda().requires_grad_() for h in on_cpu]
    weight = [w.detach().cuda().requires_grad_() for w in weights]
    moved = {name: value.cuda() for name, value in options.items()}
    labels = target.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = linear_mutual_loss(
            hidden, weight, labels, chunk_rows=5, reduction=reduction, **moved
        )
        losses.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = linear_mutual_loss(on_cpu, weights, target, reduction=reduction, **options)
    torch.testing.assert_close(losses.cpu(), expected)
    expected.sum().backward()
    for a, b in zip(hidden + weight, on_cpu + weights, strict=True):
        torch.testing.assert_close(a.grad.cpu(), b.grad)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_capped_logits(reduction: str) -> None:
    """As Gemma 2 caps them, students and teachers alike."""
    hidden, weight, target = cohort()
    leaves = hidden + weight
    caps = [3 * (F.linear(*each) / 3).tanh() for each in zip(hidden, weight, strict=True)]
    taught: dict[str, Any] = {"reduction": reduction, "temperature": 2.0}
    expected = reference.mutual_loss(caps[:2], target, teacher_logits=[caps[2].detach()], **taught)
    found = linear_mutual_loss(
        hidden[:2],
        weight[:2],
        target,
        teacher_hidden=[hidden[2].detach()],
        teacher_weight=[weight[2].detach()],
        softcap=3,
        chunk_rows=5,
        **taught,
    )
    torch.testing.assert_close(found, expected)
    outer = torch.rand_like(expected)
    wanted = leaves[:2] + leaves[3:5]
    for a, b in zip(
        torch.autograd.grad(found, wanted, outer),
        torch.autograd.grad(expected, wanted, outer),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    for wrong in (0, -1.0, float("nan"), "3"):
        with pytest.raises(UserError, match=r"softcap is .*: give a number above 0, or None"):
            FusedLinearMutualLoss(softcap=wrong)  # type: ignore[arg-type]


def test_products_that_a_gpu_adds_to_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the operator, which CPUs lack, what it is documented to compute."""
    made = []

    def addmm(total: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> None:
        assert a.dtype == b.dtype == torch.bfloat16 and total.dtype == torch.float32
        made.append(beta)
        if not beta:
            total.fill_(float("nan"))  # is not read
        product = alpha * (a.float() @ b.float())
        total.copy_(product if not beta else total * beta + product)

    hidden, weight, target = cohort(dtype=torch.bfloat16)
    leaves = hidden + weight
    usual = torch.autograd.grad(
        linear_mutual_loss(hidden, weight, target, chunk_rows=5).sum(), leaves
    )
    monkeypatch.setattr(products, "_adds_in_fp32", lambda device: True)
    monkeypatch.setattr(products, "_addmm", addmm)
    found = torch.autograd.grad(
        linear_mutual_loss(hidden, weight, target, chunk_rows=5).sum(), leaves
    )
    assert made.count(1) == 2 * 3 and made.count(0) == 4 * 3  # 3 chunks of 3 students
    for a, b in zip(found, usual, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
