"""One rank of the tests of equality: trains one case after the other in one job.

python -m distributed_worker CASES.json FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from dml_fast.config import TrainConfig
from dml_fast.distributed.connect import connected
from dml_fast.distributed.launch import Launch, end
from dml_fast.distributed.world import World
from dml_fast.runs.folder import Run
from dml_fast.training.build import build_trainer, facts_of
from dml_fast.training.shares import place
from dml_fast.training.signals import StopRequest


def main(cases: Path, folder: Path) -> None:
    launch = Launch.from_environment()
    configs = {
        name: TrainConfig(**options) for name, options in json.loads(cases.read_text()).items()
    }
    first = next(iter(configs.values()))
    cpu = torch.device("cpu")
    with connected(launch, *place(first, launch.size), cpu, facts=facts_of(first)) as connection:
        for name, config in configs.items():
            mesh, shares = place(config, launch.size)
            device_mesh = dist.device_mesh.init_device_mesh(
                "cpu", tuple(mesh), mesh_dim_names=("cohort", "data")
            )
            world = World(launch, mesh, shares, device_mesh, connection.watch)
            run = Run(folder / name)
            if world.main:
                run.prepare(0)
            dist.barrier()
            trainer = build_trainer(config, run, None, StopRequest(), world)
            assert trainer.fit()
            trainer.finish()
            trainer.loader.close()
            world.vote(False)  # hears the last one


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    end(0)
