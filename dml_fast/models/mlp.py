"""A perceptron of one hidden layer, for vectors: embeddings, features of a text, measurements."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dml_fast.models.base import FeatureNet, initialise


class MLP(FeatureNet):
    """A linear layer, ReLU, dropout and a linear classifier; D = width.

    Args:
        size: of the vectors.
        width: of the hidden layer.
        num_classes: C.
        dropout: probability that a hidden unit is 0 in training.
    """

    def __init__(self, size: int, width: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(size, width)
        self.dropout = nn.Dropout(dropout)
        self.num_features = width
        self.classifier = nn.Linear(width, num_classes)
        initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return features of vectors: (N, size) to (N, width)."""
        features: Tensor = self.dropout(F.relu(self.hidden(x)))
        return features


def mlp(*, width: int, num_classes: int, size: int, dropout: float = 0.2) -> MLP:
    """Build a perceptron; see `dml_fast.models.create_model`."""
    return MLP(size, width, num_classes, dropout)
