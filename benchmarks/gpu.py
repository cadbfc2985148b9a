"""Everything that is claimed of a GPU, as one file of figures and one page.

    python benchmarks/gpu.py gpu.json --cifar10 DIR           # go on where the file ends
    python benchmarks/gpu.py gpu.json --seconds 290           # for so long
    python benchmarks/gpu.py gpu.json --only steps --page     # some of it; print the page alone
    python benchmarks/gpu.py small.json --small                # on any device, in a minute or two: does it run?

- steps: a training step, in turn: by hand (eager, as a CUDA graph, compiled), through the executor (eager, graphed,
  compiled), and with a quarter, half and three quarters of the multiply-adds settled or read from a cache.
- runs: CIFAR-10, standard and layer-to-layer, eager and graphed: accuracy, seconds, activations, joules.
- loops: the same files through fxsplit, a loop as timm's train.py has it, and Lightning, if that is installed.
- equality: runs with and without graphs end with the same weights.

Arms of one figure take turns, so that a card that slows down slows all. A figure is kept as soon as it is there.
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

import fxsplit
from fxsplit.assembly import choose_device
from fxsplit.data import datasets
from fxsplit.data.images import Data
from fxsplit.measuring.environment import environment
from fxsplit.measuring.meter import now
from fxsplit.models import registry

Step = Callable[[], Any]
# A recorded step has it as float32, which holds this number exactly.
LR = 2.0**-10
QUARTERS = (1, 2, 3)


@dataclass(frozen=True)
class Setting:
    """What all figures share."""

    device: torch.device
    cifar10: str
    small: bool

    @property
    def amp(self) -> bool:
        return self.device.type == "cuda"

    @property
    def batch_size(self) -> int:
        return 16 if self.small else 128

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)


# Steps


@dataclass(frozen=True)
class Subject:
    """A network on batches of random images."""

    model: str
    img_size: int
    stem: str = "original"

    def __str__(self) -> str:
        return f"{self.model} at {self.img_size} px"


SUBJECTS = (
    Subject("paper:cnn", 32),
    Subject("timm:resnext50_32x4d", 32, stem="cifar"),
    Subject("timm:densenet121", 32, stem="cifar"),
    Subject("timm:vgg16_bn", 32),
    Subject("timm:resnext50_32x4d", 224),
    Subject("timm:densenet121", 224),
    Subject("timm:vgg16_bn", 224),
)
SMALL = (Subject("paper:cnn", 16),)


def steps(setting: Setting, subject: Subject, *, compiled: bool) -> dict[str, Any]:
    """Milliseconds of a step and bytes at its peak, by arm."""
    torch.manual_seed(0)
    net = registry.build(subject.model, num_classes=10, img_size=subject.img_size, stem=subject.stem)
    net = net.to(setting.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    shape = (setting.batch_size, 3, subject.img_size, subject.img_size)
    images = torch.rand(shape, device=setting.device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (setting.batch_size,), device=setting.device)
    arms: dict[str, Step] = {}
    peaks: dict[str, int] = {}
    for name, make in _arms(setting, net, images, labels, compiled=compiled):
        # A replay allocates nothing: what a graph needs is what torch reserves until it is recorded.
        before = _reserved(setting.device)
        arms[name] = make()
        for _ in range(5):  # kernels are chosen, and what is recorded is recorded
            arms[name]()
        if setting.device.type == "cuda":
            peaks[name] = _reserved(setting.device) - before
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    repeats, turns = (1, 2) if setting.small else (10, 9)
    for turn in range(turns):
        for name in sorted(arms, reverse=bool(turn % 2)):
            began = now(setting.device)
            for _ in range(repeats):
                arms[name]()
            seconds[name].append((now(setting.device) - began) / repeats)
    milliseconds = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    return {"milliseconds": milliseconds, "peak_bytes": peaks}


def _arms(
    setting: Setting, net: nn.Module, images: Tensor, labels: Tensor, *, compiled: bool
) -> Iterator[tuple[str, Callable[[], Step]]]:
    def by_hand(run: Callable[[nn.Module], Callable[..., Any]] = lambda net: net) -> tuple[Step, Any, Any]:
        own = copy.deepcopy(net)
        optimizer = _optimizer(own, setting)
        return partial(_step, setting, run(own), optimizer, images, labels), own, optimizer

    def by_executor(settled: int = 0, run: Callable[[Any], Any] = lambda net: net) -> tuple[Any, Any, Any]:
        own = copy.deepcopy(net)
        trace = fxsplit.trace(own, (images[:2],))
        executor = fxsplit.Executor(trace, fxsplit.partition(trace, count=4)).train()
        executor.enter(fxsplit.Phase(start=settled, stop=4, epochs=1))
        optimizer = _optimizer(executor, setting)
        return partial(_step, setting, run(executor), optimizer, images, labels), executor, optimizer

    def cached(settled: int) -> Step:
        _, executor, optimizer = by_executor(settled)
        with setting.autocast():
            values = executor.settle(images)

        def step(labels: Tensor) -> Tensor:
            return _step(setting, lambda _: executor.resume(list(values)), optimizer, images, labels)

        return partial(fxsplit.graphed(step, executor, optimizer), labels)

    def graphed(step: Step, *held: Any) -> Step:
        *_, images, labels = step.args  # type: ignore[attr-defined]
        replayed = fxsplit.graphed(partial(step.func, *step.args[:-2]), *held)  # type: ignore[attr-defined]
        return partial(replayed, images, labels)

    yield "by hand, eager", lambda: by_hand()[0]
    yield "by hand, graph", lambda: _recorded_by_hand(by_hand()[0], setting.device)
    yield "executor, eager", lambda: by_executor()[0]
    yield "executor, graph", lambda: graphed(*by_executor())
    for quarter in QUARTERS:
        yield f"settled to cut {quarter}, graph", lambda quarter=quarter: graphed(*by_executor(quarter))
        yield f"cached at cut {quarter}, graph", lambda quarter=quarter: cached(quarter)
    if compiled:
        compile_ = partial(torch.compile, dynamic=False)
        yield "by hand, compiled", lambda: by_hand(compile_)[0]
        yield "executor, compiled", lambda: by_executor(0, compile_)[0]


def _step(
    setting: Setting, run: Callable[..., Any], optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    with setting.autocast():
        loss = F.cross_entropy(run(images), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _optimizer(net: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=LR, fused=True, capturable=setting.device.type == "cuda")


def _recorded_by_hand(step: Step, device: torch.device) -> Step:
    """Record a step as anyone would by hand, after three on a side stream; on a CPU it is what it was."""
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _reserved(device: torch.device) -> int:
    """Bytes that torch holds of a GPU, without what it could give back."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


