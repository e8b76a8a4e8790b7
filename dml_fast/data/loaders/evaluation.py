"""Batches for evaluation: each row once and in order, from memory or from files."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import numpy as np
import torch

from dml_fast.data.files import ImageFiles
from dml_fast.data.loaders.assemble import Batch, as_targets, to_nchw
from dml_fast.data.loaders.augment import Normalizer
from dml_fast.data.loaders.decoder import Request
from dml_fast.data.loaders.pairs import pair_batches
from dml_fast.data.loaders.stream import open_decoder
from dml_fast.data.loaders.vectors import vector_batches
from dml_fast.data.pairs import PairSet
from dml_fast.data.sampling import sequential
from dml_fast.data.sets import ImageSet, Part, RetrievalSet
from dml_fast.data.storage import Ids
from dml_fast.data.vectors import VectorSet
from dml_fast.errors import check_whole


def evaluation_batches(
    part: Part,
    *,
    batch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    channels_last: bool = True,
    students: Sequence[int] = (0,),
    rank: int = 0,
    ranks: int = 1,
) -> Generator[Batch]:
    """Yield every row once, in order, images normalised and not augmented.

    The last batch is short if N is not a multiple of ``batch_size``. Corrupt files, if they are
    skipped, are left out; in a `RetrievalSet` they become black images.

    Args:
        part: N images, vectors or pairs.
        batch_size: B, at least 1; it may exceed N.
        mean: C floats in units of 0..1; unused for vectors and pairs.
        std: likewise.
        device: where batches are made.
        channels_last: whether images are channels-last in memory, otherwise contiguous.
        students: the numbers of the students that the batches are for: with several views of
            vectors, ``inputs`` are one tensor for each of them.
        rank: the rank of this process, 0..ranks-1, which yields every R-th batch.
        ranks: R; all ranks together see each row once.

    Raises:
        UserError: a file is corrupt and that is not allowed, or sizes differ.
    """
    check_whole("batch_size", batch_size, 1)
    device = torch.device(device)
    if isinstance(part, VectorSet):
        yield from vector_batches(
            part, batch_size=batch_size, device=device, students=students, rank=rank, ranks=ranks
        )
        return
    if isinstance(part, PairSet):
        yield from pair_batches(part, batch_size=batch_size, device=device, rank=rank, ranks=ranks)
        return
    normalize = Normalizer(mean, std, device)
    order = sequential(len(part), batch_size, rank, ranks)
    for ids, images in _pixels(part, order, batch_size, device):
        inputs = to_nchw(normalize(images), channels_last)
        target = as_targets(part.labels[ids], device)
        yield Batch(inputs, target, torch.from_numpy(ids).to(device))


def _pixels(
    image_set: ImageSet, order: Iterator[Ids], batch_size: int, device: torch.device
) -> Iterator[tuple[Ids, torch.Tensor]]:
    """Yield the indices (B,) int64 and the pixels (B, H, W, C) uint8 of each batch."""
    images = image_set.images
    if not isinstance(images, ImageFiles):
        for ids in order:
            there = torch.as_tensor(images[ids[0] : ids[-1] + 1]).to(device)
            yield ids, there.permute(0, 2, 3, 1).contiguous()
        return
    size = min(batch_size, len(image_set))
    decoder = open_decoder(images, None, device=device, batch_size=size)
    try:
        for found in decoder.run(Request(ids) for ids in order):
            ids, (pixels,) = found.ids, found.images
            if (ids < 0).any():  # corrupt files, to be skipped
                if isinstance(image_set, RetrievalSet):  # each row must keep its place
                    ids = found.request.ids
                else:
                    whole = np.flatnonzero(ids >= 0)
                    ids, pixels = ids[whole], pixels[torch.from_numpy(whole).to(device)]
            if pixels.shape[3] == 1:  # with the strides of images in memory, which torch looks at
                pixels = pixels.view(len(pixels), 1, *pixels.shape[1:3]).permute(0, 2, 3, 1)
            yield ids, pixels
    finally:
        decoder.close()
        images.corrupt.report()
