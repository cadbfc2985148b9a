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
from typing import Any, NamedTuple

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

    Linux hands getrusage's figure down to a new program, which would charge it for the process that started it;
    VmHWM (proc_pid_status(5)) starts anew, so it goes first.
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

    The process's peak is since its start, the CUDA peaks since `Meter.reset_peaks`. `device_bytes` is what all
    processes together hold on the GPU now, `energy_joules` what the GPU has used since the meter was made.
    """

    resident_bytes: int
    peak_resident_bytes: int
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    device_bytes: int | None
    energy_joules: float | None


class Meter:
    """Reads memory and energy of this process and of `device`. Reading waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._gpu = None
        if device.type == "cuda":
            self._gpu = NvmlDevice(str(torch.cuda.get_device_properties(device).uuid))
        self._energy_at_start = self._energy()

    def reset_peaks(self) -> None:
        """Begin the CUDA peaks anew, as at the start of a phase."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def read(self) -> Usage:
        """What is used now."""
        cuda = self.device.type == "cuda"
        energy = self._energy()
        if energy is not None and self._energy_at_start is not None:
            energy -= self._energy_at_start
        return Usage(
            resident_bytes=resident_bytes(),
            peak_resident_bytes=peak_resident_bytes(),
            peak_allocated_bytes=torch.cuda.max_memory_allocated(self.device) if cuda else None,
            peak_reserved_bytes=torch.cuda.max_memory_reserved(self.device) if cuda else None,
            device_bytes=self._gpu.used_bytes() if self._gpu else None,
            energy_joules=energy,
        )

    def _energy(self) -> float | None:
        if self._gpu is None:
            return None
        torch.cuda.synchronize(self.device)
        return self._gpu.energy_joules()


class NvmlDevice:
    """One GPU as NVML sees it, found by its CUDA UUID because NVML counts devices in another order.

    Everything is None without NVML, and on a GPU that is shared out by MIG, where NVML's figures are not ours alone.
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


def _ask(function: Callable[..., Any], *arguments: Any) -> Any | None:
    """What NVML answers; None when it cannot, or when there is no handle to ask about."""
    if None in arguments:
        return None
    try:
        return function(*arguments)
    except pynvml.NVMLError:
        return None


class Score(NamedTuple):
    """Mean loss and accuracies over `count` samples."""

    loss: float
    top1_pct: float
    top5_pct: float
    count: int


class Accuracy:
    """Sums losses and hits on the device; only `read` waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.count = 0
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._hits = torch.zeros(2, dtype=torch.int64, device=device)

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: its mean loss (), its logits (B, K) and labels (B,). With K < 5, top-5 means top-K."""
        samples, classes = logits.shape
        best = logits.detach().topk(min(5, classes), dim=1).indices
        hits = best == labels[:, None]
        self._hits += torch.stack((hits[:, 0].sum(), hits.sum()))
        self._loss += loss.detach().double() * samples
        self.count += samples

    def read(self) -> Score:
        """The means so far; not a number before the first batch."""
        if not self.count:
            return Score(float("nan"), float("nan"), float("nan"), 0)
        loss, top1, top5 = torch.cat((self._loss[None], self._hits.double())).tolist()
        return Score(loss / self.count, 100 * top1 / self.count, 100 * top5 / self.count, self.count)


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
        "driver": NvmlDevice(str(properties.uuid)).driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _git_commit() -> str | None:
    """Commit of the working directory, with "-dirty" when files differ from it; None without git or a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
