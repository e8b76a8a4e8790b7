"""The loss with other divergences than the paper's, against float64, and their edges."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import Case, assert_exact, by_autograd, cases
from torch import Tensor

from dml_fast.errors import UserError
from dml_fast.loss import (
    FusedLinearMutualLoss,
    FusedMutualLoss,
    linear_mutual_loss,
    mutual_loss,
    mutual_loss_and_grad,
    reference,
)

OTHERS = ("reverse", "symmetric", "jsd")
INF = torch.inf


@st.composite
def other_cases(draw: st.DrawFn) -> Case:
    """The cases of the paper's loss with another divergence."""
    case = draw(cases())
    case.options["divergence"] = draw(st.sampled_from(OTHERS))
    if case.options["divergence"] == "jsd":
        case.options["beta"] = draw(st.sampled_from([0.5, 0.1, 0.95]))
    return case


@settings(max_examples=20, deadline=None)
@given(case=other_cases())
def test_values_and_gradients_are_the_definition(case: Case) -> None:
    assert_exact(case)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(case=other_cases())
def test_values_and_gradients_of_many_cases(case: Case) -> None:
    assert_exact(case)
    losses, grads = by_autograd(partial(mutual_loss, backend="closed_form"), case)
    direct, direct_grads, _ = mutual_loss_and_grad(
        case.logits, case.target, backend="closed_form", **case.options
    )
    assert torch.equal(losses, direct)
    assert all(torch.equal(a, b) for a, b in zip(grads, direct_grads, strict=True))


@settings(max_examples=20, deadline=None)
@given(case=cases(), divergence=st.sampled_from(("forward", *OTHERS)))
def test_labelled_rows_alone_have_a_divergence(case: Case, divergence: str) -> None:
    case.options |= {"kl_rows": "labelled", "divergence": divergence}
    assert_exact(case)


def cohort(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(0)
    logits = list(2 * torch.randn((3, 6, 5), generator=g, dtype=torch.float64).to(dtype))
    return logits, torch.randint(5, (6,), generator=g)


def test_the_definitions_by_torchs_own_divergences() -> None:
    """Rows with no label: what is left of the loss is the divergence."""
    logits, target = cohort()
    options: dict[str, Any] = {"ce_weight": 0.0, "temperature": 2.0, "reduction": "none"}
    p = [torch.distributions.Categorical(logits=z / 2.0) for z in logits]
    kl = torch.distributions.kl_divergence
    found = {
        name: mutual_loss(logits, target, divergence=name, **options)[0]
        for name in ("forward", "reverse", "symmetric")
    }
    torch.testing.assert_close(found["reverse"], 4 * (kl(p[0], p[1]) + kl(p[0], p[2])) / 2)
    torch.testing.assert_close(found["symmetric"], (found["forward"] + found["reverse"]) / 2)
    mean = (p[1].probs + p[2].probs) / 2
    m = torch.distributions.Categorical(probs=0.3 * mean + 0.7 * p[0].probs)
    wanted = 0.3 * kl(torch.distributions.Categorical(probs=mean), m) + 0.7 * kl(p[0], m)
    found = mutual_loss(logits, target, divergence="jsd", beta=0.3, **options)[0]
    torch.testing.assert_close(found, 4 * wanted)


@pytest.mark.parametrize("divergence", OTHERS)
def test_gradcheck_with_peers_held_still(divergence: str) -> None:
    logits, target = cohort()
    options: dict[str, Any] = {"divergence": divergence, "temperature": 1.7}
    options["peer_weight"] = torch.rand(3, 3, generator=torch.Generator().manual_seed(1))

    def own_loss(z: Tensor) -> Tensor:
        return mutual_loss([z[:2], *(o[:2] for o in logits[1:])], target[:2], **options)[0]

    assert torch.autograd.gradcheck(own_loss, logits[0][:2].clone().requires_grad_())
    leaves = [z.clone().requires_grad_() for z in logits]
    own = mutual_loss(leaves, target, separate=True, divergence=divergence)
    own[1].backward()
    assert leaves[0].grad is None
    assert leaves[1].grad is not None


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("divergence", OTHERS)
def test_bad_rows_and_masked_classes(divergence: str, weighted: bool) -> None:
    """Unusable rows are left out; a class that all mask counts for nothing."""
    logits, target = cohort(torch.float32)
    teacher = logits.pop()
    logits.append(logits[0].flip(0).clone())
    for z in (*logits, teacher):
        z[4, (int(target[4]) + 1) % 5] = -INF
    logits[1][2, 3], logits[0][1, 0], logits[2][1], logits[1][1] = torch.nan, INF, -INF, torch.nan
    options: dict[str, Any] = {"divergence": divergence, "teacher_logits": [teacher]}
    if weighted:
        options["peer_weight"] = torch.tensor([[0.0, 1, 2, 0], [1, 0, 1, 0.5], [0, 0, 0, 0]])
    for reduction in ("none", "mean"):
        losses, grads, stats = mutual_loss_and_grad(logits, target, reduction=reduction, **options)
        exact = [z.double().requires_grad_() for z in logits]
        double = {k: v.double() for k, v in options.items() if isinstance(v, Tensor)}
        expected = reference.mutual_loss(
            exact,
            target,
            **{**options, **double, "reduction": reduction, "teacher_logits": [teacher.double()]},
        )
        close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6, equal_nan=True)
        close(losses.double(), expected.detach())
        for g, e in zip(grads, torch.autograd.grad(expected.sum(), exact), strict=True):
            close(g.double(), e)
    assert stats.finite.tolist() == [False, False, False]
    assert losses.isnan().tolist() == [True, True, True]


