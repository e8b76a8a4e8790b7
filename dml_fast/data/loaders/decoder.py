"""The interface between the streaming loader and its decoders, `dali` and `threads`."""

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
    """Images to decode.

    Attributes:
        ids: (B,) int64, the indices of the images.
        plan: None, or the plan that says which parts of them to show. Otherwise whole images are
            brought to `ImageFiles.size`.
    """

    ids: Ids
    plan: BatchPlan | None = None

    @property
    def cut(self) -> bool:
        """Whether parts of the images are wanted: one of each image for each view."""
        return self.plan is not None and self.plan.resized is not None

    def boxes(self, heights: Boxes, widths: Boxes) -> Boxes:
        """Return the parts, (V, 4, B) int64, for heights and widths (B,) int64 in pixels."""
        assert self.plan is not None
        return self.plan.boxes(heights, widths)


class Decoded(NamedTuple):
    """The decoded images of a request.

    Attributes:
        request: the request that this answers.
        ids: (B,) int64, the indices of the images. They differ from those of the request where
            files were corrupt: the index of the image that replaces it, or -1 for none.
        images: (B, H, W, 3) uint8 on the device; one tensor, or one for each view.
    """

    request: Request
    ids: Ids
    images: list[Tensor]


class Decoder(Protocol):
    """A decoder of requests, in order and some of them in advance."""

    def run(self, requests: Iterator[Request]) -> Generator[Decoded]:
        """Answer each request. The tensors are valid until the next answer is asked for."""
        ...

    def close(self) -> None:
        """End threads and free memory."""
        ...


class Source:
    """Files by index; a corrupt file is replaced by the next whole one, of its label if possible.

    An image with a label is never replaced by one without, nor the other way round. The replacement
    depends on the files alone, so that resumed runs see the same images.

    Args:
        images: N files.
        labels: (N,) int64; None to replace nothing: then the index of a corrupt file becomes -1.
    """

    def __init__(self, images: ImageFiles, labels: Ids | None = None) -> None:
        self.images, self._labels = images, labels

    def find(self, index: int, read: Callable[[int], T]) -> tuple[int, T | None]:
        """Read a file, or the one that replaces it.

        Args:
            index: the index of the file.
            read: reads the file of an index, and raises CorruptImageError if it cannot be decoded.

        Returns:
            The index of the file that was read, and the result of ``read``; or -1 and None.

        Raises:
            UserError: corrupt files are not allowed, or all files are corrupt.
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
        kind = (self._labels < 0) == (self._labels[index] < 0)
        words = " without a label" if self._labels[index] < 0 else " with a label"
        which = "" if kind.all() else words
        first = self.images.files.path(int(np.flatnonzero(kind)[0]))
        raise UserError(
            f"none of {int(kind.sum())} images{which}, {first} first, can be decoded: replace them"
        )

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        if self._labels is None:
            return
        following = np.roll(np.arange(len(self.images)), -index)[1:]
        own = self._labels[index]
        # never one with a label for one without: batches have a fixed number of each
        following = following[(self._labels[following] < 0) == (own < 0)]
        alike = self._labels[following] == own
        yield from following[alike].tolist()
        yield from following[~alike].tolist()
