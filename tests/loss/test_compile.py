"""The loss inside torch.compile and torch.export, and refused inside torch.func."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from loss_cases import Case, assert_exact, by_autograd
from torch import Tensor, nn
from torch.autograd import forward_ad

from dml_fast.errors import UserError
from dml_fast.loss import FusedMutualLoss, backends, mutual_loss, mutual_loss_and_grad, reference

pytestmark = [pytest.mark.slow, pytest.mark.compat]

PLAIN = {"kl_weight": 1.0, "temperature": 1.0, "peer_reduction": "mean", "reduction": "mean"}
KINDS = ["plain", "every option", "by row", "probabilities", "one student", "bf16"]


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def case(kind: str, rows: int = 12) -> Case:
    g = torch.Generator().manual_seed(rows)
    classes = 7
    students = 1 if kind == "one student" else 3
    logits = [3 * torch.randn((rows, classes), generator=g) for _ in range(students)]
    target = torch.randint(classes, (rows,), generator=g)
    options: dict[str, Any] = {**PLAIN, "ignore_index": -100}
    if kind == "every option":
        target[1] = 2
        options |= {
            "kl_weight": torch.tensor(0.5),
            "temperature": 2.0,
            "label_smoothing": 0.1,
            "class_weight": torch.rand(classes, generator=g),
            "ignore_index": 2,
            "peer_reduction": "sum",
            "reduction": "sum",
            "row_weight": torch.rand(rows, generator=g),
            "teacher_logits": [torch.randn((rows, classes), generator=g)],
            "peer_weight": torch.rand((3, 4), generator=g),
        }
    if kind == "by row":
        options["reduction"] = "none"
        logits = [z.reshape(2, -1, classes) for z in logits]
        target = target.reshape(2, -1)
    if kind == "probabilities":
        target = torch.rand((rows, classes), generator=g).softmax(-1)
        options["class_weight"] = torch.rand(classes, generator=g)
    if kind == "bf16":
        logits = [z.bfloat16() for z in logits]
    return Case(logits, target, options)


def traced(function: Any, dynamic: bool | None = None) -> Any:
    """Compiled without a C++ compiler, the same but for inductor; a graph break is an error."""
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")


class Programs:
    """A backend of torch.compile that counts how often it is asked."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.mark.parametrize(
    ("kind", "dynamic"),
    [*((kind, None) for kind in KINDS), ("by row", True), ("every option", True)],
)
def test_one_graph_forward_and_backward_as_exact_as_uncompiled(
    kind: str, dynamic: bool | None
) -> None:
    assert_exact(case(kind), answer=partial(by_autograd, traced(mutual_loss, dynamic)))


@pytest.mark.parametrize("kind", ["plain", "by row"])
def test_stacked_logits(kind: str) -> None:
    listed = case(kind)
    losses, grads = by_autograd(mutual_loss, listed)
    stack = torch.stack(listed.logits).requires_grad_()
    found = traced(mutual_loss)(stack, listed.target, **listed.options)
    torch.testing.assert_close(found.detach(), losses)
    (grad,) = torch.autograd.grad(found.sum(), stack)
    torch.testing.assert_close(grad, torch.stack(grads))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_all_statistics_without_autograd(kind: str) -> None:
    one = case(kind)
    students = len(one.logits)
    extra = {"return_stats": True, "grad_scale": torch.arange(1.0, students + 1)}
    expected = mutual_loss_and_grad(one.logits, one.target, **one.options, **extra)
    found = traced(mutual_loss_and_grad)(one.logits, one.target, **one.options, **extra)
    torch.testing.assert_close(tuple(found[2]), tuple(expected[2]))
    torch.testing.assert_close(found[:2], expected[:2])


def test_a_broken_student_is_flagged_and_its_peers_are_not() -> None:
    one = case("plain")
    one.logits[1][4, 2] = torch.nan
    expected = mutual_loss_and_grad(one.logits, one.target)
    found = traced(mutual_loss_and_grad)(one.logits, one.target)
    assert found[2].finite.tolist() == [True, False, True]
    torch.testing.assert_close(found[0], expected[0], equal_nan=True)
    torch.testing.assert_close(found[1], expected[1], equal_nan=True)


