"""What the streaming loader asks of a decoder: the contract of `dali` and `threads`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from torch import Tensor

from dml_fast.data.boxes import Boxes
from dml_fast.data.corrupt import BadImage
from dml_fast.data.files import ImageFiles
from dml_fast.data.plan import BatchPlan
from dml_fast.data.storage import CorruptImageError, Ids
from dml_fast.errors import UserError

T = TypeVar("T")


class Request(NamedTuple):
    """Images that are wanted.

    Attributes:
        ids: (B,) which.
        plan: None, or says which parts of them; whole images are brought to their size.
    """

    ids: Ids
    plan: BatchPlan | None = None

    @property
    def cut(self) -> bool:
        """Whether parts are wanted, of each image one a view."""
        return self.plan is not None and self.plan.resized is not None

    def boxes(self, heights: Boxes, widths: Boxes) -> Boxes:
        """The parts (V, 4, B) for images of these sizes."""
        assert self.plan is not None
        return self.plan.boxes(heights, widths)


class Decoded(NamedTuple):
    """What was decoded.

    Attributes:
        request: what it answers.
        ids: (B,) which images they are; others than wanted where files were corrupt, -1 for none.
        images: (B, H, W, 3) uint8 on the device; one tensor, or one a view.
    """

    request: Request
    ids: Ids
    images: list[Tensor]


class Decoder(Protocol):
    """Decodes requests in order, some of them ahead."""

    def run(self, requests: Iterator[Request]) -> Generator[Decoded]:
        """Answers each request; the tensors are the caller's until the next is asked for."""
        ...

    def close(self) -> None:
        """Ends threads and frees memory."""
        ...


class Source:
    """Files by index; a corrupt one is replaced by the next good one of its label, else by any.

    What replaces it is a function of the files alone, so that resumed runs see the same images.

    Args:
        images: N files.
        labels: None: nothing is replaced, and -1 is what is found in a corrupt file's place.
    """

    def __init__(self, images: ImageFiles, labels: Ids | None = None) -> None:
        self.images, self._labels = images, labels

    def find(self, index: int, read: Callable[[int], T]) -> tuple[int, T | None]:
        """Reads a file, or the one that replaces it.

        Args:
            index: which.
            read: raises CorruptImageError for a file that cannot be decoded.

        Returns:
            The index of the file that was read, and what ``read`` gave; or -1 and None.

        Raises:
            UserError: corrupt files are not allowed, or none is whole.
        """
        corrupt = self.images.corrupt
        for candidate in self._candidates(index):
            if corrupt.reasons and self.images.files.path(candidate) in corrupt.reasons:
                continue
            try:
                return candidate, read(candidate)
            except CorruptImageError as error:
                corrupt.add(BadImage(self.images.files.path(candidate), str(error)))
        if self._labels is None:
            return -1, None
        raise UserError(
            f"none of {len(self.images)} images, {self.images.files.path(0)} first, can be "
            "decoded: replace them"
        )

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        if self._labels is None:
            return
        following = np.roll(np.arange(len(self.images)), -index)[1:]
        alike = self._labels[following] == self._labels[index]
        yield from following[alike].tolist()
        yield from following[~alike].tolist()
