"""Networks from timm and torchvision, where they are installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dml_fast.errors import UserError
from dml_fast.models import check_model_name, create_model

pytestmark = pytest.mark.zoo


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Such small work is slower on more threads, and much slower on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("timm:resnet10t", (1, 32, 32)),
        ("timm:vit_tiny_patch16_224", (3, 32, 64)),  # needs the size of its images
        ("torchvision:resnet18", (3, 32, 64)),
        ("torchvision:vit_b_32", (3, 32, 32)),
        ("torchvision:googlenet", (3, 64, 64)),  # with auxiliary heads it would return a tuple
    ],
)
def test_trains_a_step(name: str, shape: tuple[int, int, int]) -> None:
    check_model_name(name)
    net = create_model(name, num_classes=7, in_channels=shape[0], image_size=shape[1:])
    assert net.training
    assert all(int(b) == 0 for n, b in net.named_buffers() if n.endswith("num_batches_tracked"))
    logits = net(torch.randn(2, *shape))
    assert logits.shape == (2, 7)
    F.cross_entropy(logits, torch.tensor([0, 6])).backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("name", ["timm:resnet10t", "torchvision:shufflenet_v2_x0_5"])
def test_differ_through_the_generator_alone(name: str) -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        net = create_model(name, num_classes=7)
        return [p.detach() for p in net.parameters() if p.dim() > 1]

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm:resnet1o", {}, "timm has no network 'resnet1o': the nearest are resnet"),
        ("torchvision:resnet81", {}, "torchvision has no network 'resnet81': the nearest"),
        ("torchvision:fcn_resnet50", {}, "torchvision has no network"),  # a segmenter
        ("torchvision:resnet18", {"in_channels": 1}, "takes images of 3 channels and these have 1"),
        ("torchvision:vit_b_32", {"image_size": (32, 64)}, "square images and these are 32 x 64"),
        ("torchvision:vit_b_32", {"image_size": 40}, "3 x 40 x 40: cannot be built"),
        ("torchvision:alexnet", {"image_size": 8}, "3 x 8 x 8: its forward pass failed"),
        ("timm:vit_tiny_patch16_224", {"image_size": 8}, "timm:vit_tiny_patch16_224 with images"),
    ],
)
def test_misfits_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model(name, num_classes=7, **options)