def test_a_class_that_only_a_peer_masks() -> None:
    """KL(p_k || p_l) is infinite there and has no gradient; the other students have one."""
    logits, target = cohort(torch.float32)
    logits[1][2, (int(target[2]) + 1) % 5] = -INF
    for divergence in OTHERS:
        losses, grads, _ = mutual_loss_and_grad(
            logits, target, reduction="none", divergence=divergence
        )
        infinite = divergence != "jsd"
        assert losses[0].isinf().tolist() == [row == 2 and infinite for row in range(6)]
        assert bool(grads[0][2].isnan().all()) == infinite
        assert grads[1].isfinite().all()
        assert losses[1].isinf().any() == (divergence == "symmetric")  # its forward half
        alone, own_grads, _ = mutual_loss_and_grad(
            logits, target, kl_weight=0.0, divergence=divergence
        )
        torch.testing.assert_close(alone[0], F.cross_entropy(logits[0], target))
        assert own_grads[0].isfinite().all()


@pytest.mark.parametrize("divergence", OTHERS)
def test_students_that_agree_and_logits_far_apart(divergence: str) -> None:
    logits, target = cohort(torch.float32)
    same = [logits[0]] * 3
    losses, grads, stats = mutual_loss_and_grad(same, target, divergence=divergence)
    alone, own, _ = mutual_loss_and_grad(same[:1], target)
    torch.testing.assert_close(losses, alone.expand(3))
    torch.testing.assert_close(grads[1], own[0])
    assert (stats.kl >= 0).all()
    far = [1e4 * z for z in logits]
    losses, grads, _ = mutual_loss_and_grad(far, target, divergence=divergence)
    assert losses.isfinite().all()
    assert all(g.isfinite().all() for g in grads)


def test_jsd_of_students_that_nearly_agree_keeps_its_digits() -> None:
    logits, target = cohort()
    options: dict[str, Any] = {"ce_weight": 0.0, "divergence": "jsd", "beta": 0.3}
    near = [logits[0].float(), (logits[0] + 1e-3 * logits[1]).float()]
    wanted = reference.mutual_loss([z.double() for z in near], target, **options)
    found = mutual_loss(near, target, **options)
    assert float(((found - wanted) / wanted).abs().max()) < 1e-3


