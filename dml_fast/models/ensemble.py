"""Several students as one network, which answers as ``python -m dml_fast.evaluate`` combines them.

Classes: the mean of the students' probabilities, which are softmax, or the sigmoid where a row may
have several labels. Identities: the students' embeddings, each at length 1, side by side. Codes:
side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dml_fast.models.embedding import EmbeddingNet
from dml_fast.models.hashing import HashNet, pack_codes

Answer = Literal["probabilities", "labels", "embeddings", "codes"]


class EnsembleNet(nn.Module):
    """K students that answer together, in evaluation mode.

    Args:
        students: K networks. For embeddings each is an `EmbeddingNet`, or a network whose output is
            the embedding; for codes each is a `HashNet`.
        views: which of the inputs each student reads, from 0.
        answer: what the output is, see `forward`.
    """

    def __init__(self, students: Sequence[nn.Module], views: Sequence[int], answer: Answer) -> None:
        super().__init__()
        self.students = nn.ModuleList(students)
        self.views = tuple(views)
        self.answer = answer
        self.eval()

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return what the students say together.

        Args:
            inputs: V views of N rows, each (N, ...) float32.

        Returns:
            Probabilities (N, C), of labels each by itself; or embeddings (N, sum of D_k); or
            probabilities and codes, (N, ceil(K b / 8)) uint8, whose bits are those of the first
            student, then of the second, and so on: see `dml_fast.models.hashing.pack_codes`.
        """
        if self.answer == "embeddings":
            return torch.cat([_unit(_embedding(net, x)) for net, x in self._pairs(inputs)], 1)
        if self.answer == "labels":
            each = [net(x).float().sigmoid() for net, x in self._pairs(inputs)]
            return torch.stack(each).mean(0)
        if self.answer == "probabilities":
            return _mean([net(x) for net, x in self._pairs(inputs)])
        found = [_coded(net, x) for net, x in self._pairs(inputs)]
        return _mean([z for _, z in found]), pack_codes(torch.cat([u for u, _ in found], 1))

    def before_signs(self, *inputs: Tensor) -> Tensor:
        """Return the numbers whose signs are the bits of the codes, (N, K b) floats."""
        return torch.cat([_coded(net, x)[0] for net, x in self._pairs(inputs)], 1)

    def _pairs(self, inputs: Sequence[Tensor]) -> list[tuple[nn.Module, Tensor]]:
        return [(net, inputs[v]) for net, v in zip(self.students, self.views, strict=True)]


def _mean(logits: Sequence[Tensor]) -> Tensor:
    return torch.stack([z.float().softmax(1) for z in logits]).mean(0)


def _embedding(net: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = net.embed(x) if isinstance(net, EmbeddingNet) else net(x)
    return found


def _unit(features: Tensor) -> Tensor:
    """Return rows at length 1; a row of zeros stays."""
    length = features.norm(dim=1, keepdim=True)
    return features / torch.where(length > 0, length, 1.0)


def _coded(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    assert isinstance(net, HashNet)
    return net.features_and_logits(x)
