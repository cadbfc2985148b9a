"""The measuring protocol, with NVML and CUDA played by stand-ins where there is no GPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from datetime import datetime, timedelta
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

import fxsplit
from fxsplit.assembly import determinism
from fxsplit.measuring.environment import environment, processor_name
from fxsplit.measuring.meter import Meter, NvmlDevice, now, peak_resident_bytes, resident_bytes, stopwatch
from fxsplit.training.accuracy import Accuracy

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


class NvmlError(Exception):
    pass


def refuse(*_: Any) -> Any:
    raise NvmlError


def nvml(**changes: Any) -> SimpleNamespace:
    """A driver with one GPU, which is not divided, holds 5 bytes and has used 2.5 joules."""

    def by_uuid(uuid: str) -> str:
        return "handle" if uuid == "GPU-abc" else refuse()

    def known(answer: Any) -> Any:
        return lambda handle: answer if handle == "handle" else refuse()

    whole = SimpleNamespace(
        NVMLError=NvmlError,
        NVML_DEVICE_MIG_DISABLE=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetMigMode=known([0, 0]),
        nvmlDeviceGetMemoryInfo=known(SimpleNamespace(used=5)),
        nvmlDeviceGetTotalEnergyConsumption=known(2500),
        nvmlSystemGetDriverVersion=lambda: "600.1",
    )
    return SimpleNamespace(**{**vars(whole), **changes})


def figures(device: NvmlDevice) -> tuple[Any, ...]:
    return device.used_bytes(), device.energy_joules(), device.driver()


def test_nvml_is_asked_about_the_gpu_with_cudas_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxsplit.measuring.meter.pynvml", nvml())
    assert figures(NvmlDevice("abc")) == (5, 2.5, "600.1")
    assert figures(NvmlDevice("other")) == (None, None, None)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"nvmlInit": refuse}, (None, None, None)),
        ({"nvmlDeviceGetMigMode": lambda _: [1, 1]}, (None, None, None)),
        ({"nvmlDeviceGetMigMode": refuse}, (5, 2.5, "600.1")),
        ({"nvmlDeviceGetTotalEnergyConsumption": refuse}, (5, None, "600.1")),
        ({"nvmlDeviceGetMemoryInfo": refuse}, (None, 2.5, "600.1")),
        ({"nvmlSystemGetDriverVersion": refuse}, (5, 2.5, None)),
    ],
    ids=["no driver", "divided by MIG", "no MIG on this GPU", "no energy counter", "no memory", "no version"],
)
def test_what_nvml_cannot_tell_is_none(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    monkeypatch.setattr("fxsplit.measuring.meter.pynvml", nvml(**changes))
    assert figures(NvmlDevice("abc")) == expected


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins for a CUDA device, and a record of what was asked of it."""
    calls: list[str] = []

    def answer(name: str, value: Any) -> None:
        def call(device: torch.device) -> Any:
            assert device == CUDA
            calls.append(name)
            return value

        monkeypatch.setattr(torch.cuda, name, call)

    properties = SimpleNamespace(uuid="abc", name="GPU", total_memory=9)
    for name, value in {
        "get_device_properties": properties,
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 3,
        "max_memory_reserved": 4,
    }.items():
        answer(name, value)
    energy = iter((1000, 4500))

    def millijoules(_: Any) -> int:
        calls.append("energy")
        return next(energy)

    monkeypatch.setattr("fxsplit.measuring.meter.pynvml", nvml(nvmlDeviceGetTotalEnergyConsumption=millijoules))
    return calls


def test_a_meter_reads_cuda_after_waiting_for_it(cuda: list[str]) -> None:
    meter = Meter(CUDA)
    meter.reset_peaks()
    assert "reset_peak_memory_stats" in cuda
    first, second = meter.read(), meter.read()
    assert (first.peak_allocated_bytes, first.peak_reserved_bytes, first.device_bytes) == (3, 4, 5)
    assert first.energy_joules is not None
    assert second.energy_joules is not None
    assert second.energy_joules - first.energy_joules == 3.5
    assert [name for name in cuda if name in ("synchronize", "energy")] == ["synchronize", "energy"] * 2


def test_a_meter_on_a_cpu_knows_the_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxsplit.measuring.meter.pynvml", None)
    meter = Meter(CPU)
    meter.reset_peaks()
    usage = meter.read()
    assert min(usage.peak_resident_bytes, usage.resident_bytes) > 10 << 20
    cuda_figures = (usage.peak_allocated_bytes, usage.peak_reserved_bytes, usage.device_bytes, usage.energy_joules)
    assert cuda_figures == (None,) * 4


def test_the_clock_waits_for_cuda(cuda: list[str]) -> None:
    before = now(CPU)
    assert cuda == []
    assert now(CUDA) >= before
    assert cuda == ["synchronize"]


