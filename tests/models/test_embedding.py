"""Networks for retrieval, and weights to start from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dml_fast.errors import UserError
from dml_fast.models import create_model, model_names
from dml_fast.models.embedding import classifier_of, create_embedding_net

SHAPE = {"num_classes": 7, "in_channels": 3}


OF_IMAGES = [name for name in model_names() if not name.startswith(("mlp_", "displacement_"))]


@pytest.mark.parametrize("name", OF_IMAGES)
def test_a_neck_takes_the_place_of_every_networks_classifier(name: str) -> None:
    if name.startswith("wrn_28"):
        pytest.skip("as wrn_16_4, and seconds slower")
    torch.manual_seed(0)
    net = create_embedding_net(name, image_size=(32, 16), **SHAPE)
    x = torch.randn(4, 3, 32, 16)
    features, logits = net.features_and_logits(x)
    assert features.shape == (4, net.num_features) and logits.shape == (4, 7)
    assert net.training and all(m.training for m in net.modules())
    assert net.classifier.bias is None
    assert not net.neck.bias.requires_grad and not net.neck.bias.any()
    plain = create_model(name, image_size=(32, 16), **SHAPE)
    shared = sum(p.numel() for p in plain.parameters()) - sum(
        p.numel() for p in net.backbone.parameters()
    )
    assert shared == 7 * net.num_features + 7  # the classifier, and nothing else


def test_the_classifier_is_found() -> None:
    """Of a BNNeck, as timm names it, or the last linear layer; another layer is refused."""
    neck = create_embedding_net("resnet8", image_size=16, **SHAPE)
    assert classifier_of(neck) is neck.classifier
    first, last, conv = nn.Linear(3, 7), nn.Linear(3, 7), nn.Conv2d(3, 7, 1)
    net = nn.Sequential(first, last)
    assert classifier_of(net) is last
    net.get_classifier = lambda: first  # type: ignore[assignment]
    assert classifier_of(net) is first
    net.get_classifier = lambda: conv  # type: ignore[assignment]
    for model in (net, nn.Sequential(conv)):
        with pytest.raises(
            UserError, match="Sequential gives no embeddings: its last layer is not"
        ):
            classifier_of(model)


def test_embeddings_are_what_the_classifier_sees() -> None:
    torch.manual_seed(0)
    net = create_embedding_net("resnet8", image_size=16, **SHAPE).eval()
    x = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(net(x), net.embed(x) @ net.classifier.weight.T)
        features = net.features_and_logits(x)[0]
        torch.testing.assert_close(net.neck(features), net.embed(x))


def test_building_one_changes_no_statistics() -> None:
    net = create_embedding_net("resnet8", image_size=16, **SHAPE)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_batches_tracked == 0


class Odd(nn.Module):
    """Ends in something that is not a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x).mean((2, 3))
        return out


def odd(num_classes: int, in_channels: int, image_size: tuple[int, int]) -> Odd:
    return Odd()


def test_a_network_without_a_classifier_is_refused() -> None:
    with pytest.raises(UserError, match="cannot embed: its last linear layer is not a classifier"):
        create_embedding_net(f"{__name__}:odd", image_size=8, **SHAPE)


@pytest.mark.zoo
def test_timms_networks_embed_and_resnet50_is_timms() -> None:
    net = create_embedding_net("resnet50", image_size=(64, 32), **SHAPE)
    assert net.num_features == 2048
    assert net.features_and_logits(torch.randn(2, 3, 64, 32))[1].shape == (2, 7)
    small = create_embedding_net("timm:mobilenetv3_small_050", image_size=64, **SHAPE)
    assert small(torch.randn(2, 3, 64, 64)).shape == (2, 7)
