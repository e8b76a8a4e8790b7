"""One rank of the test of bytes: counts what its TCP sockets carry in some steps.

python -m distributed_bytes_worker OPTIONS.json OUT.json
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from dml_fast.config import TrainConfig
from dml_fast.distributed.connect import connected
from dml_fast.distributed.launch import Launch, end
from dml_fast.engine import Engine
from dml_fast.engine.precision import Precision
from dml_fast.models import InputSpec
from dml_fast.training.build import facts_of
from dml_fast.training.shares import place
from dml_fast.training.students import build_cohort

STEPS = 5
CLASSES, SIDE = 100, 8
_RECEIVED_AT = 128  # of tcpi_bytes_received in Linux's struct tcp_info


def received() -> int:
    """Bytes of data that this process's TCP sockets have received."""
    total = 0
    for entry in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                continue
            copy = socket.socket(fileno=os.dup(int(entry)))
        except OSError:
            continue
        with copy:
            if copy.type == socket.SOCK_STREAM and copy.family in (socket.AF_INET, socket.AF_INET6):
                info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("Q", info, _RECEIVED_AT)[0]
    return total


def main(options: Path, out: Path) -> None:
    launch, config = Launch.from_environment(), TrainConfig(**json.loads(options.read_text()))
    cpu = torch.device("cpu")
    mesh, shares = place(config, launch.size)
    with connected(launch, mesh, shares, cpu, facts=facts_of(config)) as world:
        assert world.watch is not None
        world.watch.stop()  # it talks to the store
        cohort = build_cohort(
            config,
            Precision.choose(config.amp, config.amp_dtype, cpu),
            num_classes=CLASSES,
            inputs=[InputSpec("image", (3, SIDE, SIDE))],
            world=world,
        )
        engine = Engine(cohort)
        rows = config.batch_size // mesh.data
        images = torch.randn(rows, 3, SIDE, SIDE)
        target = torch.randint(CLASSES, (rows,))
        for _ in range(2):  # types are told in the first, DDP's buckets are made anew after it
            engine.step(images, target)
        dist.barrier()
        before = received(), world.exchange.received_bytes if world.exchange else 0
        for _ in range(STEPS):
            engine.step(images, target)
        dist.barrier()
        found = {
            "received": received() - before[0],
            "exchanged": (world.exchange.received_bytes if world.exchange else 0) - before[1],
            "calls": world.exchange.calls if world.exchange else 0,
            "parameters": [sum(p.numel() for p in s.model.parameters()) for s in cohort],
            "statistics": [
                sum(b.numel() * b.element_size() for b in s.model.buffers()) for s in cohort
            ],
        }
        everyone = world.gather(found)
        if everyone is not None:
            out.write_text(json.dumps(everyone))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    end(0)
