"""Describes the machine and the software of a run: versions, processor, GPU, commit."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fxsplit.measuring.meter import NvmlDevice, uuid_of

PACKAGES = ("torch", "torchvision", "timm", "numpy", "fxsplit")


def environment(device: torch.device) -> dict[str, Any]:
    """Collect what a run's numbers depend on besides its recipe, as plain data for JSON.

    The settings of the GPU are the present ones.
    """
    return {
        "date_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "os": platform.platform(),
        "cpu": processor_name(_cpuinfo()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": _gpu(device),
        "git_commit": _git_commit(),
    }


def code_digest() -> str:
    """Return a checksum of this package's own code."""
    folder, found = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(str(path.relative_to(folder)).encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _version(package: str) -> str | None:
    """Find the version of a package, also of one that runs without having been installed; None if it has none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return getattr(import_module(package), "__version__", None)


def processor_name(cpuinfo: str) -> str:
    """Read the processor's name out of the text of /proc/cpuinfo; without any, the platform's word for it.

    Its family and model stand beside the name, which a virtual machine may shorten to the maker's.
    """
    name, *numbers = (
        re.search(rf"^{key}\s*:\s*(.+)$", cpuinfo, re.MULTILINE) for key in ("model name", "cpu family", "model")
    )
    kind = ", ".join(f"{key} {found[1]}" for key, found in zip(("family", "model"), numbers, strict=True) if found)
    return f"{name[1]}{f' ({kind})' * bool(kind)}" if name else platform.processor() or platform.machine()


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return ""


def _gpu(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "driver": NvmlDevice(uuid_of(device)).driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "tf32": torch.backends.cuda.matmul.fp32_precision == "tf32",
    }


def _git_commit() -> str | None:
    """Find the commit of the working directory, "-dirty" when files differ from it; None without git or repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
