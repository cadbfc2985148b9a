"""Measures how long commands take to say their first word on a terminal, from the start of the process.

    python benchmarks/first_words.py [--repeats 5] [COMMAND...]

Each command runs on a pseudo-terminal, and is ended after its first byte. A line has the medians over all repeats:
seconds on the clock, which other work on the machine changes, and seconds of processors, which it hardly does. A
COMMAND is in quotes, such as "inspect timm:resnet18"; without any, those are measured that a newcomer meets first.
"""

from __future__ import annotations

import argparse
import os
import pty
import shlex
import sys
import time
from statistics import median

import psutil

COMMANDS = ("--help", "train --help", "inspect paper:cnn", "train paper:cnn --img-size 16 --dry-run", "train nothing:x")


def first_word(words: list[str]) -> tuple[float, float]:
    """Return the seconds, and the seconds of processors, until `fxsplit` with these words writes its first byte."""
    began = time.perf_counter()
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, "-m", "fxsplit", *words])
    os.read(terminal, 1)
    seconds = time.perf_counter() - began
    spent = psutil.Process(pid).cpu_times()
    os.close(terminal)
    psutil.Process(pid).kill()
    os.waitpid(pid, 0)
    return seconds, spent.user + spent.system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", metavar="COMMAND", default=COMMANDS)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"{'seconds':>8}{'of processors':>15}")
    for command in options.commands:
        measured = [first_word(shlex.split(command)) for _ in range(options.repeats)]
        seconds, spent = (median(column) for column in zip(*measured, strict=True))
        print(f"{seconds:8.2f}{spent:15.2f}  fxsplit {command}", flush=True)


if __name__ == "__main__":
    main()
