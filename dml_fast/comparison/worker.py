"""A process that trains one run after another: ``python -m dml_fast.comparison.worker``.

It reads orders from stdin and answers on stdout, a line of JSON each. What runs print goes into a
file. Where stdin ends, the process that gave the orders has, and this one ends at once: a run that
was stopped so continues as if it had been killed.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from queue import SimpleQueue
from typing import TypedDict

from dml_fast import cli
from dml_fast.config import TrainConfig
from dml_fast.distributed.launch import Launch


class Order(TypedDict):
    """A run to train.

    ``config`` are all its options; ``resume`` is its folder if it has begun, or ""; ``log`` is the
    file for what it prints.
    """

    config: dict[str, object]
    resume: str
    log: str


class Answer(TypedDict):
    """The run's exit code, and the most bytes that it had of a GPU's memory (0 on a CPU)."""

    code: int
    gpu_bytes: int


def main() -> None:
    """Serve until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    orders: SimpleQueue[Order] = SimpleQueue()
    given = os.fdopen(os.dup(0))

    def read() -> None:
        for line in given:
            orders.put(json.loads(line))
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    while True:
        answers.write(json.dumps(_train(orders.get())) + "\n")
        answers.flush()


def _train(order: Order) -> Answer:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.close(log)
    from dml_fast.training import job

    config = TrainConfig(**order["config"])  # type: ignore[arg-type]

    def train(_: object) -> int:
        return job.train(config, order["resume"], Launch.from_environment(), brief=True)

    code = cli.run(train, [])
    sys.stdout.flush()
    return {"code": code, "gpu_bytes": _gpu_bytes()}


def _gpu_bytes() -> int:
    import torch

    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return 0
    most = torch.cuda.max_memory_reserved()
    gc.collect()  # a trainer refers to itself
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return most


if __name__ == "__main__":
    main()
