"""Decode with NVIDIA DALI, on the CPU or the GPU, batch by batch.

DALI only decodes, cuts and resizes; the plan says what it is given, and in which order. DALI's own
readers would repeat or drop images at the end of an epoch.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterator
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from dml_fast import _native
from dml_fast.data.boxes import Boxes
from dml_fast.data.decode import fitted, size_error
from dml_fast.data.loaders.decoder import Decoded, Request, Source
from dml_fast.data.loaders.encoded import Encoded, as_ppm, encoded
from dml_fast.data.loaders.threads import decode_rows
from dml_fast.data.reading import require_dali
from dml_fast.data.storage import Ids
from dml_fast.errors import UserError

_AHEAD = 2  # batches that DALI decodes before they are asked for
_log = logging.getLogger("dml_fast")


class _Fed(NamedTuple):
    """A request that DALI works on: the images that were found, and the inputs of the pipeline."""

    request: Request
    ids: Ids
    inputs: dict[str, list[npt.NDArray[Any]]]
    boxes: Boxes | None  # (V, 4, B) parts of the decoded images that are cut out and resized here


class DaliDecoder:
    """A decoder that works in DALI's threads, `_AHEAD` batches in advance.

    Args:
        source: the files.
        device: the device of the decoded pixels; a GPU also decodes them.
        batch_size: the most images that a request may have.
        parts: how many parts of each image requests ask for, 0 for whole images.

    Raises:
        UserError: DALI is not installed, or the device is not available.
    """

    def __init__(
        self, source: Source, *, device: torch.device, batch_size: int, parts: int = 0
    ) -> None:
        require_dali()
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(
                f"images cannot be decoded on {device}, which is not available: give --device cpu"
            )
        self._source, self._device = source, device
        self._batch_size, self._parts = batch_size, parts
        # DALI's resizing on a CPU takes as long as decoding; ours a fraction of that
        self._resizes_here = bool(parts) and device.type == "cpu"
        # Only the part that is shown is decoded, to the same pixels. Damage elsewhere is not
        # noticed. If corrupt files may be replaced, all is decoded: which files are replaced must
        # not depend on the epoch.
        self._slices = parts == 1 and not source.images.corrupt.allowed
        self._pipe: Any = None
        self._by_pillow: set[int] = set()  # images of batches that DALI could not decode
        self._held: deque[tuple[Any, Any]] = deque()

    def run(self, requests: Iterator[Request]) -> Generator[Decoded]:
        """Answer each request, in order."""
        waiting: deque[_Fed] = deque()
        try:
            while True:
                while len(waiting) < _AHEAD and (request := next(requests, None)) is not None:
                    waiting.append(self._prepare(request))
                    self._feed(waiting[-1])
                if not waiting:
                    return
                fed = waiting[0]
                try:
                    outputs = self._outputs()
                    made = self._images(outputs, fed.boxes)
                except (
                    Exception
                ) as error:  # DALI raises errors of several types, which name no file
                    waiting.popleft()
                    yield self._decode_here(fed.request, error)
                    for later in waiting:
                        self._feed(later)
                    continue
                waiting.popleft()
                yield Decoded(fed.request, fed.ids, made)
                self._hold(outputs)
        finally:
            if waiting:  # a pipeline with unfinished batches cannot be used again
                self._pipe = None

    def close(self) -> None:
        """End DALI's threads and free its memory."""
        self._pipe = None
        self._held.clear()

    def _prepare(self, request: Request) -> _Fed:
        """Read the files of a request and compute the inputs of the pipeline."""
        images = self._source.images
        found: list[tuple[int, Encoded | None]] = []
        for index in request.ids.tolist():
            make = partial(self._encoded, by_pillow=index in self._by_pillow)
            found.append(self._source.find(index, make))
        blank = Encoded(_blank(*images.shape[2:]), *images.shape[2:])
        files = [blank if file is None else file for _, file in found]
        ids = np.array([index for index, _ in found], np.int64)
        inputs: dict[str, list[npt.NDArray[Any]]] = {"files": [file.data for file in files]}
        cut_here: Boxes | None = None
        if self._parts:
            heights, widths = np.array([[file.height, file.width] for file in files]).T
            boxes = request.boxes(heights, widths)  # (V, 4, B)
            if self._resizes_here:
                cut_here = boxes.copy()
                if self._slices:
                    cut_here[:, :2] = 0
                else:
                    boxes = boxes[:0]
            for view, columns in enumerate(boxes.astype(np.int32)):
                inputs[f"corner{view}"] = list(np.ascontiguousarray(columns[:2].T))
                inputs[f"sides{view}"] = list(np.ascontiguousarray(columns[2:].T))
        elif images.size:
            fits = [fitted(file.height, file.width, images.size, images.margin) for file in files]
            both = np.array(fits)
            inputs["scaled"] = list(both[:, :2].astype(np.float32))
            inputs["corner"] = list(np.ascontiguousarray(both[:, 2:]).astype(np.int32))
        else:
            for index, file in zip(ids.tolist(), files, strict=True):
                if (file.height, file.width) != images.shape[2:]:
                    sides = (file.height, file.width)
                    raise size_error(
                        images.files.path(index), sides, images.first, images.shape[2:]
                    )
        return _Fed(request, ids, inputs, cut_here)

    def _encoded(self, index: int, *, by_pillow: bool) -> Encoded:
        images = self._source.images
        file = encoded(images.files.read(index), by_pillow=by_pillow)
        if images.size and not self._parts:
            fitted(file.height, file.width, images.size, images.margin)  # a corrupt file is named
        return file

    def _feed(self, fed: _Fed) -> None:
        if self._pipe is None:
            self._pipe = self._build()
        for name, arrays in fed.inputs.items():
            self._pipe.feed_input(name, arrays)
        self._pipe.schedule_run()

    def _outputs(self) -> Any:
        if self._device.type == "cuda":
            return self._pipe.outputs(torch.cuda.current_stream(self._device))
        return self._pipe.outputs()

    def _build(self) -> Any:
        # imported by name: DALI's type annotations do not allow its documented use
        fn, types = (import_module(f"nvidia.dali.{name}") for name in ("fn", "types"))
        pipeline = import_module("nvidia.dali.pipeline")
        images = self._source.images
        on_gpu = self._device.type == "cuda"
        pipe = pipeline.Pipeline(
            batch_size=self._batch_size,
            num_threads=images.threads,
            device_id=(self._device.index or 0) if on_gpu else None,
            # this class feeds several batches in advance: DALI's own prefetching would need that
            # many at its start, and an epoch may have fewer left
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        with pipe:
            files = fn.external_source(name="files", ndim=1, dtype=types.UINT8)
            decoding = {
                "device": "mixed" if on_gpu else "cpu",
                "output_type": types.RGB,
                "adjust_orientation": False,
                "jpeg_fancy_upsampling": True,  # as in libjpeg
            }
            height, width = images.shape[2:]
            linear = {"interp_type": types.INTERP_LINEAR, "antialias": True}

            def numbers(name: str, dtype: Any = types.INT32) -> Any:
                return fn.external_source(name=name, ndim=1, dtype=dtype)

            if self._parts:
                views = 0 if self._resizes_here and not self._slices else self._parts
                parts = [
                    {"start": numbers(f"corner{v}"), "shape": numbers(f"sides{v}"), "axes": (0, 1)}
                    for v in range(views)
                ]
                if self._slices:
                    shown = [fn.decoders.image_slice(files, **parts[0], **decoding)]
                else:
                    pixels = fn.decoders.image(files, **decoding)
                    shown = [fn.slice(pixels, **part) for part in parts] or [pixels]
                made = shown
                if not self._resizes_here:
                    made = [fn.resize(part, size=[height, width], **linear) for part in shown]
            elif images.size:
                pixels = fn.decoders.image(files, **decoding)
                scaled = fn.resize(pixels, size=numbers("scaled", types.FLOAT), **linear)
                corner = numbers("corner")
                made = [fn.slice(scaled, start=corner, shape=[height, width], axes=(0, 1))]
            else:
                made = [fn.decoders.image(files, **decoding)]
            pipe.set_outputs(*made)
        pipe.build()
        return pipe

    def _images(self, outputs: Any, boxes: Boxes | None) -> list[Tensor]:
        """Return the images of each view, (B, H, W, 3)."""
        if boxes is None:
            return [self._tensor(out) for out in outputs]
        decoded = [np.asarray(outputs[0][b]) for b in range(boxes.shape[2])]
        images = self._source.images
        made = _native.resize_parts(decoded, boxes, *images.shape[2:], threads=images.threads)
        return list(torch.from_numpy(made))

    def _tensor(self, output: Any) -> Tensor:
        dense = output.as_tensor()
        if self._device.type == "cuda":
            return from_dlpack(dense)
        return torch.from_numpy(np.asarray(dense))

    def _hold(self, outputs: Any) -> None:
        """Keep a batch on the GPU until all work that reads it is done; a CPU has no such work."""
        if self._device.type != "cuda":
            return
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._held.append((event, outputs))
        while self._held and self._held[0][0].query():
            self._held.popleft()

    def _decode_here(self, request: Request, error: Exception) -> Decoded:
        """Decode a batch that DALI failed at; corrupt files in it are named or replaced."""
        self._pipe = None  # it cannot be used after an error
        self._by_pillow.update(request.ids.tolist())
        before = len(self._source.images.corrupt.reasons)
        ids, pixels = decode_rows(self._source, request, np.arange(len(request.ids)))
        if len(self._source.images.corrupt.reasons) == before:
            _log.warning("Pillow decoded a batch that DALI could not decode (%s)", _reason(error))
        there = torch.from_numpy(pixels).to(self._device)
        return Decoded(request, ids, list(there))


def _reason(error: Exception) -> str:
    """Return the line of DALI's report that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if line.startswith(("Failed", "[", "Error"))), lines[0])


def _blank(height: int, width: int) -> npt.NDArray[np.uint8]:
    return as_ppm(np.zeros((height, width, 3), np.uint8)).data
