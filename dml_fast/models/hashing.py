"""Networks whose output is a code of bits, by which rows are found (supervised hashing)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dml_fast.errors import UserError, brief, check_whole
from dml_fast.models.base import initialise


class HashNet(nn.Module):
    """A backbone, b numbers u whose signs are a code, and a classifier that reads tanh u.

    u is normalised over the batch, so that each bit is 1 for about half of the rows. Without this
    the codes of a loss on distances (`dml_fast.MIHashLoss`) collapse.

    Args:
        backbone: inputs (N, ...) to features (N, D).
        num_features: D.
        bits: b; `dml_fast.eval.rank_hamming` ranks at most 65,472.
        num_classes: of classes or identities to learn.

    Raises:
        UserError: ``bits`` is no such number.
    """

    def __init__(self, backbone: nn.Module, num_features: int, bits: int, num_classes: int) -> None:
        super().__init__()
        check_whole("bits", bits, 1)
        self.num_features = num_features
        self.bits = bits
        self.backbone = backbone
        self.project = nn.Linear(num_features, bits, bias=False)  # the normalisation takes it out
        self.norm = nn.BatchNorm1d(bits)
        self.classifier = nn.Linear(bits, num_classes)
        initialise(self.project)
        initialise(self.classifier)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of inputs: (N, ...) to (N, num_classes)."""
        return self.features_and_logits(x)[1]

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return u, (N, b), and logits, (N, num_classes)."""
        u: Tensor = self.norm(self.project(self.backbone(x)))
        logits: Tensor = self.classifier(u.tanh())
        return u, logits

    def codes(self, x: Tensor) -> Tensor:
        """Return the codes of inputs, (N, ceil(b / 8)) uint8: see `pack_codes`."""
        return pack_codes(self.features_and_logits(x)[0])

    def embed(self, x: Tensor) -> Tensor:
        """Return the bits of codes as numbers, +1 for 1 and -1 for 0: (N, b) float32.

        So the cosine distance of two rows is 2 / b times the Hamming distance of their codes. What
        is not finite in u stays so, and is no code.
        """
        return signs(self.features_and_logits(x)[0])


def signs(u: Tensor) -> Tensor:
    """Return +1 where u > 0 and -1 elsewhere, float32; what is not finite stays."""
    u = u.float()
    return torch.where(u.isfinite(), (u > 0) * 2.0 - 1.0, u)


def pack_codes(u: Tensor) -> Tensor:
    """Pack the signs of numbers into bytes, as ``np.packbits(u > 0, axis=1)`` does.

    Args:
        u: (N, b) floats. Bit j of a row is 1 where u_j > 0; a 0 and a NaN give 0.

    Returns:
        (N, ceil(b / 8)) uint8: bit 0 is the highest of the first byte, and the last byte is filled
        up with zeros. `dml_fast.eval.rank_hamming` ranks such codes.

    Raises:
        UserError: ``u`` is no such tensor.
    """
    if not isinstance(u, Tensor) or u.ndim != 2 or not u.is_floating_point():
        raise UserError(f"pack_codes got {brief(u)}: give a tensor (N, b) of floats")
    bits = F.pad((u > 0).to(torch.int32), (0, -u.shape[1] % 8))
    places = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.int32, device=u.device)
    return (bits.reshape(u.shape[0], -1, 8) * places).sum(-1).to(torch.uint8)


class CodedNet(nn.Module):
    """A `HashNet` as it is used elsewhere: inputs (N, ...) to logits and codes, see `codes`."""

    def __init__(self, net: HashNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (N, C) and codes (N, ceil(b / 8)) uint8."""
        u, logits = self.net.features_and_logits(x)
        return logits, pack_codes(u)

    def before_signs(self, x: Tensor) -> Tensor:
        """Return u, (N, b), whose signs are the bits of the codes."""
        return self.net.features_and_logits(x)[0]