# Runs

RUNS = {
    "paper:cnn": {"epochs": 60},
    "timm:vgg16_bn": {"epochs": 30},
    "timm:resnext50_32x4d": {"epochs": 30, "stem": "cifar"},
    "timm:densenet121": {"epochs": 30, "stem": "cifar"},
}


def run(setting: Setting, model: str, preset: str, graphs: str) -> dict[str, Any]:
    """Accuracy, seconds, peak memory and joules of a whole run."""
    report, _ = _trained(setting, model, preset, graphs)
    joules = [epoch.energy_joules for epoch in report.epochs if epoch.energy_joules is not None]
    peaks = [epoch.peak_allocated_bytes for epoch in report.epochs if epoch.peak_allocated_bytes is not None]
    return {
        "accuracy_pct": report.accuracy_pct,
        "seconds": sum(epoch.train_seconds + epoch.eval_seconds for epoch in report.epochs),
        "setup_seconds": report.setup_seconds + report.prove_seconds,
        "peak_bytes": max(peaks, default=None),
        "joules": sum(joules) if joules else None,
    }


def equality(setting: Setting, preset: str) -> dict[str, Any]:
    """Whether runs with and without graphs end with the same weights."""
    (_, eager), (_, graphed) = (_trained(setting, "paper:cnn", preset, graphs, epochs=4) for graphs in ("off", "on"))
    different = [name for name in eager if not torch.equal(eager[name], graphed[name])]
    return {"tensors": len(eager), "different": different}


def _trained(
    setting: Setting, model: str, preset: str, graphs: str, *, epochs: int | None = None
) -> tuple[fxsplit.RunReport, dict[str, Tensor]]:
    fixed: dict[str, Any] = dict(RUNS[model])
    if setting.small:
        fixed = {"epochs": 4, "data": "digits", "img_size": 16, "train_limit": 256}
    else:
        fixed |= {"data": "cifar10", "data_dir": setting.cifar10, "img_size": 32}
    if epochs is not None:
        fixed["epochs"] = epochs
    with tempfile.TemporaryDirectory() as folder:
        spec = fxsplit.RunSpec(
            model=model,
            preset=preset,
            opt="adamw",
            lr=LR,
            batch_size=setting.batch_size,
            amp=setting.amp,
            channels_last=True,
            cuda_graphs=graphs,
            deterministic=epochs is not None,
            device=str(setting.device),
            output=folder,
            **fixed,
        )
        report = fxsplit.train(spec)
        return report, safetensors.torch.load_file(f"{report.folder}/model.safetensors")


