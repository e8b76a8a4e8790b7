"""What every benchmark's JSON says of itself: machine, versions, commit, and GB/s.

A benchmark that moves a known number of bytes puts it into ``benchmark.extra_info["bytes"]``, with
the account of them in a comment; ``gb_per_s`` is computed here, from the fastest round.
"""

from __future__ import annotations

from typing import Any

import torch

import dml_fast


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["dml_fast"] = dml_fast.__version__
    machine_info["torch"] = torch.__version__
    machine_info["torch_threads"] = torch.get_num_threads()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    for result in output_json["benchmarks"]:
        moved = result["extra_info"].get("bytes")
        if moved is not None:
            result["extra_info"]["gb_per_s"] = moved / result["stats"]["min"] / 1e9