@pytest.mark.parametrize("divergence", OTHERS)
def test_modules_statistics_and_linear_heads(divergence: str) -> None:
    logits, target = cohort(torch.float32)
    beta = 0.2 if divergence == "jsd" else 0.5
    loss = FusedMutualLoss(divergence=divergence, beta=beta, class_dim=1, temperature=2.0)
    assert f"divergence={divergence!r}, beta={beta}" in repr(loss)
    wanted, grads, stats = mutual_loss_and_grad(
        logits, target, divergence=divergence, beta=beta, temperature=2.0
    )
    torch.testing.assert_close(stats.ce + stats.kl, wanted)
    images = [z.reshape(2, 3, 5).movedim(-1, 1) for z in logits]
    found, more = loss(images, target.reshape(2, 3), return_stats=True)
    torch.testing.assert_close(found, wanted)
    paper = mutual_loss(logits, target, temperature=2.0, return_stats=True)[1]
    torch.testing.assert_close(more.pairwise_kl, paper.pairwise_kl)
    hidden = [torch.eye(6).requires_grad_() for _ in logits]
    weight = [z.T.clone().requires_grad_() for z in logits]
    heads = FusedLinearMutualLoss(divergence=divergence, beta=beta, temperature=2.0, chunk_rows=4)
    found = heads(hidden, weight, target)
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    for w, g in zip(weight, grads, strict=True):
        torch.testing.assert_close(w.grad, g.T)


@pytest.mark.slow
def test_the_compiled_closed_form() -> None:
    logits, target = cohort(torch.float32)
    options: dict[str, Any] = {"divergence": "symmetric", "temperature": 2.0}
    logits[1][2, 3] = torch.nan
    found = mutual_loss_and_grad(logits, target, backend="compiled", **options)
    wanted = mutual_loss_and_grad(logits, target, backend="closed_form", **options)
    torch.testing.assert_close(found[0], wanted[0], equal_nan=True)
    for a, b in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.slow
def test_a_callers_compiled_program_has_no_break() -> None:
    logits, target = cohort(torch.float32)
    loss = partial(mutual_loss, divergence="jsd", peer_weight=torch.ones(3, 3))
    found = torch.compile(loss, backend="eager", fullgraph=True)(logits, target)
    torch.testing.assert_close(found, loss(logits, target))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "kl"}, "divergence is 'kl'"),
        ({"divergence": "jsd", "beta": 1.0}, "beta is 1.0: it is the peers' share"),
        ({"divergence": "jsd", "beta": math.nan}, "beta is nan: it is the peers' share"),
        ({"divergence": "jsd", "beta": "half"}, "beta is 'half': pass a number"),
        ({"kl_rows": "some"}, "kl_rows is 'some'"),
        ({"beta": 0.2}, "beta is 0.2 and divergence 'forward': beta is for divergence='jsd'"),
    ],
)
def test_bad_values_are_refused(change: dict[str, Any], message: str) -> None:
    logits, target = cohort(torch.float32)
    for call in (
        lambda: mutual_loss(logits, target, **change),
        lambda: linear_mutual_loss(logits, [torch.eye(5)] * 3, target, **change),
        lambda: FusedMutualLoss(**change),
    ):
        with pytest.raises(UserError, match=message):
            call()


