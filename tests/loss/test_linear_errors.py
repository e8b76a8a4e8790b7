"""Every mistake with linear heads is one sentence with the numbers in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dml_fast.errors import UserError
from dml_fast.loss.linear import FusedLinearMutualLoss, linear_mutual_loss

HIDDEN = [torch.zeros(4, 2), torch.ones(4, 5)]
WEIGHT = [torch.zeros(3, 2), torch.ones(3, 5)]
BIAS = [torch.zeros(3), None]
TARGET = torch.tensor([0, 1, 2, 0])

CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "no students": ({"hidden": [], "weight": [], "bias": None}, "hidden is empty"),
    "weights": ({"weight": WEIGHT[:1]}, "weight has 1 entries and hidden 2: pass the same number"),
    "one weight": ({"weight": WEIGHT[0]}, "weight has 3 entries and hidden 2"),
    "layers": ({"weight": [torch.nn.Linear(2, 3)] * 2}, r"weight\[0\] is a Linear: pass tensors"),
    "no weight": ({"weight": [WEIGHT[0], None]}, r"weight\[1\] is None: pass tensors"),
    "biases": ({"bias": [*BIAS, None]}, "bias has 3 entries and hidden 2"),
    "integers": ({"hidden": [TARGET.view(4, 1), HIDDEN[1]]}, r"hidden\[0\] is torch.int64"),
    "batches": (
        {"hidden": [HIDDEN[0], torch.zeros(3, 5)]},
        r"hidden\[1\] has shape \(3, 5\) and hidden\[0\] \(4, 2\): all must see the same batch",
    ),
    "devices": (
        {"hidden": [HIDDEN[0], torch.zeros(4, 5, device="meta")]},
        r"hidden\[1\] is on meta and hidden\[0\] on cpu",
    ),
    "features": (
        {"weight": [WEIGHT[0], torch.zeros(3, 4)]},
        r"weight\[1\] has shape \(3, 4\): it must be \(3, 5\) \(classes x features\)",
    ),
    "classes": ({"weight": [WEIGHT[0], torch.zeros(4, 5)]}, r"weight\[1\] has shape \(4, 5\)"),
    "transposed": ({"weight": [w.t() for w in WEIGHT]}, r"weight\[0\] has shape \(2, 3\).* \(2, 2"),
    "flat weight": ({"weight": [torch.zeros(()), WEIGHT[1]]}, r"weight\[0\] has shape \(\)"),
    "no classes": (
        {"weight": [w[:0] for w in WEIGHT], "bias": None},
        r"weight\[0\] has shape \(0, 2\): no classes",
    ),
    "weight elsewhere": (
        {"weight": [WEIGHT[0], WEIGHT[1].to("meta")]},
        r"weight\[1\] is on meta and hidden\[1\] on cpu",
    ),
    "weight dtype": (
        {"weight": [WEIGHT[0], WEIGHT[1].half()]},
        r"weight\[1\] is torch.float16 and hidden\[1\] torch.float32: cast one, or use autocast",
    ),
    "bias": ({"bias": [None, torch.zeros(4)]}, r"bias\[1\] has shape \(4,\): it must be \(3,\)"),
    "some in float64": (
        {"hidden": [HIDDEN[0], HIDDEN[1].double()], "weight": [WEIGHT[0], WEIGHT[1].double()]},
        "is float64 and .* is float32: give all students float64 or none",
    ),
    "teachers without weights": (
        {"teacher_hidden": HIDDEN},
        "teacher_weight has 0 entries and teacher_hidden 2",
    ),
    "teacher bias": (
        {"teacher_bias": BIAS},
        "teacher_bias has 2 entries and teacher_hidden 0",
    ),
    "teacher features": (
        {"teacher_hidden": HIDDEN, "teacher_weight": WEIGHT[::-1]},
        r"teacher_weight\[0\] has shape \(3, 5\): it must be \(3, 2\)",
    ),
    "teacher classes": (
        {"teacher_hidden": HIDDEN, "teacher_weight": [w[:2] for w in WEIGHT]},
        r"teacher_logits\[0\] has shape \(4, 2\) and logits\[0\] \(4, 3\)",
    ),
    "target": ({"target": torch.tensor([0, 1, 3, 0])}, "target 3 in row 2 is not a class"),
    "temperature": ({"temperature": 0.0}, "temperature is 0.0"),
    "backend": ({"backend": "cuda"}, "backend is 'cuda', which is none of auto"),
    "chunk_rows": ({"chunk_rows": 0}, "chunk_rows is 0: give a whole number of at least 1"),
}


@pytest.mark.parametrize("mistake", CALLS)
def test_a_mistake_is_named_with_its_numbers(mistake: str) -> None:
    options, message = CALLS[mistake]
    call: dict[str, Any] = {"hidden": HIDDEN, "weight": WEIGHT, "target": TARGET, "bias": BIAS}
    assert linear_mutual_loss(**call).isfinite().all()
    with pytest.raises(UserError, match=message) as caught:
        linear_mutual_loss(**{**call, **options})
    assert "\n" not in str(caught.value)


def test_autocast_does_not_take_half_of_a_double() -> None:
    hidden = [HIDDEN[0].double()]
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(
            UserError, match=r"weight\[0\] is torch.float32 and hidden\[0\] torch.float64"
        ),
    ):
        linear_mutual_loss(hidden, WEIGHT[:1], TARGET)


@pytest.mark.parametrize("mistake", ["temperature", "backend", "chunk_rows"])
def test_the_module_refuses_options_when_it_is_made(mistake: str) -> None:
    options, message = CALLS[mistake]
    with pytest.raises(UserError, match=message):
        FusedLinearMutualLoss(**options)
