"""Labels, weights and options as people have them: numpy's, Python's, of every integer type."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dml_fast.errors import UserError
from dml_fast.loss import (
    FusedLinearMutualLoss,
    FusedMutualLoss,
    linear_mutual_loss,
    mutual_loss,
    mutual_loss_and_grad,
    peer_divergence,
)
from dml_fast.loss.triplet import triplet_loss

LOGITS = list(torch.randn((2, 4, 3), generator=torch.Generator().manual_seed(0)))
LABELS = [0, 1, 2, 0]
EYE = [torch.eye(3)] * 2


def by_heads(logits: Any, target: Any, **options: Any) -> Any:
    return linear_mutual_loss(logits, EYE, target, **options)


def by_module(logits: Any, target: Any, **options: Any) -> Any:
    return FusedMutualLoss(**options)(logits, target)


DOORS: dict[str, Callable[..., Any]] = {
    "mutual_loss": mutual_loss,
    "and_grad": lambda *args, **options: mutual_loss_and_grad(*args, **options)[0],
    "heads": by_heads,
    "module": by_module,
    "head module": lambda z, y, **options: FusedLinearMutualLoss(**options)(z, EYE, y),
}
door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
LABELLINGS: dict[str, Any] = {
    **{f"numpy {name}": np.array(LABELS, name) for name in INTEGERS},
    **{f"torch {name}": torch.tensor(LABELS).to(getattr(torch, name)) for name in INTEGERS},
    "list": LABELS,
    "tuple": tuple(LABELS),
    "list of tensors": list(torch.tensor(LABELS)),
    "list of numpy": list(np.array(LABELS)),
    "swapped bytes": np.array(LABELS, ">i4").astype("<i4"),
    "backwards": np.array(LABELS[::-1])[::-1].copy(),
}


@door
@pytest.mark.parametrize("kind", LABELLINGS)
def test_labels_of_every_type_give_one_loss(kind: str, door: Callable[..., Any]) -> None:
    expected = door(LOGITS, torch.tensor(LABELS))
    assert torch.equal(door(LOGITS, LABELLINGS[kind]), expected)


@pytest.mark.parametrize("kind", LABELLINGS)
def test_identities_of_every_type_give_one_triplet_loss(kind: str) -> None:
    expected = triplet_loss(LOGITS[0], torch.tensor(LABELS), 0.3)
    assert torch.equal(triplet_loss(LOGITS[0], LABELLINGS[kind], 0.3), expected)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32"])
def test_every_backend_takes_unsigned_labels(kind: str, way: str) -> None:
    target = torch.tensor(LABELS).to(getattr(torch, kind))
    expected = mutual_loss(LOGITS, torch.tensor(LABELS))
    assert torch.equal(mutual_loss(LOGITS, target), expected)


@door
def test_an_unsigned_label_out_of_range_is_not_an_ignored_one(door: Callable[..., Any]) -> None:
    """156 in uint8 and 2^64 - 100 in uint64 have the bits of -100."""
    for label, kind in ((156, "uint8"), (2**64 - 100, "uint64"), (2**32 - 100, "uint32")):
        with pytest.raises(UserError, match="is not a class"):
            door(LOGITS, np.array([0, label, 1, 2], kind))


ONE = {"kl_weight": 0.5, "temperature": 2.0, "label_smoothing": 0.25}
SAME: list[Callable[[float], Any]] = [
    np.float64,
    np.float32,
    np.float16,
    np.array,
    torch.tensor,
    Fraction,
    lambda x: torch.tensor(x, dtype=torch.float64),
    lambda x: np.array(x, np.float32),
]


@door
@pytest.mark.parametrize("option", ONE)
def test_a_number_may_be_numpys_or_torchs(option: str, door: Callable[..., Any]) -> None:
    expected = door(LOGITS, LABELS, **{option: ONE[option]})
    for kind in SAME:
        found = door(LOGITS, LABELS, **{option: kind(ONE[option])})
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@door
def test_an_ignored_index_may_be_numpys_or_torchs(door: Callable[..., Any]) -> None:
    expected = door(LOGITS, LABELS, ignore_index=1)
    for one in (np.int64(1), np.uint8(1), np.array(1), torch.tensor(1)):
        assert torch.equal(door(LOGITS, LABELS, ignore_index=one), expected)


def test_weights_may_be_lists_or_arrays() -> None:
    weights = {"class_weight": [1.0, 2.0, 0.5], "row_weight": [0.0, 1.0, 2.0, 1.0]}
    weights |= {"peer_weight": [[0.0, 0.3], [0.7, 0.0]]}
    soft = torch.tensor([[0.2, 0.3, 0.5]] * 4)
    expected = mutual_loss(LOGITS, soft, **{k: torch.tensor(x) for k, x in weights.items()})
    for kind in (list, np.array, lambda x: np.array(x, np.float32)):
        given = {name: kind(x) for name, x in weights.items()}
        for target in (soft.tolist(), soft.numpy(), soft):
            torch.testing.assert_close(mutual_loss(LOGITS, target, **given), expected)
    module = FusedMutualLoss(class_weight=weights["class_weight"])
    assert "class_weight" in module.state_dict()
    scaled = mutual_loss_and_grad(LOGITS, LABELS, grad_scale=torch.tensor([2.0, 4.0]))[1]
    for scale in ([2.0, 4.0], np.array([2.0, 4.0])):
        found = mutual_loss_and_grad(LOGITS, LABELS, grad_scale=scale)[1]
        assert all(torch.equal(a, b) for a, b in zip(found, scaled, strict=True))


NO_NUMBERS: list[Any] = [
    "2.0", b"2", None, [2.0], (2.0,), {}, 2j, object(), 10**400, math.nan, math.inf, -1e400,
    np.array([2.0]), np.array(["a", "b"]), np.array("a"), np.complex64(1), np.datetime64("2026"),
    torch.ones(2), torch.ones(1), torch.tensor(1j), torch.ones((), device="meta"),
    torch.ones((), requires_grad=True), torch.ones((2, 2)).to_sparse(),
]  # fmt: skip
OPTIONS = [*ONE, "ignore_index", "peer_reduction", "reduction", "backend", "class_weight"]


@settings(max_examples=150, deadline=None)
@given(
    option=st.sampled_from([*OPTIONS, "target", "row_weight", "peer_weight", "teacher_logits"]),
    value=st.sampled_from(NO_NUMBERS),
    name=st.sampled_from(list(DOORS)),
)
def test_whatever_is_no_value_is_one_sentence(option: str, value: Any, name: str) -> None:
    """Each pair is a result, where the value is one, or one `UserError`."""
    if option in ("row_weight", "peer_weight", "teacher_logits"):
        name = "mutual_loss"
    call: dict[str, Any] = {"target": LABELS, option: value}
    try:
        found = DOORS[name](LOGITS, call.pop("target"), **call)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 300
        return
    allowed = value is None or (isinstance(value, (tuple, dict)) and not value)
    assert allowed or (option == "kl_weight" and isinstance(value, Tensor)), (option, value)
    assert isinstance(found, Tensor)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda v: type(v).__name__)
def test_the_other_numbers_are_refused_too(value: Any) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: triplet_loss(LOGITS[0], torch.tensor(LABELS), value),
        lambda: triplet_loss(LOGITS[0], value, 0.3),
        lambda: triplet_loss(value, torch.tensor(LABELS), 0.3),
        lambda: peer_divergence(LOGITS, value),
        lambda: peer_divergence(value),
        lambda: mutual_loss(value, LABELS),
        lambda: linear_mutual_loss(value, EYE, LABELS),
        lambda: linear_mutual_loss(LOGITS, value, LABELS),
    ]
    if value is not None:
        calls += [
            lambda: linear_mutual_loss(LOGITS, EYE, LABELS, value),
            lambda: linear_mutual_loss(LOGITS, EYE, LABELS, chunk_rows=value),
            lambda: mutual_loss(LOGITS, LABELS, class_dim=value),
        ]
    for call in calls:
        with pytest.raises(UserError) as caught:
            call()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


# Logits as networks give them.


def test_a_generator_of_logits_is_a_list_of_them() -> None:
    losses, grads, _ = mutual_loss_and_grad(LOGITS, LABELS)
    found = mutual_loss_and_grad((z for z in LOGITS), LABELS)
    assert torch.equal(found[0], losses)
    assert all(torch.equal(a, b) for a, b in zip(found[1], grads, strict=True))
    leaves = [z.clone().requires_grad_() for z in LOGITS]
    mutual_loss(iter(leaves), LABELS).sum().backward()
    torch.testing.assert_close([z.grad for z in leaves], grads)
    taught = mutual_loss(LOGITS, LABELS, teacher_logits=iter(LOGITS))
    assert torch.equal(taught, mutual_loss(LOGITS, LABELS, teacher_logits=LOGITS))
    assert torch.equal(peer_divergence(iter(LOGITS)), peer_divergence(LOGITS))
    assert torch.equal(by_heads(iter(LOGITS), LABELS), by_heads(LOGITS, LABELS))


class Output(dict[str, Tensor]):
    """As of Hugging Face: a dictionary with attributes."""

    logits: Tensor


def test_outputs_are_named_without_their_content() -> None:
    output = Output(logits=LOGITS[0])
    output.logits = LOGITS[0]
    plain = SimpleNamespace(logits=LOGITS[0])
    for logits in (
        [output, output],
        {"a": LOGITS[0]},
        output,
        [{"logits": LOGITS[0]}] * 2,
        [plain],
    ):
        for call in (mutual_loss, mutual_loss_and_grad, by_heads):
            with pytest.raises(UserError) as caught:
                call(logits, LABELS)
            assert "tensor(" not in str(caught.value) and len(str(caught.value)) < 200
        with pytest.raises(UserError, match=r"\[output.logits for output in outputs\]"):
            mutual_loss(logits, LABELS)
        with pytest.raises(UserError, match=r"\[output.logits for output in outputs\]"):
            mutual_loss(LOGITS, LABELS, teacher_logits=logits)
    with pytest.raises(UserError, match=r"logits\[1\] is a tuple"):
        mutual_loss([LOGITS[0], (LOGITS[0], LOGITS[1])], LABELS)


def test_sparse_and_nested_tensors_are_refused() -> None:
    target = torch.tensor(LABELS)
    nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(1, 3)])
    for odd in (LOGITS[0].to_sparse(), LOGITS[0].to_sparse_csr(), nested, LOGITS[0].to_mkldnn()):
        calls: list[Callable[[], Any]] = [
            lambda z=odd: mutual_loss([z, z], target),
            lambda z=odd: mutual_loss_and_grad([LOGITS[0], z], target),
            lambda z=odd: mutual_loss(LOGITS, target, teacher_logits=[z]),
            lambda z=odd: mutual_loss(LOGITS, z),
            lambda z=odd: by_heads([z, z], target),
            lambda z=odd: linear_mutual_loss(LOGITS, [z, z], target),
            lambda z=odd: peer_divergence([z, z]),
            lambda z=odd: triplet_loss(z, target, 0.3),
        ]
        for call in calls:
            with pytest.raises(UserError, match=r"dense tensor|padded"):
                call()
    stack = torch.stack(LOGITS).to_sparse()
    with pytest.raises(UserError, match=r"logits has the layout sparse_coo: .*to_dense"):
        mutual_loss(stack, target)
