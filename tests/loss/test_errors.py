"""Every mistake is one sentence with the numbers in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dml_fast.errors import UserError
from dml_fast.loss import FusedMutualLoss, mutual_loss, mutual_loss_and_grad

LOGITS = [torch.zeros(4, 3), torch.ones(4, 3)]
TARGET = torch.tensor([0, 1, 2, 0])
THIRD = torch.zeros(4, 3)

CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "no students": ({"logits": []}, "logits is empty"),
    "flat tensor": ({"logits": torch.zeros(4)}, r"one tensor of shape \(4,\)"),
    "no classes": ({"logits": [torch.zeros(4, 0)]}, r"shape \(4, 0\): no classes"),
    "integers": ({"logits": [TARGET.view(2, 2)]}, r"logits\[0\] is int64 of shape \(2, 2\)"),
    "not a tensor": ({"logits": [[1.0, 2.0]]}, r"logits\[0\] is a list"),
    "shapes": (
        {"logits": [*LOGITS, torch.zeros(4, 5)]},
        r"logits\[2\] has shape \(4, 5\) and logits\[0\] \(4, 3\)",
    ),
    "devices": (
        {"logits": [LOGITS[0], torch.zeros(4, 3, device="meta")]},
        r"logits\[1\] is on meta and logits\[0\] on cpu",
    ),
    "dtypes": (
        {"logits": [LOGITS[0], LOGITS[1].double()]},
        r"logits\[1\] is float64 and logits\[0\] is float32",
    ),
    "target length": ({"target": TARGET[:3]}, r"target of classes has shape \(3,\).* \(4,\)"),
    "target shape": ({"target": torch.rand(4)}, r"target of probabilities has shape \(4,\)"),
    "target dtype": ({"target": TARGET > 0}, "target is bool"),
    "target on another device": ({"target": TARGET.to("meta")}, "target of classes is on meta"),
    "target too large": (
        {"target": torch.tensor([0, 1, 3, 0])},
        r"target 3 in row 2 is not a class: with C = 3 classes use 0 to 2, or ignore_index",
    ),
    "target negative": ({"target": torch.tensor([0, -1, 2, 0])}, "target -1 in row 1"),
    "target learns": ({"target": torch.rand(4, 3, requires_grad=True)}, "requires a gradient"),
    "ignore_index elsewhere": (
        {"target": torch.tensor([0, -100, 2, 0]), "ignore_index": -1},
        "target -100 in row 1",
    ),
    "temperature": ({"temperature": 0.0}, "temperature is 0.0"),
    "temperature nan": ({"temperature": float("nan")}, "temperature is nan"),
    "label smoothing": ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
    "kl_weight": ({"kl_weight": float("inf")}, "kl_weight is inf"),
    "kl_weight shape": ({"kl_weight": torch.ones(2)}, r"kl_weight has shape \(2,\)"),
    "kl_weight elsewhere": (
        {"kl_weight": torch.ones((), device="meta")},
        "kl_weight is on meta and the logits on cpu",
    ),
    "kl_weight learns": (
        {"kl_weight": torch.ones((), requires_grad=True)},
        "kl_weight requires a gradient",
    ),
    "class weight": ({"class_weight": torch.ones(4)}, r"class_weight has shape \(4,\).* \(3,\)"),
    "row weight": ({"row_weight": torch.ones(3)}, r"row_weight has shape \(3,\).* \(4,\)"),
    "peer weight": (
        {"peer_weight": torch.ones(2, 2), "teacher_logits": [THIRD]},
        r"peer_weight has shape \(2, 2\): it must be \(2, 3\)",
    ),
    "peer weight learns": (
        {"peer_weight": torch.ones(2, 2, requires_grad=True)},
        "peer_weight requires a gradient",
    ),
    "teacher shape": (
        {"teacher_logits": [THIRD, torch.zeros(4, 2)]},
        r"teacher_logits\[1\] has shape \(4, 2\)",
    ),
    "teacher dtype": ({"teacher_logits": [TARGET]}, r"teacher_logits\[0\] is int64"),
    "peer reduction": (
        {"peer_reduction": "max"},
        "peer_reduction is 'max', which is none of mean, sum",
    ),
    "reduction": ({"reduction": "batchmean"}, "reduction is 'batchmean'"),
    "backend": ({"backend": "cuda"}, "backend is 'cuda', which is none of auto, closed_form"),
}


@pytest.mark.parametrize("door", [mutual_loss, mutual_loss_and_grad])
@pytest.mark.parametrize("mistake", CALLS)
def test_a_mistake_is_named_with_its_numbers(mistake: str, door: Any) -> None:
    options, message = CALLS[mistake]
    call: dict[str, Any] = {"logits": LOGITS, "target": TARGET, **options}
    with pytest.raises(UserError, match=message) as caught:
        door(**call)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "mistake",
    ["temperature", "label smoothing", "kl_weight", "peer reduction", "reduction", "backend"],
)
def test_the_module_refuses_options_when_it_is_made(mistake: str) -> None:
    options, message = CALLS[mistake]
    with pytest.raises(UserError, match=message):
        FusedMutualLoss(**options)


def test_the_row_of_a_wrong_target_counts_flattened_rows() -> None:
    target = torch.tensor([[0, 1], [7, 0]])
    with pytest.raises(UserError, match="target 7 in row 2"):
        mutual_loss([torch.zeros(2, 2, 3)], target)


def test_grad_scale_has_one_number_or_one_a_student() -> None:
    with pytest.raises(UserError, match="grad_scale is on meta and the logits on cpu"):
        mutual_loss_and_grad(LOGITS, TARGET, grad_scale=torch.ones((), device="meta"))
    with pytest.raises(UserError, match=r"grad_scale has shape \(3,\): it must be \(\) or \(2,\)"):
        mutual_loss_and_grad(LOGITS, TARGET, grad_scale=torch.ones(3))


def test_an_ignored_index_may_be_any_number() -> None:
    target = torch.tensor([0, 255, 2, -7], dtype=torch.int16)
    with pytest.raises(UserError, match="target -7 in row 3"):
        mutual_loss(LOGITS, target, ignore_index=255)
    target[3] = 1
    assert mutual_loss(LOGITS, target, ignore_index=255).isfinite().all()
