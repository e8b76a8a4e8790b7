"""A GPU's clocks, power and reasons for throttling, as its driver says them.

A reading takes a moment. An idle GPU lowers its clocks, so it is kept awake meanwhile.
"""

from __future__ import annotations

import csv
import subprocess
from typing import Any

import torch

from benchmarks.common.device import Cuda, Device

AWAKE_MS = 500.0
QUERIES = {  # what nvidia-smi calls it, and what we do
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "power_w",
    "temperature.gpu": "celsius",
    "clocks_throttle_reasons.active": "throttle",
}
REASONS = {  # bits of NVML's mask; 1 and 2 are no throttling: idle, and clocks set by a program
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
    0x100: "display clock",
}

Clocks = dict[str, Any]  # those values, "throttle" as a list of names; or "absent" and why


def read(device: Device | None = None) -> Clocks:
    """Return the current GPU's state; {"absent": why} where neither tool says it."""
    device = device or Cuda()
    device.sleep(AWAKE_MS)
    why = []
    for ask in (ask_nvidia_smi, ask_nvml):
        try:
            return ask(_uuid())
        except Exception as error:  # a tool's fault must not end a benchmark
            why.append(f"{ask.__name__.removeprefix('ask_')}: {type(error).__name__}: {error}")
    return {"absent": "; ".join(why).replace("\n", " ")}


def _uuid() -> str:
    """The GPU's name for these tools, which count GPUs in another way than CUDA does."""
    found = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    return found if found.startswith(("GPU-", "MIG-")) else f"GPU-{found}"


def ask_nvidia_smi(uuid: str) -> Clocks:
    """Of the GPU of that name; raises whatever stands in the way."""
    command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(QUERIES)}"]
    command.append("--format=csv,noheader,nounits")
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    (values,) = csv.reader(found.stdout.splitlines(), skipinitialspace=True)
    clocks: Clocks = {}
    for key, value in zip(QUERIES.values(), values, strict=True):
        clocks[key] = reasons(int(value, 16)) if key == "throttle" else _number(value)
    return clocks


def ask_nvml(uuid: str) -> Clocks:
    """As `ask_nvidia_smi`, by NVIDIA's library for Python."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    return {
        "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "memory_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "celsius": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        "throttle": reasons(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
    }


def reasons(mask: int) -> list[str]:
    """Return the names of the bits that mean throttling."""
    return [name for bit, name in REASONS.items() if mask & bit]


def describe(clocks: dict[str, Clocks]) -> str:
    """Return a line about the readings before and after a table."""
    before, after = clocks["before"], clocks["after"]
    for one in (before, after):
        if "absent" in one:
            return f"Clocks were not recorded ({one['absent']})."
    values = {"sm_mhz": ("SM ", "MHz"), "memory_mhz": ("memory ", "MHz"), "power_w": ("", "W")}
    parts = [
        f"{name}{_shown(before[key])}, {_shown(after[key])} {unit}"
        for key, (name, unit) in values.items()
    ]
    found = sorted({*before["throttle"], *after["throttle"]})
    return f"Before and after: {'; '.join(parts)}; throttled: {', '.join(found) or 'no'}."


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None


def _shown(value: float | None) -> str:
    return "?" if value is None else f"{value:g}"