@pytest.mark.parametrize("divergence", ["forward", "jsd"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_padding_changes_nothing(reduction: str, divergence: str) -> None:
    """As if the rows without a label were not there, even where their logits are NaN."""
    logits, target = cohort(torch.float32)
    options: dict[str, Any] = {
        "kl_rows": "labelled",
        "reduction": reduction,
        "divergence": divergence,
        "class_weight": torch.arange(1.0, 6.0),
        "temperature": 2.0,
    }
    kept = torch.tensor([0, 2, 3])
    padded = torch.full_like(target, -100).index_copy(0, kept, target[kept])
    logits[1][4] = torch.nan
    logits[2][1, 3] = -INF
    weight = torch.arange(6.0)
    rows = [z[kept] for z in logits]
    wanted, grads, stats = mutual_loss_and_grad(
        rows, target[kept], row_weight=weight[kept], **options
    )
    found, padded_grads, more = mutual_loss_and_grad(
        logits, padded, row_weight=weight, return_stats=True, **options
    )
    torch.testing.assert_close(found[:, kept] if reduction == "none" else found, wanted)
    torch.testing.assert_close((more.ce, more.kl), (stats.ce, stats.kl))
    for g, own in zip(padded_grads, grads, strict=True):
        torch.testing.assert_close(g[kept], own)
        assert not g[[1, 4, 5]].any()
    if reduction == "none":
        assert not found[:, [1, 4, 5]].any()
        return
    logits[1][4] = 0  # NaN times a weight's gradient of 0 is NaN
    heads = FusedLinearMutualLoss(**options, chunk_rows=2)
    hidden, weights = [torch.eye(6)] * 3, [z.T.clone().requires_grad_() for z in logits]
    weights[2] = weights[2].detach().clamp(min=-9).requires_grad_()
    found = heads(hidden, weights, padded, row_weight=weight)
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    for w, own in zip(weights, padded_grads, strict=True):
        torch.testing.assert_close(w.grad, own.T)


def test_parts_of_a_padded_batch_add_up() -> None:
    logits, target = cohort(torch.float32)
    target[[1, 2, 4]] = -100
    options: dict[str, Any] = {"kl_rows": "labelled", "divergence": "reverse"}
    wanted, grads, _ = mutual_loss_and_grad(logits, target, **options)
    parts = [
        mutual_loss_and_grad([z[rows] for z in logits], target[rows], whole=whole, **options)
        for rows, whole in (
            (slice(0, 2), (3, 3)),
            (slice(2, 6), (torch.tensor(3), torch.tensor(3))),
        )
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], wanted)
    torch.testing.assert_close(torch.cat([parts[0][1][0], parts[1][1][0]]), grads[0])
    first = torch.full_like(target, -100).index_copy(0, torch.tensor([0]), target[:1])
    alone = mutual_loss_and_grad(  # by the C++ loop, as this part has all its labels
        [z[:1] for z in logits], target[:1], kl_rows="labelled", whole=(3, torch.tensor(3))
    )
    torch.testing.assert_close(alone[0] * 3, mutual_loss(logits, first, kl_rows="labelled"))
    none = torch.full_like(target, -100)
    losses, grads, _ = mutual_loss_and_grad(logits, none, **options)
    assert not losses.any()
    assert not torch.stack(grads).any()
    with pytest.raises(UserError, match="whole has rows of shape"):
        mutual_loss_and_grad(logits, target, whole=(3, torch.ones(2)), **options)


def test_what_does_not_go_together_is_refused() -> None:
    logits, target = cohort(torch.float32)
    soft = F.one_hot(target, 5)
    with pytest.raises(
        UserError, match="kl_rows is 'labelled' and distribution 'bernoulli': every"
    ):
        mutual_loss(logits, soft, kl_rows="labelled", distribution="bernoulli")
    message = "divergence is 'jsd' and distribution 'bernoulli': labels that do not exclude"
    options: dict[str, Any] = {"divergence": "jsd", "distribution": "bernoulli"}
    with pytest.raises(UserError, match=message):
        mutual_loss(logits, F.one_hot(target, 5), **options)
    with pytest.raises(UserError, match=message):
        FusedMutualLoss(**options)
    weight = torch.ones(3, 3).index_fill(1, torch.tensor([2]), -0.5)
    with pytest.raises(UserError, match=r"peer_weight has -0\.5: with divergence='jsd'"):
        mutual_loss(logits, target, divergence="jsd", peer_weight=weight)
