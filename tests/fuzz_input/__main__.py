"""python -m tests.fuzz_input recipes|plans|commands|images --count 10000 --seed 0"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from importlib import import_module
from pathlib import Path

KINDS = ("recipes", "plans", "commands", "images")


def main() -> int:
    """Run cases from a first seed on; print those that fail, and how many ended how."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--show", action="store_true", help="print every sentence")
    given = parser.parse_args()
    run = import_module(f"tests.fuzz_input.{given.kind}").run
    counts: Counter[str] = Counter()
    slowest, began, before = (0.0, 0), time.monotonic(), os.getcwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        for seed in range(given.seed, given.seed + given.count):
            started = time.monotonic()
            outcome = run(seed, Path(name))
            slowest = max(slowest, (time.monotonic() - started, seed))
            counts[f"{outcome.status} {outcome.what}".strip()] += 1
            if outcome.status == "failed" or given.show:
                print(f"seed {seed}: {outcome.status} {outcome.what}: {outcome.why!r}", flush=True)
        os.chdir(before)
    print(f"{given.count} {given.kind} in {time.monotonic() - began:.0f} s: ", end="")
    print(", ".join(f"{what} {count}" for what, count in counts.most_common()))
    print(f"slowest: {slowest[0]:.1f} s, seed {slowest[1]}")
    return int(any(what.startswith("failed") for what in counts))


if __name__ == "__main__":
    sys.exit(main())
