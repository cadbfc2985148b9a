"""Says what each piece of a factorial adds: `fxsplit compare -c recipes/factorial/paper-cnn.yaml -o DIR`, then

    python benchmarks/effects.py DIR/compare.csv

Arms are named BASE-PIECE-PIECE. The effect of a piece is the mean accuracy of the arms of a base that have it, less
that of the arms without, by seed. In half of all combinations of the pieces that is the effect of one piece together
with the interaction of all others.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer

from fxsplit.comparing.statistics import Paired

# By arm and seed.
Accuracies = dict[str, dict[int, float]]


def main(path: Annotated[Path, typer.Argument(help="The CSV file of a comparison.")]) -> None:
    """Print for each base of arms, and for each piece, its effect in points with its 95 % interval."""
    bases: dict[tuple[str, str], Accuracies] = defaultdict(lambda: defaultdict(dict))
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["match"] in ("epochs", "off"):
                name = row["arm"].partition("@")[0]
                bases[row["model"], name.partition("-")[0]][name][int(row["seed"])] = float(row["accuracy_pct"])
    for (model, base), arms in bases.items():
        print(f"{model}, {base}: {', '.join(arms)}")
        for piece in sorted({piece for name in arms for piece in name.split("-")[1:]}):
            effect = Paired.of(differences(arms, piece))
            print(f"  {piece}: {effect.mean:+.2f} ± {effect.half_width(0.95):.2f} points, {effect.count} seeds")


def differences(arms: Accuracies, piece: str) -> list[float]:
    """Return by seed the mean accuracy of the arms that have a piece, less that of the others."""
    having = {name: piece in name.split("-")[1:] for name in arms}
    seeds = set.intersection(*(set(runs) for runs in arms.values()))
    return [
        fmean(runs[seed] for name, runs in arms.items() if having[name])
        - fmean(runs[seed] for name, runs in arms.items() if not having[name])
        for seed in sorted(seeds)
    ]


if __name__ == "__main__":
    typer.run(main)
