"""The measuring protocol: clock, memory, energy, accuracy, and the environment in which they were measured.

A figure that this machine cannot give is None, never 0.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pynvml
import torch
from torch import Tensor

PACKAGES = ("torch", "torchvision", "timm", "numpy", "fxsplit")


def now(device: torch.device) -> float:
    """Seconds of a monotonic clock, once `device` has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def resident_bytes() -> int:
    """Memory of this process at this moment."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far.

    On Linux, getrusage counts the process that started this program too; VmHWM of proc_pid_status(5), which
    does not, goes first.
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
    """Memory and energy at one moment.

    Peaks are those of the process since its start, and of CUDA since `Meter.reset_peaks`: `allocated` by tensors,
    `reserved` by torch's allocator. `device_bytes` is what all processes together hold on the GPU. Of
    `energy_joules` only differences mean anything.
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
        self._nvml = NvmlDevice(_uuid(device)) if device.type == "cuda" else None

    def reset_peaks(self) -> None:
        """Begin the CUDA peaks anew, as at the start of a phase."""
        if self._nvml:
            torch.cuda.reset_peak_memory_stats(self._device)

    def read(self) -> Usage:
        """What is in use once the device has done all that was asked of it."""
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
    """One GPU as NVML sees it, found by its CUDA UUID because NVML counts devices in another order.

    Every figure is None without NVML, and on a GPU divided by MIG, whose figures are not of our part alone.
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
        """Device memory in use, by all processes."""
        memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, self._handle)
        return None if memory is None else int(memory.used)

    def energy_joules(self) -> float | None:
        """Energy used since the driver was loaded."""
        millijoules = _ask(pynvml.nvmlDeviceGetTotalEnergyConsumption, self._handle)
        return None if millijoules is None else millijoules / 1000

    def driver(self) -> str | None:
        """Version of the driver."""
        return None if self._handle is None else _ask(pynvml.nvmlSystemGetDriverVersion)


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _ask(function: Callable[..., Any], *arguments: Any) -> Any | None:
    """What NVML answers; None when it cannot, or when there is no handle to ask about."""
    if None in arguments:
        return None
    try:
        return function(*arguments)
    except pynvml.NVMLError:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Mean loss and accuracies over `count` samples."""

    loss: float
    top1_pct: float
    top5_pct: float
    count: int


class Accuracy:
    """Sums losses and hits on the device; only `read` waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._count = 0
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._hits = torch.zeros(2, dtype=torch.int64, device=device)

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: its mean loss (), logits (B, K) and labels (B,). With K < 5, top-5 means top-K."""
        samples, classes = logits.shape
        hits = logits.topk(min(5, classes), dim=1).indices == labels[:, None]
        self._hits += torch.stack((hits[:, 0].sum(), hits.sum()))
        self._loss += loss.detach().double() * samples
        self._count += samples

    def read(self) -> Score:
        """The means so far; not a number before the first batch."""
        sums = torch.cat((self._loss[None], self._hits.double())).tolist()
        loss, top1, top5 = (total / self._count if self._count else float("nan") for total in sums)
        return Score(loss=loss, top1_pct=100 * top1, top5_pct=100 * top5, count=self._count)


def environment(device: torch.device) -> dict[str, Any]:
    """What a run's numbers depend on besides its recipe, as plain JSON data."""
    return {
        "date_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "os": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": _gpu(device),
        "git_commit": _git_commit(),
    }


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _gpu(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "driver": NvmlDevice(_uuid(device)).driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }


def _git_commit() -> str | None:
    """Commit of the working directory, "-dirty" when files differ from it; None without git or a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
