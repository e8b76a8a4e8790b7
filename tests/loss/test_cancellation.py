"""Divergences of students that nearly agree: what is left of entropies that are almost equal.

Both the logits' deviation and the temperature make students agree; the factor T² then multiplies
the rounding error of whatever was subtracted. The rule: the root mean square error of the rows is
at most that of the usual loop in torch and fp32, or 1e-6 of the mean.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dml_fast.loss import linear_mutual_loss, mutual_loss, mutual_loss_and_grad, peer_divergence
from dml_fast.loss.divergences import DIVERGENCES

SIZES = [(2, 2), (3, 10), (4, 100), (8, 1000)]  # students, classes
SMALL = SIZES[:3]
SPREADS = [  # temperature, deviation of the logits
    (0.1, 0.01),
    (0.1, 10.0),
    (1.0, 0.01),
    (1.0, 1.0),
    (50.0, 0.1),
    (100.0, 10.0),
]


def cohort(students: int, classes: int, deviation: float) -> list[Tensor]:
    g = torch.Generator().manual_seed(students + classes)
    rows = 12 if classes < 1000 else 4
    return list(deviation * torch.randn((students, rows, classes), generator=g))


def unlabelled(logits: list[Tensor]) -> Tensor:
    return torch.full((len(logits[0]),), -100)


def loop(logits: list[Tensor], temperature: float) -> Tensor:
    """What people write, (K, N): log-softmax, softmax and kl_div, pair by pair."""
    log_p = [(z / temperature).log_softmax(-1) for z in logits]
    p = [(z / temperature).softmax(-1) for z in logits]
    rows = []
    for k in range(len(logits)):
        peers = [p[j] for j in range(len(logits)) if j != k]
        kls = [F.kl_div(log_p[k], peer, reduction="none").sum(-1) for peer in peers]
        rows.append(temperature**2 * torch.stack(kls).mean(0))
    return torch.stack(rows)


def disagreement(logits: list[Tensor], temperature: float) -> Tensor:
    """H(mean p) - mean H(p), (N,), as it is usually written."""
    p = torch.stack([(z / temperature).softmax(-1) for z in logits])
    return entropy(p.mean(0)) - entropy(p).mean(0)


def entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1)


def assert_no_worse(found: Tensor, plain: Any, logits: list[Tensor], *args: float) -> None:
    exact = plain([z.double() for z in logits], *args)
    # Of two that are equally exact, which is closer depends on the order of sums: 7 % apart here.
    allowed = max(1.2 * error(plain(logits, *args), exact), 1e-6 * float(exact.mean()))
    assert error(found, exact) <= allowed, (error(found, exact), allowed, args)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).square().mean().sqrt())


@pytest.mark.parametrize(("students", "classes"), SIZES)
def test_a_divergence_is_as_exact_as_torchs_loop(students: int, classes: int, way: str) -> None:
    if classes == 1000 and way in ("one_pass", "two_sweep"):
        pytest.skip("the interpreter is slow, and 100 classes show the same")
    for temperature, deviation in SPREADS:
        logits = cohort(students, classes, deviation)
        found = mutual_loss(logits, unlabelled(logits), temperature=temperature, reduction="none")
        assert_no_worse(found, loop, logits, temperature)


@pytest.mark.parametrize("divergence", DIVERGENCES[1:])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_other_divergences_in_cpp_are_as_exact_as_in_torch(scale: float, divergence: str) -> None:
    def rows(logits: list[Tensor], backend: str = "closed_form") -> Tensor:
        options: dict[str, Any] = {"divergence": divergence, "reduction": "none"}
        return mutual_loss(logits, unlabelled(logits), backend=backend, **options)

    torch.manual_seed(0)
    common = scale * torch.randn(300, 200)
    logits = [common + 0.03 * scale * torch.randn(300, 200) for _ in range(3)]
    found, exact = rows(logits, "native"), rows([z.double() for z in logits])
    assert error(found, exact) <= 1.25 * error(rows(logits), exact)
    torch.testing.assert_close(found.double().mean(1), exact.mean(1), rtol=1e-2, atol=0)


@pytest.mark.parametrize(("students", "classes"), SMALL[::2])
def test_weighted_peers_are_as_exact(students: int, classes: int, way: str) -> None:
    weight = torch.full((students, students), 1 / (students - 1))
    for temperature, deviation in SPREADS:
        logits = cohort(students, classes, deviation)
        options: dict[str, Any] = {"temperature": temperature, "peer_weight": weight}
        found = mutual_loss(logits, unlabelled(logits), reduction="none", **options)
        assert_no_worse(found, loop, logits, temperature)


@pytest.mark.parametrize(("students", "classes"), SMALL[::2])
def test_statistics_of_students_that_agree(students: int, classes: int, way: str) -> None:
    for temperature, deviation in SPREADS[::2]:
        logits = cohort(students, classes, deviation)
        stats = mutual_loss_and_grad(
            logits, unlabelled(logits), temperature=temperature, return_stats=True
        )[2]
        assert stats.row_mutual_information is not None and stats.pairwise_kl is not None
        assert_no_worse(stats.row_mutual_information, disagreement, logits, temperature)
        incoming = temperature**2 * stats.pairwise_kl.sum(0) / (students - 1)
        assert_no_worse(incoming, lambda z, t: loop(z, t).mean(1), logits, temperature)


@pytest.mark.parametrize(("students", "classes"), SIZES[1:])
def test_the_divergence_of_the_peers(students: int, classes: int) -> None:
    def plain(logits: list[Tensor], temperature: float) -> Tensor:
        others = [[z for j, z in enumerate(logits) if j != k] for k in range(students)]
        return torch.stack([disagreement(peers, temperature).mean() for peers in others])

    for temperature, deviation in SPREADS:
        logits = cohort(students, classes, deviation)
        assert_no_worse(peer_divergence(logits, temperature), plain, logits, temperature)


@pytest.mark.slow
def test_the_compiled_closed_form() -> None:
    for temperature, deviation in SPREADS[-2:]:  # one program
        logits = cohort(4, 100, deviation)
        options: dict[str, Any] = {"temperature": temperature, "backend": "compiled"}
        found = mutual_loss(logits, unlabelled(logits), reduction="none", **options)
        assert_no_worse(found, loop, logits, temperature)


@pytest.mark.parametrize(("students", "classes"), SMALL)
def test_linear_heads(students: int, classes: int) -> None:
    heads = [torch.eye(classes)] * students  # the hidden states are the logits
    for temperature, deviation in SPREADS:
        logits = cohort(students, classes, deviation)
        options: dict[str, Any] = {"temperature": temperature, "chunk_rows": 5}
        found = linear_mutual_loss(logits, heads, unlabelled(logits), reduction="none", **options)
        assert_no_worse(found, loop, logits, temperature)