class Cohort(nn.Module):
    """Three students on the same features, and their losses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.ModuleList(nn.Linear(5, 7) for _ in range(3))
        self.loss = FusedMutualLoss(class_weight=torch.rand(7), label_smoothing=0.1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss([head(x) for head in self.heads], y)


def batch(rows: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(rows)
    return torch.randn((rows, 5), generator=g), torch.randint(7, (rows,), generator=g)


def test_a_model_and_its_loss_are_one_graph() -> None:
    model = Cohort()
    expected = torch.autograd.grad(model(*batch(9)).sum(), list(model.parameters()))
    found = torch.autograd.grad(traced(model)(*batch(9)).sum(), list(model.parameters()))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("stacked", [False, True])
def test_batch_sizes_do_not_each_cost_a_compilation(stacked: bool) -> None:
    programs = Programs()
    compiled = torch.compile(mutual_loss, fullgraph=True, backend=programs)
    for rows in (16, 12, 5, 33, 2):
        one = case("plain", rows)
        logits = torch.stack(one.logits) if stacked else one.logits
        found = compiled(logits, one.target)
        torch.testing.assert_close(found, mutual_loss(one.logits, one.target))
        assert programs.count <= 2  # the first size, then any


def test_a_ramp_of_the_weight_does_not_cost_a_compilation_a_step() -> None:
    one = case("plain")
    loss, programs = FusedMutualLoss(), Programs()
    compiled = torch.compile(loss, fullgraph=True, backend=programs)
    for weight in (0.1, 0.2, 0.3, 0.4, 0.5):
        loss.kl_weight = weight
        torch.testing.assert_close(compiled(one.logits, one.target), loss(one.logits, one.target))
    assert programs.count <= 2
    before = programs.count
    for weight in (0.1, 0.2, 0.3):
        loss.kl_weight = torch.tensor(weight)
        torch.testing.assert_close(compiled(one.logits, one.target), loss(one.logits, one.target))
    assert programs.count == before + 1


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_free_batch(strict: bool) -> None:
    model = Cohort()
    free = {0: torch.export.Dim("rows", min=2)}
    exported = torch.export.export(
        model, batch(6), dynamic_shapes={"x": free, "y": free}, strict=strict
    )
    for rows in (2, 9):
        torch.testing.assert_close(exported.module()(*batch(rows)), model(*batch(rows)).detach())


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_gradients(strict: bool) -> None:
    class Direct(nn.Module):
        def forward(self, logits: list[Tensor], target: Tensor) -> Any:
            return mutual_loss_and_grad(logits, target, temperature=2.0)[:2]

    one = case("plain")
    exported = torch.export.export(Direct(), (one.logits, one.target), strict=strict)
    other = case("plain")
    other.logits[0] += 1.0
    expected = Direct()(other.logits, other.target)
    torch.testing.assert_close(exported.module()(other.logits, other.target), expected)


def test_no_value_is_read_so_a_class_out_of_range_is_for_torchs_own_assertion() -> None:
    one = case("plain")
    one.target[3] = 70
    with pytest.raises(UserError, match="target 70 in row 3"):
        mutual_loss(one.logits, one.target)
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        traced(mutual_loss)(one.logits, one.target)


def test_a_mistake_is_still_named() -> None:
    compiled = torch.compile(mutual_loss, backend="aot_eager")
    one = case("plain")
    with pytest.raises(UserError, match="temperature is -1"):
        compiled(one.logits, one.target, temperature=-1.0)
    with pytest.raises(UserError, match=r"class_weight has shape \(3,\)"):
        compiled(one.logits, one.target, class_weight=torch.ones(3))


def test_kernels_that_cannot_take_a_case_break_no_graph() -> None:
    """The choice of a backend, with its log line, is made while torch.compile traces."""
    one = case("plain").to(torch.float64)  # which the Triton kernels do not take
    found = traced(mutual_loss)(one.logits, one.target, backend="triton")
    torch.testing.assert_close(found, mutual_loss(one.logits, one.target))


def test_a_second_derivative_is_refused_in_compiled_code_too() -> None:
    one = case("plain")
    logits = [z.requires_grad_() for z in one.logits]
    losses = traced(mutual_loss)(logits, one.target)
    grads = torch.autograd.grad(losses.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        sum(g.pow(2).sum() for g in grads).backward()


TRANSFORMS = {
    "grad": lambda f, z: torch.func.grad(lambda x: f(x).sum())(z),
    "vmap": lambda f, z: torch.vmap(f)(torch.stack([z, z])),
    "jvp": lambda f, z: torch.func.jvp(f, (z,), (z,)),
    "jacrev": lambda f, z: torch.func.jacrev(f)(z),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func_are_refused(name: str, compiled: bool) -> None:
    """Forward-mode would take the peers for variables."""
    one = case("plain")

    def direct(z: Tensor) -> Tensor:
        return mutual_loss_and_grad(z, one.target)[0]

    for function in (lambda z: mutual_loss(z, one.target), direct):
        whole = partial(TRANSFORMS[name], function)
        if compiled:
            whole = torch.compile(whole, backend="aot_eager")
        with pytest.raises(UserError, match=r"torch\.func.*use torch\.autograd\.grad"):
            whole(torch.stack(one.logits))


def test_forward_mode_is_refused() -> None:
    one = case("plain")
    with forward_ad.dual_level():
        logits = [forward_ad.make_dual(z, z) for z in one.logits]
        with pytest.raises(UserError, match="tangent of forward-mode"):
            mutual_loss(logits, one.target)
        with pytest.raises(UserError, match="tangent of forward-mode"):
            mutual_loss_and_grad(logits, one.target)


def test_what_the_refusal_names_has_the_transforms() -> None:
    one = case("plain")
    z = torch.stack(one.logits)
    expected = torch.stack(mutual_loss_and_grad(one.logits, one.target)[1])

    def exact(x: Tensor) -> Tensor:
        return reference.mutual_loss(list(x), one.target)

    found = torch.func.grad(lambda x: exact(x).sum())(z)
    torch.testing.assert_close(found, expected)
    _, tangent = torch.func.jvp(exact, (z,), (z,))
    torch.testing.assert_close(tangent.float(), (expected * z).sum((1, 2)))


def test_constants_are_marked_as_torch_marks_them() -> None:
    """The mark is set without torch's decorator, whose import is slow, and must stay the same."""

    def ours() -> None: ...
    def theirs() -> None: ...

    torch.compiler.assume_constant_result(theirs)
    assert vars(backends._constant(ours)) == vars(theirs) != {}
