"""Training in a thread of a notebook server, and on platforms that lack what Unix has."""

from __future__ import annotations

import ast
import errno
import fcntl
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_cases import QUICK, train, tree
from shard_cases import shards_of

import dml_fast
from dml_fast import cli, evaluate
from dml_fast.data.__main__ import main as data_command
from dml_fast.runs.folder import Run

CPU = ("--device", "cpu", "--executor", "sequential", "--cohort", "2")
UNIX_MODULES = {
    "fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix",
    "multiprocessing.resource_tracker",
}  # fmt: skip
UNIX_NAMES = {
    "fork", "forkpty", "pread", "preadv", "pwrite", "pwritev", "sendfile", "posix_fadvise",
    "posix_fallocate", "sysconf", "sched_getaffinity", "sched_setaffinity", "getuid", "geteuid",
    "getgid", "getegid", "getpgid", "setsid", "killpg", "wait3", "wait4", "waitid", "uname",
    "chown", "fchown", "fchmod", "lchown", "mkfifo", "mknod", "nice", "getpriority", "setpriority",
    "statvfs", "fstatvfs", "sync", "fdatasync", "register_at_fork", "getloadavg", "ctermid",
    "O_DIRECTORY", "O_NONBLOCK", "O_CLOEXEC", "O_SYNC", "O_NOFOLLOW", "O_DIRECT", "O_TMPFILE",
    "memfd_create", "eventfd", "pidfd_open", "copy_file_range", "splice", "getxattr", "setxattr",
}  # fmt: skip
OF_THE_STANDARD_LIBRARY = {"O_TMPFILE", "O_NOFOLLOW", "O_CLOEXEC", "statvfs"}  # which looked before
UNIX_SIGNALS = {
    "SIGKILL", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGALRM", "SIGCHLD",
    "SIGSTOP", "SIGCONT", "SIGTSTP", "SIGWINCH", "pthread_sigmask", "sigwait", "setitimer", "alarm",
    "siginterrupt", "pthread_kill",
}  # fmt: skip


@pytest.fixture
def messages(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> pytest.LogCaptureFixture:
    """The package's messages of before a run sets up its own logging."""
    monkeypatch.setattr(logging.getLogger("dml_fast"), "propagate", True)
    return caplog


@contextmanager
def elsewhere() -> Iterator[None]:
    """Inside is a platform without the names of Unix, on which a folder cannot be opened."""
    plain = os.open

    def open_file(path: str | Path, *options: int, **more: int) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return plain(path, *options, **more)

    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in UNIX_MODULES & sys.modules.keys():
            monkeypatch.setitem(sys.modules, module, None)
        for owner, names in ((os, UNIX_NAMES), (signal, UNIX_SIGNALS)):
            for name in names - OF_THE_STANDARD_LIBRARY:
                monkeypatch.delattr(owner, name, raising=False)
        monkeypatch.setattr(os, "open", open_file)
        yield


def test_a_run_on_a_platform_without_locks(
    tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    folder = str(tmp_path / "run")
    with elsewhere():
        codes = [train(*QUICK, *CPU, "--out", folder), train("--resume", folder)]
        codes.append(cli.run(evaluate.main, [folder]))
    assert codes == [0, 0, 0]
    assert messages.text.count("has no file locks") == 1  # the first run sets up its own logging


def test_data_on_a_platform_without_locks(tmp_path: Path) -> None:
    images = tree(tmp_path / "images")
    shards = shards_of(images, tmp_path / "shards")
    options = ("--arch", "resnet8", "--epochs", "1", "--batch-size", "4", *CPU)
    codes = []
    with elsewhere():
        for name in (f"folder:{images}", f"shards:{shards}"):
            out = str(tmp_path / name.partition(":")[0])
            codes.append(train(*options, "--data", name, "--loader", "fallback", "--out", out))
        for name in (str(images), f"shards:{shards}"):
            codes.append(cli.run(data_command, ["scan", name]))
    assert codes == [0, 0, 0, 0]


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    def fail(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with Run(tmp_path / "run").lock():
        pass
    assert messages.text.count("No locks available") == 1


def test_a_run_in_a_thread(tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    codes: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(
        target=lambda: codes.append(train(*QUICK, *CPU, "--out", str(tmp_path / "run")))
    )
    thread.start()
    thread.join()
    assert codes == [0]
    assert signal.getsignal(signal.SIGINT) is before
    assert messages.text.count("this is not the main thread") == 1


def test_what_only_unix_has_is_used_with_an_alternative() -> None:
    """Such modules are imported where they are used, and such names asked for beforehand."""
    package = Path(dml_fast.__file__).parent
    found = [
        f"{path.relative_to(package)}:{node.lineno}"
        for path in sorted({*package.rglob("*.py"), *(package / "kernels").glob("*.py")})
        if path.name != "machine.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if _is_of_unix(node)
    ]
    assert not found, "use dml_fast.machine"


def _is_of_unix(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name in UNIX_MODULES for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return node.module in UNIX_MODULES
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        names = {"os": UNIX_NAMES, "signal": UNIX_SIGNALS}.get(node.value.id, set())
        return node.attr in names
    return False
