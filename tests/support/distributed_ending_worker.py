"""One rank of `dml_fast.train` whose end takes its time, as on a busy machine.

Rank 1 looks at the store for some time after all have said farewell, and gloo lets go of one of its
tensors when Python would be gone.
"""

from __future__ import annotations

import runpy
import time

import torch
import torch.distributed as dist

from dml_fast.distributed.failure import Watch
from dml_fast.distributed.world import World

part, stop = World.close, Watch.stop
groups = []  # that outlive the run, as those do that a network holds


class Late(torch.Tensor):
    """Needs the interpreter for ten seconds when it goes."""

    def __del__(self) -> None:
        for _ in range(1000):
            time.sleep(0.01)


def part_late(world: World) -> None:
    groups.append(group := dist.new_group())
    if world.main:
        time.sleep(0.5)  # until gloo alone holds rank 1's tensor
    sent = torch.zeros(1)
    dist.all_reduce(sent if world.main else sent.as_subclass(Late), group=group, async_op=True)
    del sent
    part(world)


def stop_late(watch: Watch) -> None:
    if not watch._launch.main:
        time.sleep(2.5)
    stop(watch)


World.close = part_late  # type: ignore[method-assign]
Watch.stop = stop_late  # type: ignore[method-assign]

if __name__ == "__main__":
    runpy.run_module("dml_fast.train", run_name="__main__", alter_sys=True)
