"""A case as the source of a model, and the model made of it."""

from __future__ import annotations

import linecache
from typing import Any

import torch
from torch import nn

from tests.fuzz.case import Case
from tests.fuzz.units import CHANNELS, CLASSES, CONTAINERS, WIDTH, Scope

HEADER = """\
import random
from collections import UserDict

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.fuzz.containers import Holder, OwnDict, OwnList, Pair, Record, halve, negate
"""


def source_of(case: Case) -> str:
    """The text of a module in Python whose `Model` is the model of the case."""
    classes: list[Scope] = []
    root = Scope("Model", classes, image=bool(case.image))
    if case.inputs != "tensor":
        root.argument = "given"
        root.lines.append(f"x = given{CONTAINERS[case.inputs][1]}")
    root.write(case.image)
    early = root.x
    if case.image:
        root.put(f"{root.x}.mean((2, 3))")
        root.put(f"{root.hold(f'nn.Linear({CHANNELS}, {WIDTH})')}({root.x})")
        root.image, root.values, root.layers, root.weighted = False, [root.x], [], []
    root.write(case.flat)
    root.put(f"{root.hold(f'nn.Linear({WIDTH}, {CLASSES})')}({root.x})")
    if case.outputs != "tensor":
        value = f"({root.x}, {early})" if "early output" in case.options else root.x
        root.values.append(value)
        root.result = CONTAINERS[case.outputs][0]
    elif "early output" in case.options:
        root.result = f"{{x}}, {early}"
    if "own train" in case.options:
        root.methods += [
            "def train(self, mode=True):",
            "    super().train(mode)",
            "    for module in self.modules():",
            "        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):",
            "            module.eval()",
            "    return self",
        ]
    return "\n\n\n".join([HEADER.rstrip(), *(scope.source() for scope in reversed(classes)), root.source()]) + "\n"


def names_of(case: Case) -> dict[str, Any]:
    """What the source of the case defines."""
    text, file = source_of(case), f"fuzz{case.seed}.py"
    # The tracer looks at the lines of a user's own code.
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    names: dict[str, Any] = {"__name__": "fuzzed"}
    exec(compile(text, file, "exec"), names)
    return names


def build(case: Case, names: dict[str, Any]) -> nn.Module:
    """The model, with weights drawn from the seed."""
    torch.manual_seed(case.seed)
    model: nn.Module = names["Model"]()
    return model.double() if "double" in case.options else model
