"""What stands on a student's backbone: a classifier, a BNNeck, or a code of bits.

Importing this module does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Literal, get_args

from dml_fast.errors import UserError, check_choice, check_number
from dml_fast.models.inputs import InputSpec
from dml_fast.models.registry import create_model

if TYPE_CHECKING:
    from torch import nn

HeadKind = Literal["linear", "bnneck", "hash"]

MOST_BITS = 8 * 8184
"""The longest code that `dml_fast.eval.rank_hamming` ranks."""


@dataclass(frozen=True)
class Head:
    """The head of a student.

    Attributes:
        kind: linear: the network's own classifier; bnneck: that of
            `dml_fast.models.embedding.EmbeddingNet`; hash: `dml_fast.models.hashing.HashNet`.
        bits: length of a code, for hash; 0 for the others.

    Raises:
        UserError: the kind is unknown, or the bits do not fit it.
    """

    kind: HeadKind
    bits: int = 0

    def __post_init__(self) -> None:
        check_choice("the kind of a head", self.kind, get_args(HeadKind))
        if self.kind == "hash":
            check_bits(self.bits)
        elif self.bits:
            raise UserError(f"a head of kind {self.kind} has no bits and got {self.bits}: give 0")

    @property
    def embeds(self) -> bool:
        """Whether the network has ``embed``, by which rows are ranked."""
        return self.kind != "linear"


LINEAR = Head("linear")


def check_bits(bits: object, name: str = "bits") -> None:
    """Refuse a length of codes that cannot be ranked.

    Raises:
        UserError: it is no whole number from 1 to `MOST_BITS`.
    """
    words = f"a whole number from 1 to {MOST_BITS}"
    check_number(name, bits, words, lambda n: isinstance(n, Integral) and 1 <= int(n) <= MOST_BITS)


def new_network(name: str, num_classes: int, inputs: InputSpec, head: Head) -> nn.Module:
    """Build a student's network, initialised from torch's global random generator only.

    Args:
        name: as in `dml_fast.models.create_model`.
        num_classes: of classes or identities.
        inputs: what it gets.
        head: what stands on its backbone.

    Raises:
        UserError: as `create_model`; or the network has no classifier to put the head in place of.
    """
    if not head.embeds:
        return create_model(name, num_classes=num_classes, inputs=inputs)
    from dml_fast.models.embedding import EmbeddingNet, create_backbone
    from dml_fast.models.hashing import HashNet

    backbone, width = create_backbone(name, num_classes, inputs)
    if head.kind == "hash":
        return HashNet(backbone, width, head.bits, num_classes)
    return EmbeddingNet(backbone, width, num_classes)
