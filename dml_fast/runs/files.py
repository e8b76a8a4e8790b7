"""Files that are replaced as a whole: a crash leaves the old file or the new one."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dml_fast.errors import UserError, reason
from dml_fast.machine import sync_folder

_BEGINNING = 48  # characters of a name that its temporary file begins with, as a name has 255 bytes


@contextmanager
def atomic_write(path: Path, keep_old_as: Path | None = None) -> Iterator[IO[bytes]]:
    """Open a temporary file for writing, and rename it to ``path`` at the end, once on the disk.

    After an error or a crash ``path`` is the old file, unchanged.

    Args:
        path: the final name.
        keep_old_as: a second name for the old file at ``path``, if there is one; it is given once
            the new file is on the disk.
    """
    descriptor, temporary = tempfile.mkstemp(
        prefix=f".{path.name[:_BEGINNING]}.", suffix=".tmp", dir=path.parent
    )
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes 0600
        if keep_old_as is not None and path.exists():
            link(path, keep_old_as)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def writing(what: str | os.PathLike[str], advice: str) -> Iterator[None]:
    """Turn an error of the operating system, while a file is written, into one sentence.

    Args:
        what: the file or the folder.
        advice: what the user can do.

    Raises:
        UserError: the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written ({reason(error)}): {advice}") from None


def check_place(path: Path, option: str) -> None:
    """Check, before the work that fills it, that a file can be made; nothing is left behind.

    Args:
        path: of the file; its folders need not exist.
        option: by which the user gives it.

    Raises:
        UserError: it cannot.
    """
    with writing(path, f"give another file with {option}"):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        folder = path.parent
        while not folder.exists():
            folder = folder.parent
        with tempfile.NamedTemporaryFile(prefix=f".{path.name[:_BEGINNING]}.", dir=folder):
            pass


def link(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to the file ``source``, or a copy where links are not supported.

    An existing ``target`` is replaced in one step, so that it never goes missing. Where ``source``
    is a symbolic link, ``target`` becomes one to the same place.
    """
    if source.is_symlink():  # a checkpoint in several files
        point_to(target, os.readlink(source))
        return
    if target.is_file() and not target.is_symlink() and target.samefile(source):
        return  # os.replace would leave the temporary name beside it
    with _temporary_for(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, target)


def point_to(path: Path, name: str, keep_old_as: Path | None = None) -> None:
    """Make ``path`` a symbolic link to ``name``; an existing ``path`` is replaced in one step.

    Args:
        path: the link.
        name: of a file or folder in the folder of ``path``.
        keep_old_as: a second name for the old ``path``, if there is one.
    """
    with _temporary_for(path) as temporary:
        temporary.symlink_to(name)
        if keep_old_as is not None and path.exists():
            link(path, keep_old_as)
        os.replace(temporary, path)
    sync_folder(path.parent)


@contextmanager
def _temporary_for(path: Path) -> Iterator[Path]:
    """Yield a free name beside ``path``; what is under it at the end is removed."""
    temporary = path.with_name(f".{path.name[:_BEGINNING]}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
