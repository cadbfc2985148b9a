"""python -m tests.fuzz --count 20000 --seed 0 -j 2 --output fuzz.jsonl"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tests.fuzz.draw import FEATURES, SOUND
from tests.fuzz.harness import Result, drawn, run
from tests.fuzz.report import reproducer
from tests.fuzz.shrink import shrink


def main() -> None:
    """Run cases from a first seed on; write a line for each failure, and how far it came, to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--features", default="", help="only these beside plain layers, by comma; 'all' for all")
    parser.add_argument("--without", default="", help="not these, by comma")
    parser.add_argument("-j", "--jobs", type=int, default=1)
    parser.add_argument("--output", type=Path, help="failures are appended; seeds that it has done are not run again")
    parser.add_argument("--show", action="store_true", help="print each failure's smallest case")
    options = parser.parse_args()
    features = frozenset(SOUND)
    if options.features:
        features = frozenset(FEATURES if options.features == "all" else options.features.split(","))
    features -= set(options.without.split(","))
    if unknown := features - set(FEATURES):
        sys.exit(f"there is no feature {sorted(unknown)}; have: {', '.join(FEATURES)}")
    sys.exit(_all(options, features))


def _all(options: argparse.Namespace, features: frozenset[str]) -> int:
    done = _done(options.output)
    seeds = [seed for seed in range(options.seed, options.seed + options.count) if seed not in done]
    counts, used = Counter(done.values()), Counter[str]()
    began = time.monotonic()
    for index, (seed, result, text) in enumerate(
        _results(seeds, features, options.jobs, smallest=options.show or bool(options.output)), start=1
    ):
        counts[result.status] += 1
        used.update(result.case.features)
        if options.output:
            with options.output.open("a") as file:
                line = {"seed": seed, "status": result.status, "why": result.why, "reproducer": text}
                file.write(json.dumps({key: value for key, value in line.items() if value != ""}) + "\n")
        if result.status == "failed":
            print(f"seed {seed}: {result.why}" + (f"\n{text}" if options.show else ""), flush=True)
        if index % 500 == 0:
            print(f"{index} cases, {time.monotonic() - began:.0f} s: {dict(counts)}", file=sys.stderr, flush=True)
    print(f"{sum(counts.values())} cases: {dict(counts)} in {time.monotonic() - began:.0f} s")
    print("features:", ", ".join(f"{name} {count}" for name, count in used.most_common()))
    return int(counts["failed"] > 0)


def _results(
    seeds: list[int], features: frozenset[str], jobs: int, *, smallest: bool
) -> Iterator[tuple[int, Result, str]]:
    work = partial(_one, features=features, smallest=smallest)
    if jobs == 1:
        yield from map(work, seeds)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(work, seeds, chunksize=20)


def _one(seed: int, features: frozenset[str], *, smallest: bool) -> tuple[int, Result, str]:
    result = run(drawn(seed, features))
    if result.status != "failed" or not smallest:
        return seed, result, ""
    return seed, result, reproducer(shrink(result))


def _done(output: Path | None) -> dict[int, str]:
    """The seeds that a file has, and what became of them."""
    if output is None or not output.exists():
        return {}
    lines = map(json.loads, output.read_text().splitlines())
    return {line["seed"]: line["status"] for line in lines}


if __name__ == "__main__":
    main()
