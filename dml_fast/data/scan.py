"""Find image files that are damaged or not images, before a training run does."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dml_fast.data.decode import PNG, decode_image
from dml_fast.data.storage import CorruptImageError, Storage, check_sides
from dml_fast.machine import cores

_AT_ONCE = 512  # files that are queued for the threads
_ENDS = 1 << 12  # bytes that are read at the beginning and the end of a file
_LONG = 1 << 18  # at the beginning of a JPEG with a preview or a colour profile

# how whole files of the usual formats begin and end
_KINDS = {
    b"\xff\xd8\xff": b"\xff\xd9",  # JPEG
    PNG: b"IEND\xaeB`\x82",
    b"GIF8": b"\x3b",
}


@dataclass
class Report:
    """What a scan has found so far.

    Attributes:
        files: how many files were checked.
        bad: for each bad file, what is wrong with it.
    """

    files: int = 0
    bad: dict[Path, str] = field(default_factory=dict)


def scan(files: Storage, *, decode: bool) -> Iterator[Report]:
    """Check each file.

    Args:
        files: the files to check.
        decode: whether to decode all of them, which finds all damage. If False, only files that do
            not begin and end as a whole JPEG, PNG or GIF does are decoded. This is faster, but does
            not find damage in the middle of a file.

    Yields:
        The same report again and again, with more files each time.
    """
    report = Report()
    look = decoded if decode else glanced_at
    with ThreadPoolExecutor(cores()) as pool:
        try:
            for start in range(0, len(files), _AT_ONCE):
                some = range(start, min(start + _AT_ONCE, len(files)))
                for index, problem in zip(some, pool.map(partial(look, files), some), strict=True):
                    report.files += 1
                    if problem:
                        report.bad[files.path(index)] = problem
                yield report
        finally:
            pool.shutdown(cancel_futures=True)


def glanced_at(files: Storage, index: int) -> str:
    """Check a file by its first and last bytes and say what is wrong; "" if nothing is."""
    try:
        start, end = files.ends(index, _ENDS)
        if not start:
            return "empty"
        for first, last in _KINDS.items():
            if start.startswith(first) and end.endswith(last):
                sides = _sides(start) or _sides(files.ends(index, _LONG)[0])
                if sides:
                    check_sides(*sides)
                    return ""
    except CorruptImageError as error:
        return str(error)
    # truncated, not an image, in another format, or followed by other bytes
    return decoded(files, index)


def _sides(start: bytes) -> tuple[int, int] | None:
    """Return height and width from the beginning of a file, None if they are not in it."""
    if start.startswith(b"GIF8"):
        return int.from_bytes(start[8:10], "little"), int.from_bytes(start[6:8], "little")
    if not start.startswith(b"\xff"):
        return int.from_bytes(start[20:24], "big"), int.from_bytes(start[16:20], "big")
    import simplejpeg

    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(start)
    except ValueError:
        return None
    return height, width


def decoded(files: Storage, index: int) -> str:
    """Decode a file and say what is wrong with it; "" if nothing is."""
    try:
        decode_image(files.read(index))
    except CorruptImageError as error:
        return str(error)
    return ""