# Loops that people use

LOOPS = (("timm:resnext50_32x4d", 32), ("timm:resnext50_32x4d", 224))


def loop(setting: Setting, model: str, img_size: int, kind: str) -> dict[str, Any]:
    """Images a second in the second epoch over a folder of images."""
    with tempfile.TemporaryDirectory() as folder:
        limit = 64 if setting.small else 12_800
        data = datasets.load(
            "digits" if setting.small else "cifar10",
            img_size=img_size,
            data_dir=setting.cifar10,
            seed=0,
            train_limit=limit,
            workers=0,
            notice=print,
        )
        _write_folder(data, Path(folder))
        with _fast_kernels():
            seconds = LOOP_KINDS[kind](setting, model, img_size, folder)
    return {"images_per_second": limit / seconds}


@contextmanager
def _fast_kernels() -> Iterator[None]:
    """Set what timm's train.py and fxsplit set, for all loops alike."""
    before = torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32 = before


def _write_folder(data: Data, folder: Path) -> None:
    from torchvision.io import write_png
    from torchvision.transforms.v2.functional import resize

    for half, images in (("train", data.train), ("test", data.test)):
        count = min(len(images), 256 if half == "test" else len(images))
        ids = torch.arange(count)
        for pixels, batch in zip(images.read(ids, 256), ids.split(256), strict=True):
            for each, index in zip(pixels, batch.tolist(), strict=True):
                place = folder / half / data.classes[int(images.labels[index])]
                place.mkdir(parents=True, exist_ok=True)
                write_png(resize(each, [images.img_size] * 2), str(place / f"{index:06}.png"))


def _by_fxsplit(setting: Setting, model: str, img_size: int, folder: str) -> float:
    with tempfile.TemporaryDirectory() as output:
        spec = fxsplit.RunSpec(
            model=model, data=f"folder:{folder}", img_size=img_size, epochs=2, batch_size=setting.batch_size,
            opt="adamw", lr=LR, amp=setting.amp, channels_last=True, augment="crop-flip", device=str(setting.device),
            output=output, cuda_graphs="on",
        )  # fmt: skip
        return fxsplit.train(spec).epochs[-1].train_seconds


def _by_timm(setting: Setting, model: str, img_size: int, folder: str) -> float:
    from timm.data import create_dataset, create_loader

    loader = create_loader(
        create_dataset("", f"{folder}/train"),
        input_size=(3, img_size, img_size),
        batch_size=setting.batch_size,
        is_training=True,
        use_prefetcher=setting.device.type == "cuda",
        num_workers=0 if setting.small else 8,
        device=setting.device,
        persistent_workers=False,
    )
    net = registry.build(model, num_classes=10, img_size=img_size).to(setting.device).train()
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, fused=True)
    seconds = 0.0
    for _ in range(2):
        began, total = now(setting.device), 0.0
        for images, labels in loader:
            images, labels = images.to(setting.device), labels.to(setting.device)
            loss = _step(setting, net, optimizer, images.contiguous(memory_format=torch.channels_last), labels)
            total += loss.item()  # its meters read the loss at every step
        seconds = now(setting.device) - began
    return seconds


