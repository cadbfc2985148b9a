"""Reads clock, memory and energy. A figure that this machine cannot give is None, never 0."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pynvml
import torch


def now(device: torch.device) -> float:
    """Wait until `device` has done its work, and read a monotonic clock, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def resident_bytes() -> int:
    """Return the memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Return the most memory that this process has held so far.

    On Linux this is VmHWM of proc_pid_status(5) where it can be read: getrusage may count the process that started this
    program, too.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        status = ""
    if found := re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE):
        return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Holds memory and energy at one moment.

    The resident peak is since the start of the process, that of CUDA since `Meter.reset_peaks`: `allocated` to tensors,
    `reserved` by torch's allocator. `device_bytes` is what all processes together hold on the GPU. `energy_joules`
    counts from an unknown moment, so only differences mean anything.
    """

    resident_bytes: int
    peak_resident_bytes: int
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    device_bytes: int | None
    energy_joules: float | None


class Meter:
    """Reads memory and energy of this process and of the device that it computes on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._nvml = NvmlDevice(uuid_of(device)) if device.type == "cuda" else None

    def reset_peaks(self) -> None:
        """Begin the CUDA peaks anew, as at the start of a phase."""
        if self._nvml:
            torch.cuda.reset_peak_memory_stats(self._device)

    def memory_bytes(self) -> int:
        """Read the peak that CUDA has allocated, or else the memory of the process, without waiting for the device."""
        return torch.cuda.max_memory_allocated(self._device) if self._nvml else resident_bytes()

    def read(self) -> Usage:
        """Read what is in use once the device has done its work."""
        now(self._device)
        gpu = self._nvml
        return Usage(
            resident_bytes=resident_bytes(),
            peak_resident_bytes=peak_resident_bytes(),
            peak_allocated_bytes=torch.cuda.max_memory_allocated(self._device) if gpu else None,
            peak_reserved_bytes=torch.cuda.max_memory_reserved(self._device) if gpu else None,
            device_bytes=gpu.used_bytes() if gpu else None,
            energy_joules=gpu.energy_joules() if gpu else None,
        )


class NvmlDevice:
    """Reads a GPU through NVML, by its CUDA UUID: NVML numbers devices in another order.

    Every figure is None without NVML, and on a GPU that MIG divides: NVML's figures are those of the whole GPU.
    """

    def __init__(self, uuid: str) -> None:
        self._handle = None
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return
        handle = _ask(pynvml.nvmlDeviceGetHandleByUUID, f"GPU-{uuid}")
        mig = _ask(pynvml.nvmlDeviceGetMigMode, handle)
        if mig is None or mig[0] == pynvml.NVML_DEVICE_MIG_DISABLE:
            self._handle = handle

    def used_bytes(self) -> int | None:
        """Read the device memory in use, by all processes."""
        memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, self._handle)
        return None if memory is None else int(memory.used)

    def energy_joules(self) -> float | None:
        """Read the energy used since the driver was loaded."""
        millijoules = _ask(pynvml.nvmlDeviceGetTotalEnergyConsumption, self._handle)
        return None if millijoules is None else millijoules / 1000

    def driver(self) -> str | None:
        """Read the version of the driver."""
        return None if self._handle is None else _ask(pynvml.nvmlSystemGetDriverVersion)


def uuid_of(device: torch.device) -> str:
    """Return the UUID of a CUDA device."""
    return str(torch.cuda.get_device_properties(device).uuid)


def _ask(function: Callable[..., Any], *arguments: Any) -> Any | None:
    """Call a function of NVML; None when it fails, or when one of the arguments is None, as a missing handle is."""
    if None in arguments:
        return None
    try:
        return function(*arguments)
    except pynvml.NVMLError:
        return None


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether memory ran out: on a GPU, in Python, or in torch on the CPU, which raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
