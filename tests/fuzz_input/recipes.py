"""Recipes: YAML files, from which a RunSpec is made or not."""

from __future__ import annotations

import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from fxsplit.errors import UsageError
from fxsplit.spec import DEFAULTS, RunSpec, read_recipe, read_values, resolve
from fxsplit.trust import refuse_recipe
from tests.fuzz_input.mutate import damaged, structure
from tests.fuzz_input.outcome import Outcome, crashed, nothing_made, refused

WORDS = {
    "model": "paper:cnn", "initial-checkpoint": "weights.pth", "plan": "plan.json", "img-size": 16,
    "interpolation": "bicubic", "train-limit": 100, "train-batches-per-epoch": 3, "mean": [0.5], "std": [0.5],
    "epochs-total": 8, "clip-grad": 1.0,
    "decay-epochs": 2.5, "decay-milestones": [1, 2.5], "settle-from": 0.2, "settle-until": 0.8, "settle-share": 0.5,
    "parts": 3,
    "at": ["layer1", "layer2.0"], "torchcompile": "eager", "memory-budget": 0.5, "memory-aim": 0.6, "cache-limit": 1.5,
    "cache-views": 2, "experiment": "mine",
}  # fmt: skip


def valid(draw: random.Random) -> dict[str, Any]:
    """Some keys with values that each is allowed by itself."""
    recipe: dict[str, Any] = {"model": "paper:cnn"}
    for item in draw.sample(fields(RunSpec), draw.randrange(1, 12)):
        name = item.name.replace("_", "-")
        choices = item.metadata["choices"]
        good = draw.choice(choices) if choices else WORDS.get(name, item.default)
        recipe[name] = list(good) if isinstance(good, tuple) else good
    return recipe


def text(draw: random.Random) -> bytes:
    data: Any = valid(draw)
    for _ in range(draw.choice((0, 1, 1, 2, 3))):
        data = structure(draw, data, RunSpec.keys())
    style = draw.choice(({}, {"default_flow_style": True}, {"default_style": '"'}, {"allow_unicode": True}))
    written: bytes = yaml.safe_dump(data, sort_keys=False, **style).encode("utf-8", "surrogatepass")
    return damaged(draw, written, draw.choice((0, 0, 1, 2, 5)))


def run(seed: int, folder: Path) -> Outcome:
    """Read a recipe, refuse what it may not decide, and make a RunSpec that reads back from what it writes."""
    draw = random.Random(seed)
    path = folder / "recipe.yaml"
    path.write_bytes(text(draw))
    try:
        with nothing_made(folder):
            recipe = read_recipe(path)
            refuse_recipe(recipe, (), DEFAULTS)
            spec = resolve(recipe)
            path.write_text(spec.to_yaml(), encoding="utf-8")
            again = resolve(read_recipe(path))
            assert again == spec == resolve(read_values(spec.to_flat())), "it reads back otherwise"
            path.write_bytes(text(random.Random(seed)))
    except UsageError as error:
        return refused(error, (UsageError,))
    except Exception as error:
        return crashed(error)
    return Outcome("done")
