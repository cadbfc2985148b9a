"""The plain model with parts frozen by hand: what the executor is held against.

Which parts is asked of the trace: op n of a module is its call n, and the op lies in a partition. So the reference
needs no cut: at each call of a module it sets the mode that the partition of that call has in the phase.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from fxsplit import Partition, Phase, Trace
from tests.fuzz.units import READS


class Calls:
    """The partition of each call of a module that is one op, and of each forward that asks for `self.training`.

    `rest` is the partition of the rest of the model's own forward, where that is one op.
    """

    def __init__(self, trace: Trace, partitions: Sequence[Partition]) -> None:
        self.whole: dict[str, list[int]] = {}
        self.asking: dict[str, list[int]] = {}
        self.rest: int | None = None
        in_training = [(part.start, part.stop) for part in partitions]
        in_evaluation = [(part.eval_start, part.eval_stop) for part in partitions]
        for graph, spans in ((trace.eval, in_evaluation), (trace.train, in_training)):
            whole: dict[str, list[int]] = {}
            asking: dict[str, list[int]] = {}
            for index, span in enumerate(spans):
                for op in graph.ops[slice(*span)]:
                    if op.kind == "module":
                        whole.setdefault(op.path, []).append(index)
                    elif op.target.rpartition(".")[2] in READS:
                        asking.setdefault(op.path, []).append(index)
                    elif op.name == "rest":
                        self.rest = index
            # Training comes second: it decides where it has the op.
            self.whole |= whole
            self.asking |= asking

    def apart(self) -> set[int]:
        """The cuts on both sides of which one module is called."""
        return {
            cut
            for places in (*self.whole.values(), *self.asking.values())
            for first, last in pairwise(sorted(places))
            for cut in range(first + 1, last + 1)
        }


class Frozen:
    """The reference: `model` is a copy of the one that was traced."""

    def __init__(self, model: nn.Module, calls: Calls, partitions: Sequence[Partition]) -> None:
        self.model, self._calls = model, calls
        self._owned = [part.state for part in partitions]
        self._by_user = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        self._phase = Phase(start=0, stop=len(partitions), epochs=1)

    def enter(self, phase: Phase) -> None:
        """Freeze what the phase does not train."""
        self._phase = phase
        parameters = dict(self.model.named_parameters())
        for index, names in enumerate(self._owned):
            trains = phase.role(index) == "training"
            names = {*names} - self._by_user
            # A parametrization that was registered since holds the parameter under another name.
            held = {f"{path}.parametrizations.{name}.original" for path, _, name in (n.rpartition(".") for n in names)}
            for name in (names | held) & parameters.keys():
                parameters[name].requires_grad_(trains)
                if not trains:
                    parameters[name].grad = None

    @contextmanager
    def modes(self) -> Iterator[None]:
        """Inside, each call of what does not train runs in evaluation."""
        paths = {id(module): path for path, module in reversed(list(self.model.named_modules()))}
        counts: Counter[str] = Counter()
        before: list[list[tuple[nn.Module, bool]]] = []

        def begin(module: nn.Module, args: Any) -> None:  # noqa: ARG001
            path = paths.get(id(module))
            flags: list[tuple[nn.Module, bool]] = []
            for places, inner in ((self._calls.whole, [*module.modules()]), (self._calls.asking, [module])):
                if path in places:
                    index = places[path][counts[path] % len(places[path])]
                    if self._phase.role(index) != "training":
                        flags = [(each, each.training) for each in inner]
            if path is not None:
                counts[path] += 1
            before.append(flags)
            for each, _ in flags:
                each.training = False

        def end(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
            for each, training in before.pop():
                each.training = training

        hooks = register_module_forward_pre_hook(begin), register_module_forward_hook(end, always_call=True)
        try:
            yield
        finally:
            for each in hooks:
                each.remove()
