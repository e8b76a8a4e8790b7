"""Processes that run a module as ``python -m`` does, forked from one that has imported torch.

A fresh interpreter needs four seconds of CPU before the first step of a training run. Here a server
does so once, with one thread, and each process is forked from it: real processes, with their own
arguments, environment, folder and pipes, which are sent signals and leave exit codes as others do.

What a library reads from the environment when it is imported (``OMP_NUM_THREADS`` aside) is as the
server found it, and /proc/PID/cmdline and environ are the server's: see `running`. What is tested
for its start needs a fresh interpreter: `subprocess`.
"""

from __future__ import annotations

import array
import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

PRELOADED = (
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "rich.console",
    "sklearn.datasets",
    "tyro",
    "dml_fast.training.trainer",
)
"""What a training process imports; no command, since `runpy` warns of a module that is there."""
_SET_CHILD_SUBREAPER = 36  # of Linux's prctl

_server: socket.socket | None = None
_running: list[Forked] = []


class Forked(subprocess.Popen[str]):
    """A module and its arguments, run in a process that is forked from the server.

    Its parent is this process, as with any `subprocess.Popen`, whose other arguments it takes: cwd,
    env, stdin, stdout, stderr.
    """

    def __init__(self, module: str, *arguments: object, **options: Any) -> None:
        self.environment: dict[str, str] = dict(options.get("env") or os.environ)
        super().__init__([module, *map(str, arguments)], text=True, **options)
        _running.append(self)

    def _execute_child(
        self,
        args: list[str],
        executable: object,
        preexec_fn: object,
        close_fds: object,
        pass_fds: object,
        cwd: Any,
        env: object,
        startupinfo: object,
        creationflags: object,
        shell: object,
        p2cread: int,
        p2cwrite: int,
        c2pread: int,
        c2pwrite: int,
        errread: int,
        errwrite: int,
        *rest: object,
    ) -> None:
        """What `subprocess.Popen` calls to start a process, of its own arguments or of ``env``."""
        request = {"argv": args, "cwd": os.fspath(cwd or os.getcwd()), "env": self.environment}
        pipes = [p2cread, c2pwrite, errwrite]
        streams = [own if pipe == -1 else pipe for own, pipe in enumerate(pipes)]
        self.pid = _ask(json.dumps(request).encode(), streams)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def run(module: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with ``capture_output``; ``timeout`` and ``check`` are its."""
    timeout, check = options.pop("timeout", 240), options.pop("check", False)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Forked(module, *arguments, **(pipes | options)) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


def running() -> Iterator[tuple[int, list[str], dict[str, str]]]:
    """Process id, arguments and environment of the forked processes that were not waited for."""
    _running[:] = [process for process in _running if process.poll() is None]
    for process in _running:
        yield process.pid, list(process.args), process.environment  # type: ignore[call-overload]


def _ask(request: bytes, streams: list[int]) -> int:
    """The process id that the server answers with."""
    global _server
    if _server is None:
        _server = _start_server()
    message = len(request).to_bytes(8, "little")
    fds = array.array("i", streams).tobytes()
    _server.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    _server.sendall(request)
    answer = _server.recv(8)
    if len(answer) != 8:
        _server = None
        raise RuntimeError("the server of processes is gone")
    return int.from_bytes(answer, "little")


def _start_server() -> socket.socket:
    """Start it, and become the parent of processes whose own parent has ended."""
    if ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError("prctl(PR_SET_CHILD_SUBREAPER) failed")
    ours, theirs = socket.socketpair()
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
    server = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        env=os.environ | threads,
    )
    theirs.close()
    # it ends with the socket, of which no other process has our end
    atexit.register(lambda: (ours.close(), server.wait()))
    return ours


def _serve(client: socket.socket) -> dict[str, Any]:
    """Fork a process for each request; return in these processes only, with their request."""
    while True:
        header, ancillary, _, _ = client.recvmsg(8, socket.CMSG_SPACE(12))
        if len(header) < 8:
            os._exit(0)
        streams = array.array("i", ancillary[0][2])
        size, request = int.from_bytes(header, "little"), b""
        while len(request) < size:
            request += client.recv(size - len(request))
        told, tell = os.pipe()
        between = os.fork()
        if not between:  # once this one has ended, its child is adopted by the client
            child = os.fork()
            if child:
                os.write(tell, child.to_bytes(8, "little"))
                os._exit(0)
            client.close()
            os.close(told), os.close(tell)
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            return json.loads(request)  # type: ignore[no-any-return]
        os.close(tell)
        os.waitpid(between, 0)
        client.sendall(os.read(told, 8))
        for fd in (told, *streams):
            os.close(fd)


def _become(request: dict[str, Any], path: list[str]) -> None:
    """Take on the environment, folder, arguments and path of a new interpreter."""
    import numpy as np
    import torch

    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv[:] = request["argv"]
    added = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    sys.path[:] = [os.getcwd(), *added, *path]
    np.random.seed()
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    signal.signal(signal.SIGINT, signal.default_int_handler)


def main() -> None:
    """Serve; in each forked process, run what was asked for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, meant for the processes
    for module in PRELOADED:
        importlib.import_module(module)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"a process with {len(threads)} threads cannot be forked safely"
    added = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [entry for entry in sys.path[1:] if entry not in added]
    gc.collect()
    gc.freeze()
    request = _serve(socket.socket(fileno=int(sys.argv[1])))
    _become(request, path)
    runpy.run_module(request["argv"][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