def test_a_peak_outlives_what_caused_it() -> None:
    """Half the size is left to what else moves: Linux counts pages for each core, and adds them up now and then."""
    size = 512 << 20
    before = resident_bytes()
    block = bytearray(b"x" * size)
    assert resident_bytes() > before + size // 2
    del block
    assert resident_bytes() < before + size // 2 < peak_resident_bytes()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_the_peak_of_a_process_is_not_that_of_its_parent() -> None:
    code = "from fxsplit.measuring.meter import *; print(resident_bytes(), peak_resident_bytes())"
    block = bytearray(b"x" * (1 << 30))
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    current, peak = map(int, found.stdout.split())
    assert current // 2 < peak < len(block)


def test_without_proc_the_unit_is_that_of_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr("resource.getrusage", lambda _: SimpleNamespace(ru_maxrss=7))
    for platform, expected in (("linux", 7 * 1024), ("darwin", 7)):
        monkeypatch.setattr(sys, "platform", platform)
        assert peak_resident_bytes() == expected


@pytest.mark.parametrize("classes", [3, 5, 12])
def test_accuracy_over_batches_is_that_of_all_samples(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(50, classes, generator=generator)
    labels = torch.randint(classes, (50,), generator=generator)
    accuracy = Accuracy(CPU)
    for part, truth in zip(torch.split(logits, 16), torch.split(labels, 16), strict=True):
        accuracy.update(functional.cross_entropy(part, truth), part, truth)
        accuracy.count(len(part))
    score = accuracy.read()
    own = logits.gather(1, labels[:, None])
    ranks = (logits > own).sum(dim=1).tolist()
    assert score.count == 50
    assert score.top1_pct == pytest.approx(100 * sum(rank < 1 for rank in ranks) / 50)
    assert score.top5_pct == pytest.approx(100 * sum(rank < 5 for rank in ranks) / 50)
    assert (score.top5_pct == 100) == (classes <= 5)
    assert score.loss == pytest.approx(functional.cross_entropy(logits.double(), labels).item(), rel=1e-6)
    assert accuracy.read() == score


def test_accuracy_keeps_no_graph_and_reads_nothing_back() -> None:
    """The meta device has no values: whatever asked for one would raise."""
    accuracy = Accuracy(torch.device("meta"))
    logits = torch.zeros(4, 10, device="meta", requires_grad=True)
    labels = torch.zeros(4, dtype=torch.int64, device="meta")
    accuracy.update(functional.cross_entropy(logits, labels), logits, labels)
    assert not any(isinstance(held, torch.Tensor) and held.requires_grad for held in vars(accuracy).values())


def test_accuracy_of_nothing_is_not_a_number() -> None:
    score = Accuracy(CPU).read()
    assert score.count == 0
    assert all(math.isnan(value) for value in (score.loss, score.top1_pct, score.top5_pct))


def test_the_environment_is_plain_json() -> None:
    found = environment(CPU)
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["python"] == sys.version.split()[0]
    assert found["torch_threads"] == torch.get_num_threads()
    assert found["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert found["gpu"] is None
    assert datetime.fromisoformat(found["date_utc"]).utcoffset() == timedelta(0)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n", "AMD EPYC (family 25, model 17)"),
        ("processor\t: 0\nmodel name\t: ARMv7\n", "ARMv7"),
        ("processor\t: 0\nCPU part\t: 0xd40\n", "a processor"),
    ],
)
def test_processors_with_one_name_are_told_apart(text: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual machine may call all processors of a maker the same."""
    monkeypatch.setattr("platform.processor", lambda: "a processor")
    assert processor_name(text) == name


def test_the_environment_names_the_gpu_and_its_driver(cuda: list[str]) -> None:
    gpu = environment(CUDA)["gpu"]
    assert cuda
    assert (gpu["name"], gpu["memory_bytes"], gpu["driver"]) == ("GPU", 9, "600.1")
    assert (gpu["cudnn_benchmark"], gpu["tf32"]) == (False, False)
    with determinism(0, False):
        gpu = environment(CUDA)["gpu"]
    assert (gpu["cudnn_benchmark"], gpu["tf32"]) == (True, True)


def test_packages_that_were_not_installed_have_their_own_version_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("fxsplit.measuring.environment.version", missing)
    monkeypatch.delattr("torchvision.__version__")
    found = environment(CPU)
    assert (found["torch"], found["fxsplit"]) == (torch.__version__, fxsplit.__version__)
    assert found["torchvision"] is None
    assert json.loads(json.dumps(found)) == found


def git(*arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment(CPU)["git_commit"] is None
    git("init")
    assert environment(CPU)["git_commit"] is None
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    git("tag", "-a", "v1", "-m", "v1")
    assert environment(CPU)["git_commit"] == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("two")
    assert environment(CPU)["git_commit"] == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert environment(CPU)["git_commit"] is None


def test_processor_seconds_are_those_of_this_process_and_of_children_that_ended() -> None:
    elapsed, began = stopwatch(), time.process_time()
    while time.process_time() < began + 0.05:
        pass
    own = elapsed()[1]
    assert own >= 0.05
    code = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    seconds, processor = elapsed()
    assert processor >= own + 0.3
    assert seconds >= 0.3
