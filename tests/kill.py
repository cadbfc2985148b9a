"""Kills real runs at random moments, goes on with them, and compares how they end with runs that nothing happened to.

    python -m tests.kill --count 50 --output docs/results/kills.md

Each run is a process of its own, forked from one in which torch is loaded. It does what `fxsplit train` does, and gets
SIGKILL (or SIGTERM, or SIGINT) at a random moment. Then `fxsplit train --resume` goes on with it, in its folder or in a
copy of it elsewhere, and may be killed as well. The exit code is 1 if any run ends otherwise than its untouched twin.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fxsplit import api  # noqa: F401 - so that it is there when a process is forked
from fxsplit.resuming import CHECKPOINTS
from fxsplit_cli.main import main
from tests.saving.runs import COMMON, KINDS, differences, left_by, model_in

EXIT_CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
INTERVALS = ("1", "2", "1s", "2s", "5s")
# Of so many runs, one gets another signal than SIGKILL; one goes on elsewhere; one is killed again.
OTHER_SIGNAL, ELSEWHERE, AGAIN = 5, 3, 2


@dataclass
class Case:
    """What happened to a run."""

    kind: str
    interval: str
    moments: list[str] = field(default_factory=list)
    parts: int = 0
    copied: int = 0
    anew: int = 0
    faults: list[str] = field(default_factory=list)


def command(model: str, kind: str, **changes: Any) -> list[str]:
    options: Mapping[str, Any] = {**COMMON, **KINDS[kind], **changes}
    words = ["train", model, "--no-progress"]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    return words


def run(words: list[str], log: Path, *, by: int | None = None, share: float = 0.0, seconds: float = 0.0) -> int:
    """Run `fxsplit` with these words; a signal is sent, if asked for, `share` of `seconds` after it has its folder."""
    start = log.stat().st_size if log.exists() else 0
    process = multiprocessing.get_context("fork").Process(target=_command_line, args=(words, log))
    process.start()
    if by is not None:
        while process.is_alive() and b"run folder" not in (log.read_bytes()[start:] if log.exists() else b""):
            time.sleep(0.005)
        time.sleep(share * seconds)
        with suppress(ProcessLookupError):
            os.kill(process.pid or 0, by)
    process.join()
    return process.exitcode or 0


def _command_line(words: list[str], log: Path) -> None:
    """Be the process of `fxsplit`, in which everything is imported already."""
    with log.open("ab") as file, open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def has_finished(folder: Path) -> bool:
    report = folder / "report.json"
    return report.is_file() and json.loads(report.read_text(encoding="utf-8"))["status"] == "finished"


def killed(folder: Path, twin: dict[str, Any], seconds: float, model: str, case: Case, draw: random.Random) -> None:
    """Let a run be killed once or more, then end; what is wrong is added to the case."""
    log = folder.with_suffix(".log")
    words = command(
        model,
        case.kind,
        output=folder.parent,
        experiment=folder.name,
        checkpoint_every=case.interval,
        checkpoint_keep=1,
    )
    kills = 1 + sum(draw.randrange(AGAIN) == 0 for _ in range(2))
    for number in range(kills):
        by = signal.SIGKILL if draw.randrange(OTHER_SIGNAL) else draw.choice([signal.SIGTERM, signal.SIGINT])
        code = run(words, log, by=by, share=draw.random() ** (1 + number), seconds=seconds)
        if code == -by and by != signal.SIGKILL and has_finished(folder):
            code = 0  # the process was on its way out
        if code not in (0, EXIT_CODES[by]):
            case.faults.append(f"exit code {code} after {by.name}")
            return
        case.parts += len([*folder.rglob(".*.part")])
        found = sorted((folder / CHECKPOINTS).glob("*.safetensors"))
        case.moments.append(
            f"{by.name[3:]} {found[-1].stem if found else 'before any checkpoint'}" if code else "ended before"
        )
        if not draw.randrange(ELSEWHERE):
            copy = folder.with_name(f"{folder.name}-copy{number}")
            shutil.copytree(folder, copy)
            shutil.rmtree(folder)
            folder, case.copied = copy, case.copied + 1
        if (folder / "args.yaml").is_file():
            words = ["train", "--resume", str(folder), "--no-progress", model]
        else:
            case.anew += 1
            words = command(model, case.kind, output=folder.parent, experiment=folder.name)
    if code := run(words, log):
        case.faults.append(f"exit code {code} at the end: {log.read_text(encoding='utf-8').splitlines()[-1]}")
    else:
        case.faults += differences(twin, left_by(folder))[:5]
    if not case.faults:
        shutil.rmtree(folder)


def kill() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50, help="runs that are killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further run after this time")
    parser.add_argument("--output", type=Path, help="file for the result, as Markdown")
    given = parser.parse_args()
    torch.set_num_threads(1)
    draw, began = random.Random(given.seed), time.monotonic()
    cases: list[Case] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = model_in(folder)
        twins: dict[str, tuple[dict[str, Any], float]] = {}
        for index in range(given.count):
            if time.monotonic() - began > 60 * given.minutes:
                break
            case = Case(list(KINDS)[index % len(KINDS)], draw.choice(INTERVALS))
            if case.kind not in twins:
                twins[case.kind] = untouched(folder, model, case.kind)
            killed(folder / f"run{index}", *twins[case.kind], model, case, draw)
            cases.append(case)
            print(
                f"{index + 1}/{given.count} {case.kind} {case.interval}: {', '.join(case.moments)}",
                *case.faults,
                flush=True,
            )
    text = result(cases, time.monotonic() - began, given.seed)
    print(text)
    if given.output:
        given.output.write_text(text, encoding="utf-8")
    return int(any(case.faults for case in cases))


def untouched(folder: Path, model: str, kind: str) -> tuple[dict[str, Any], float]:
    """Run one of a kind to its end; what it leaves, and the seconds from its folder on."""
    name = f"whole-{kind}"
    log = folder / f"{name}.log"
    code = run(command(model, kind, output=folder, experiment=name), log)
    assert code == 0, log.read_text(encoding="utf-8")
    files = [path.stat().st_mtime for path in (folder / name).iterdir() if path.name in ("args.yaml", "report.html")]
    return left_by(folder / name), max(files) - min(files)


def result(cases: list[Case], seconds: float, seed: int) -> str:
    """Tell what was found."""
    kills = [moment for case in cases for moment in case.moments]
    real = [moment for moment in kills if moment != "ended before"]
    lines = [
        "# Killed runs that go on",
        "",
        f"`python -m tests.kill --count {len(cases)} --seed {seed}`, torch {torch.__version__}, {platform.machine()}, "
        f"{seconds / 60:.0f} minutes. Weights, buffers, optimizer, averages, random states and records of each run are "
        "compared with those of an untouched run, bit for bit.",
        "",
        "| kind | runs | signals | while a file was written | gone on elsewhere | begun anew | differ |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in [*KINDS, "all"]:
        chosen = [case for case in cases if kind in (case.kind, "all")]
        lines.append(
            f"| `{kind}` | {len(chosen)} | {sum(m != 'ended before' for c in chosen for m in c.moments)} | "
            f"{sum(c.parts for c in chosen)} | {sum(c.copied for c in chosen)} | {sum(c.anew for c in chosen)} | "
            f"{sum(bool(c.faults) for c in chosen)} |"
        )
    by = {name: sum(moment.startswith(name) for moment in real) for name in ("KILL", "TERM", "INT")}
    lines += ["", f"Signals: {', '.join(f'{count} SIG{name}' for name, count in by.items())}.", ""]
    lines += [f"- {case.kind}, every {case.interval}: {'; '.join(case.faults)}" for case in cases if case.faults]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(kill())