def _by_lightning(setting: Setting, model: str, img_size: int, folder: str) -> float:
    import lightning
    from torchvision import datasets as folders
    from torchvision.transforms import v2

    augment = v2.Compose([
        v2.ToImage(), v2.RandomCrop(img_size, padding=img_size // 8), v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
    ])  # fmt: skip
    loader = torch.utils.data.DataLoader(
        folders.ImageFolder(f"{folder}/train", augment),
        setting.batch_size,
        shuffle=True,
        num_workers=0 if setting.small else 8,
    )

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = registry.build(model, num_classes=10, img_size=img_size)
            self.began = self.seconds = 0.0

        def training_step(self, batch: Any, _: int) -> Tensor:
            images, labels = batch
            return F.cross_entropy(self.net(images.contiguous(memory_format=torch.channels_last)), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=LR, fused=True)

        def on_train_epoch_start(self) -> None:
            self.began = now(setting.device)

        def on_train_epoch_end(self) -> None:
            self.seconds = now(setting.device) - self.began

    module = Module().to(memory_format=torch.channels_last)
    lightning.Trainer(
        max_epochs=2,
        accelerator=setting.device.type,
        devices=1,
        benchmark=True,
        precision="bf16-mixed" if setting.amp else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, loader)
    return module.seconds


LOOP_KINDS = {"fxsplit": _by_fxsplit, "timm's loop": _by_timm, "Lightning": _by_lightning}


# The file and the page


def figures(setting: Setting) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """All figures, the shortest first: section, name, and how it is measured."""
    presets = ("none", "l2l")
    for preset in presets:
        yield "equality", f"paper:cnn, {preset}", partial(equality, setting, preset)
    for subject in SMALL if setting.small else SUBJECTS:
        compiled = subject.img_size == 224 and "resnext" in subject.model
        yield "steps", str(subject), partial(steps, setting, subject, compiled=compiled)
    for model, img_size in (("paper:cnn", 16),) if setting.small else LOOPS:
        for kind in LOOP_KINDS:
            yield "loops", f"{model} at {img_size} px, {kind}", partial(loop, setting, model, img_size, kind)
    for model in ("paper:cnn",) if setting.small else RUNS:
        for graphs in ("on", "off") if model == "paper:cnn" else ("on",):
            for preset in presets:
                yield "runs", f"{model}, {preset}, graphs {graphs}", partial(run, setting, model, preset, graphs)


def page(kept: dict[str, Any]) -> str:
    """The figures as Markdown; times beside the first arm of each row's kind."""
    lines = [f"# On {kept['environment'].get('gpu') or kept['environment'].get('cpu')}", "", f"{kept['date']}, torch "
             f"{kept['environment'].get('torch')}, driver {kept['environment'].get('driver')}.", ""]  # fmt: skip
    found = kept["figures"]
    for name, figure in found.get("steps", {}).items():
        if "error" in figure:
            continue
        first = figure["milliseconds"]["by hand, eager"]
        lines += [f"## {name}", "", "| arm | ms | of by hand, eager | peak MB |", "|---|---|---|---|"]
        for arm, milliseconds in figure["milliseconds"].items():
            peak = figure["peak_bytes"].get(arm)
            megabytes = "-" if peak is None else f"{peak / 1e6:.0f}"
            lines.append(f"| {arm} | {milliseconds:.3g} | {milliseconds / first:.3f} | {megabytes} |")
        lines.append("")
    for section in ("runs", "loops", "equality"):
        rows = found.get(section, {})
        columns = list(dict.fromkeys(key for figure in rows.values() for key in figure if key != "error"))
        if rows:
            lines += [f"## {section}", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
            for name, figure in rows.items():
                lines.append(f"| {name} | {' | '.join(_cell(figure.get(column)) for column in columns)} |")
            lines.append("")
    errors = {f"{section}, {name}": figure["error"] for section, rows in found.items() for name, figure in rows.items()
              if "error" in figure}  # fmt: skip
    return "\n".join([*lines, *(f"- {name}: {error}" for name, error in errors.items())])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "-" if value is None else str(value)


def main(
    output: Path,
    cifar10: Annotated[str, typer.Option(help="Where CIFAR-10 lies, or is downloaded to.")] = "data",
    seconds: Annotated[float, typer.Option(help="Begin no further figure after so long.")] = float("inf"),
    only: Annotated[str, typer.Option(help="A section: steps, runs, loops, equality.")] = "",
    device: str = "auto",
    small: Annotated[bool, typer.Option("--small", help="Tiny, to see that all of it runs.")] = False,
    show: Annotated[bool, typer.Option("--page", help="Print the page of what there is, and end.")] = False,
) -> None:
    place, began = choose_device(device), time.monotonic()
    kept: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {
        "date": date.today().isoformat(), "environment": environment(place), "figures": {}
    }  # fmt: skip
    for section, name, measure in () if show else figures(Setting(place, cifar10, small)):
        rows = kept["figures"].setdefault(section, {})
        if not section.startswith(only) or name in rows or time.monotonic() - began > seconds:
            continue
        since = time.monotonic()
        try:
            rows[name] = measure()
        except Exception as error:  # the others are worth having
            rows[name] = {"error": f"{type(error).__name__}: {error}"}
        output.write_text(json.dumps(kept, indent=1))
        print(f"{section}: {name}: {time.monotonic() - since:.1f} s", flush=True)
    print(page(kept))


if __name__ == "__main__":
    typer.run(main)
