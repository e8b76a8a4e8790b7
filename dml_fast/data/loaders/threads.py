"""Decode with simplejpeg and Pillow in threads, for machines without DALI."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from dml_fast import _native
from dml_fast.data.decode import Pixels, decode_image
from dml_fast.data.loaders.decoder import Decoded, Request, Source
from dml_fast.data.storage import Ids

_AHEAD = 2  # batches that are decoded before they are asked for


class ThreadDecoder:
    """A decoder that works in threads, `_AHEAD` batches in advance.

    Args:
        source: the files.
        device: the device of the decoded pixels.
    """

    def __init__(self, source: Source, *, device: torch.device) -> None:
        self._source, self._device = source, device
        self._threads = source.images.threads
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")

    def run(self, requests: Iterator[Request]) -> Generator[Decoded]:
        """Answer each request, in order."""
        waiting: deque[tuple[Request, list[Future[tuple[Ids, Pixels]]]]] = deque()
        try:
            while True:
                while len(waiting) < _AHEAD + 1 and (request := next(requests, None)) is not None:
                    waiting.append((request, self._submit(request)))
                if not waiting:
                    return
                request, tasks = waiting.popleft()
                parts = [task.result() for task in tasks]
                ids = np.concatenate([ids for ids, _ in parts])
                pixels = torch.from_numpy(np.concatenate([pixels for _, pixels in parts], axis=1))
                if self._device.type == "cuda":
                    pixels = pixels.pin_memory().to(self._device, non_blocking=True)
                yield Decoded(request, ids, list(pixels))
        finally:
            for _, tasks in waiting:
                for task in tasks:
                    task.cancel()

    def close(self) -> None:
        """End the threads when they have decoded the images they work on."""
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, request: Request) -> list[Future[tuple[Ids, Pixels]]]:
        """Start a task for each thread."""
        rows = np.array_split(np.arange(len(request.ids)), self._threads)
        return [self._pool.submit(decode_rows, self._source, request, r) for r in rows if len(r)]


def decode_rows(source: Source, request: Request, rows: Ids) -> tuple[Ids, Pixels]:
    """Decode some of the images of a request.

    Args:
        source: the files.
        request: B images in V views.
        rows: (b,) int64, which of the B images to decode.

    Returns:
        (b,) int64 indices of the images that were decoded, and their pixels, (V, b, H, W, C) uint8;
        V is 1 if no parts are wanted.
    """
    images = source.images
    channels, height, width = images.shape[1:]
    if not request.cut:
        out = np.zeros((1, len(rows), height, width, channels), np.uint8)
        ids = np.empty(len(rows), np.int64)
        for place, index in enumerate(request.ids[rows].tolist()):
            ids[place], pixels = source.find(index, images.decoded)
            if pixels is not None:
                out[0, place] = pixels
        return ids, out
    found = [
        source.find(index, lambda chosen: decode_image(images.files.read(chosen)))
        for index in request.ids[rows].tolist()
    ]
    decoded = [pixels for _, pixels in found if pixels is not None]
    heights, widths = (np.zeros(len(request.ids), np.int64) + 1 for _ in range(2))
    heights[rows], widths[rows] = np.array([pixels.shape[:2] for pixels in decoded]).T
    boxes = request.boxes(heights, widths)[:, :, rows]
    made = _native.resize_parts(decoded, np.ascontiguousarray(boxes), height, width, threads=1)
    return np.array([index for index, _ in found]), made
