"""From a launch to a `World`: the store, the process groups and the checks at the start."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from queue import Empty, Queue

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from dml_fast.distributed.failure import TIMEOUT, Watch
from dml_fast.distributed.launch import Launch
from dml_fast.distributed.mesh import Mesh, Shares
from dml_fast.distributed.world import World, agreed
from dml_fast.errors import UserError, first_line
from dml_fast.version import __version__

_HELLO_S = 20.0  # in which a store answers
_START_S = 300.0  # until all ranks must be there


@contextmanager
def connected(
    launch: Launch,
    mesh: Mesh,
    shares: Shares,
    device: torch.device,
    *,
    facts: Mapping[str, object],
    backend: str = "auto",
) -> Iterator[World]:
    """Inside, the world of a run; leaving it without an error waits for all ranks.

    A program that has used it must end with `launch.end`.

    Args:
        launch: how this process was started.
        mesh: of the ranks.
        shares: of the students.
        device: of this rank.
        facts: what must be equal on all ranks, by the name that an error calls it.
        backend: of torch.distributed: ``gloo``, ``nccl``, or ``auto`` by the device.

    Raises:
        UserError: the port is in use, ranks do not connect, or they differ in their facts.
    """
    if launch.size == 1:
        yield World(launch, mesh, shares)
        return
    backend = _backend(backend, device)
    with _ends_at_a_signal():
        store = _attempt(_store(launch), launch)
        watch = Watch(_attempt(_client(launch, _START_S), launch), launch)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            dist.init_process_group(
                backend,
                store=PrefixStore("groups", store),
                rank=launch.rank,
                world_size=launch.size,
                timeout=TIMEOUT,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"the {launch.size} processes cannot reach each other ({first_line(error)}): check "
                "MASTER_ADDR and that all of them were started"
            ) from error
    device_mesh = dist.device_mesh.init_device_mesh(
        device.type, tuple(mesh), mesh_dim_names=("cohort", "data")
    )
    world = World(launch, mesh, shares, device_mesh, watch)
    try:
        _compare(world, facts)
        yield world
    except BaseException as error:
        if not getattr(error, "on_all_ranks", False):
            watch.fail(error)
        world.close()
        raise
    world.close()


def pick_local_device(name: str, launch: Launch) -> str:
    """Return the device of this process: one GPU for each of several processes, if there are any.

    Raises:
        UserError: this machine has fewer GPUs than processes.
    """
    if launch.size == 1 or name not in ("auto", "cuda"):
        return name
    count = torch.cuda.device_count()
    if not count:
        return name
    if launch.local_size > count:
        raise UserError(
            f"{launch.local_size} processes were started on a machine where torch sees {count} "
            f"CUDA devices: give torchrun --nproc-per-node {count}, or --device cpu"
        )
    return f"cuda:{launch.local_rank}"


def check_backend(name: str, device: torch.device) -> None:
    """Refuse a backend that the device cannot use.

    Raises:
        UserError: NCCL without CUDA.
    """
    if name == "nccl" and (device.type != "cuda" or not dist.is_nccl_available()):
        raise UserError(
            f"--backend is nccl, which needs CUDA, and the device is {device}: give --backend gloo"
        )


def remembered(launch: Launch, key: str, value: str | None = None) -> str | None:
    """Keep a value in torchrun's store, where it survives restarts of this job, or read it.

    Args:
        launch: how this process was started.
        key: the name of the value.
        value: what to keep; None to read.

    Returns:
        The value, or None where there is none or torchrun does not serve the store.
    """
    if not launch.agent_store:
        return None
    store = PrefixStore("dml_fast/job", _client(launch, _START_S))
    if value is not None:
        store.set(key, os.fsencode(value))  # type: ignore[arg-type]
        return value
    return os.fsdecode(store.get(key)) if store.check([key]) else None


def _backend(name: str, device: torch.device) -> str:
    check_backend(name, device)
    if device.type == "cpu" or name == "gloo":
        return "gloo"
    return "cpu:gloo,cuda:nccl"  # votes, which are on the CPU, do not wait for the GPU


def _attempt(store: Store, launch: Launch) -> Store:
    return PrefixStore(f"dml_fast/{launch.restarts}", store)


def _address() -> tuple[str, int]:
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        raise UserError(
            f"the environment has MASTER_ADDR={host!r} and MASTER_PORT={port!r}: start the "
            "processes with torchrun, which sets them"
        )
    return host, int(port)


def _store(launch: Launch) -> TCPStore:
    """Return the store: torchrun's, or one that rank 0 serves."""
    host, port = _address()
    if launch.agent_store or not launch.main:
        return _client(launch, _START_S)
    try:
        return TCPStore(
            host, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=_START_S)
        )
    except (RuntimeError, OSError) as error:
        raise agreed(
            UserError(
                f"port {port} of {host} cannot be served ({_why(error)}): "
                "give torchrun another --master-port"
            )
        ) from error


def _client(launch: Launch, patience_s: float) -> TCPStore:
    """Connect to the store, which may not be there for a while."""
    host, port = _address()
    end = time.monotonic() + patience_s
    while True:
        found: Queue[TCPStore | Exception] = Queue()
        threading.Thread(target=_try_to_connect, args=(host, port, found), daemon=True).start()
        try:
            result = found.get(timeout=_HELLO_S)
        except Empty:  # what listens there does not answer like a store
            raise agreed(UserError(f"port {port} of {host} is in use by another program")) from None
        if isinstance(result, TCPStore):
            return result
        if time.monotonic() > end:
            raise UserError(
                f"rank {launch.rank} does not reach {host}:{port} ({_why(result)}): check "
                "MASTER_ADDR and MASTER_PORT"
            ) from result


def _try_to_connect(host: str, port: int, found: Queue[TCPStore | Exception]) -> None:
    """Connect in a thread, as torch waits forever for a store's answer."""
    try:
        with socket.create_connection((host, port), timeout=_HELLO_S / 2):
            pass  # torch prints pages of errors where nothing listens
        found.put(TCPStore(host, port, timeout=timedelta(seconds=_HELLO_S)))
    except Exception as error:
        time.sleep(0.1)
        found.put(error)


def _why(error: BaseException) -> str:
    text = str(error)
    return "it is in use" if "EADDRINUSE" in text or "in use" in text else first_line(error)


def _compare(world: World, facts: Mapping[str, object]) -> None:
    """Refuse ranks that were started with different options or versions.

    Raises:
        UserError: naming the first rank, option and values that differ.
    """
    mine = {"dml_fast": __version__, "torch": torch.__version__, **facts}
    found = world.all_gather(mine)
    for rank, other in enumerate(found):
        for name, value in found[0].items():
            if other[name] != value:
                raise agreed(
                    UserError(
                        f"rank {rank} was started with {name} {other[name]} and rank 0 with "
                        f"{value}: start all ranks alike"
                    )
                )


@contextmanager
def _ends_at_a_signal() -> Iterator[None]:
    """Inside, SIGTERM ends the process: a wait in C++ does not run handlers of Python."""
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
