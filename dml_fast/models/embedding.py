"""Networks for retrieval: any backbone with a BNNeck (Luo et al., CVPRW 2019, arXiv 1903.07071)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dml_fast.errors import UserError, first_line
from dml_fast.models.inputs import InputSpec
from dml_fast.models.registry import create_model


class EmbeddingNet(nn.Module):
    """A backbone, batch normalisation without a shift, and a linear classifier without a bias.

    A triplet loss uses the features before the neck; the classifier and the ranking use those after
    it.

    Args:
        backbone: images (N, C, H, W) to features (N, D).
        num_features: D.
        num_classes: number of identities to learn.
    """

    def __init__(self, backbone: nn.Module, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.backbone = backbone
        self.neck = nn.BatchNorm1d(num_features)
        self.neck.bias.requires_grad_(False)
        self.classifier = nn.Linear(num_features, num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of images: (N, C, H, W) to (N, num_classes)."""
        return self.features_and_logits(x)[1]

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features before the neck, (N, D), and logits, (N, num_classes)."""
        features: Tensor = self.backbone(x)
        logits: Tensor = self.classifier(self.neck(features))
        return features, logits

    def embed(self, x: Tensor) -> Tensor:
        """Return features after the neck, (N, D), by which images are ranked."""
        embedded: Tensor = self.neck(self.backbone(x))
        return embedded


def create_embedding_net(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int | tuple[int, int] = 32,
) -> EmbeddingNet:
    """Build a network by name, with a BNNeck in place of its classifier.

    The classifier of a timm network is what its ``reset_classifier(0)`` removes; of any other
    network it is the last `torch.nn.Linear` in the order of registration.

    Args:
        name: as in `dml_fast.models.create_model`.
        num_classes: number of identities to learn.
        in_channels: channels of the images.
        image_size: height and width in pixels; one number means a square.

    Raises:
        UserError: as `create_model`, or the network has no such classifier.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    inputs = InputSpec("image", (in_channels, *size))
    return EmbeddingNet(*create_backbone(name, num_classes, inputs), num_classes)


def create_backbone(name: str, num_classes: int, inputs: InputSpec) -> tuple[nn.Module, int]:
    """Build a network by name, without its classifier, which is found as above.

    Returns:
        The network, inputs (N, ...) to features (N, D), and D.

    Raises:
        UserError: as `create_embedding_net`.
    """
    backbone = create_model(name, num_classes=num_classes, inputs=inputs)
    _remove_classifier(backbone, num_classes, name)
    return backbone, _feature_width(backbone, (2, *inputs.tensor_shape), name)


def last_linear(net: nn.Module) -> str | None:
    """Return the name of the last linear layer in the order of registration, or None."""
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    return names[-1] if names else None


def classifier_of(model: nn.Module) -> nn.Module:
    """Return a trained network's classifier, whose input is its embedding of an image.

    That is the classifier of an `EmbeddingNet`, what timm's ``get_classifier()`` returns, or the
    last linear layer in the order of registration.

    Raises:
        UserError: there is none.
    """
    if isinstance(model, EmbeddingNet):
        return model.classifier
    get = getattr(model, "get_classifier", None)
    found = get() if callable(get) else model.get_submodule(last_linear(model) or "")
    if not isinstance(found, nn.Linear):
        raise UserError(
            f"{type(model).__name__} gives no embeddings: its last layer is not linear; leave out "
            "--features, or give another --student"
        )
    return found


def _remove_classifier(net: nn.Module, num_classes: int, name: str) -> None:
    reset = getattr(net, "reset_classifier", None)
    if callable(reset):
        reset(0)
        return
    found = last_linear(net)
    layer = net.get_submodule(found) if found else None
    if not found or not isinstance(layer, nn.Linear) or layer.out_features != num_classes:
        raise UserError(
            f"{name} cannot embed: its last linear layer is not a classifier of {num_classes} "
            "classes; choose another architecture"
        )
    parent, _, last = found.rpartition(".")
    setattr(net.get_submodule(parent), last, nn.Identity())


def _feature_width(net: nn.Module, shape: tuple[int, ...], name: str) -> int:
    """Return D, from two blank inputs; statistics and the random generator stay as they are."""
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        with torch.no_grad():
            device = next(net.parameters()).device
            features = net(torch.zeros(shape, device=device))
    except Exception as error:
        raise UserError(
            f"{name} cannot embed: without its classifier it fails ({first_line(error)}); "
            "choose another architecture"
        ) from error
    for module, training in modes.items():
        module.training = training
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise UserError(
            f"{name} cannot embed: without its classifier it does not give one vector per row; "
            "choose another architecture"
        )
    return features.shape[1]
