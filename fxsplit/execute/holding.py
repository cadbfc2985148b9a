"""What an executor holds of its model in a phase, and gives back when that ends: modes of modules, and gradients.

    before              enter(phase)                               release()
    norm.training       False, and True is remembered              True
    requires_grad       False, and the name is remembered          True

What an executor froze must be told from what the user froze, also after the executor is gone and in a copy of the
model. So what is remembered travels with the model, as one attribute that it has while something is held.
"""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import fx, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm

from fxsplit.capture.naming import called_module
from fxsplit.capture.tracing import Trace
from fxsplit.errors import PartitionError
from fxsplit.execute.ownership import ops_of
from fxsplit.graph import EVALUATION, TRAINING, prefixes
from fxsplit.objects.snapshot import MARK
from fxsplit.plan.partition import Partition

# What torch.nn.utils.parametrize and torch.nn.utils.prune make of a parameter's name.
RENAMED = re.compile(r"parametrizations\.([^.]+)\.original\d*$|(?<=[^.])_orig$")


class _Place(NamedTuple):
    """Where the model keeps a parameter, under its full name, and under which one it may have been frozen."""

    name: str
    earlier: str
    parameters: dict[str, Parameter | None]
    key: str


class _Statistics(NamedTuple):
    """How a norm was when it was held."""

    norm: _BatchNorm
    momentum: float | None
    counted: bool


class Holding:
    """Holds the model of `trace` for one executor: partitions [start, stop) train, the others are frozen.

    The modules that only partitions outside the window call are in evaluation. One that partitions on both sides call
    is in evaluation for some of its calls, see `evaluating`. A module outside the window that has a `train` of its own
    is told by that, since it may do more than set a flag, such as merge weights.
    """

    def __init__(self, trace: Trace, partitions: Sequence[Partition]) -> None:
        self._model = trace.model
        self._called = {
            training: [_called(program.nodes[partition.span(training=training)]) for partition in partitions]
            for training, program in trace.programs.items()
        }
        # The partitions that have ops in a module.
        self._inside: dict[str, set[int]] = {}
        for index, op, _ in ops_of(trace, partitions):
            for path in prefixes(op.path):
                self._inside.setdefault(path, set()).add(index)
        self._owner = {name: partition.index for partition in reversed(partitions) for name in partition.state}
        self._known = {state.name for graph in (trace.train, trace.eval) for state in graph.state}
        self.start, self.stop, self._count = 0, len(partitions), len(partitions)
        self._mark: dict[str, Any] | None = None
        self._statistics: list[_Statistics] = []
        self._averaging: list[_BatchNorm] = []
        self.estimating = False
        self._make_way(insist=False)
        self.arrange()
        _all.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _all.add(self)

    def enter(self, start: int, stop: int) -> None:
        """Let partitions [start, stop) train, and nothing else: other parameters want no gradient and hold none.

        Raises PartitionError when another executor holds the model.
        """
        self._make_way()
        self.give_back()
        self._statistics, self._averaging = [], []
        self.start, self.stop = start, stop
        self.arrange()
        frozen = self._frozen()
        self._mark = None if (start, stop) == (0, self._count) else {"parameters": [], "modes": {}, "training": None}
        for index, places in enumerate(self._places):
            trains = start <= index < stop
            for name, parameter in _parameters(places, frozen):
                parameter.requires_grad_(trains)
                if not trains:
                    # Momentum would move a parameter even with a gradient of zero.
                    parameter.grad = None
                    assert self._mark is not None
                    self._mark["parameters"].append(name)
        vars(self._model).pop(MARK, None)
        if self._mark is not None:
            vars(self._model)[MARK] = self._mark
        self.take()

    def _make_way(self, *, insist: bool = True) -> None:
        """Undo what an executor that is gone holds of this model, or of the one that this is a copy of.

        Raises PartitionError when the executor is still there and `insist` is true.
        """
        mark = vars(self._model).get(MARK)
        if mark is None or mark is self._mark:
            return
        if _is_held(mark):
            # Perhaps by garbage that nobody has collected yet.
            gc.collect()
        if _is_held(mark):
            if not insist:
                return
            raise PartitionError(
                f"another executor over this model has entered a phase and has frozen {len(mark['parameters'])} "
                "parameters for it; call that executor's release() first, or go on with it"
            )
        if self._model.training is mark["training"]:
            _put_back(dict(self._model.named_modules()), mark["modes"])
        parameters = dict(self._model.named_parameters())
        for name, parameter in parameters.items():
            if not {name, _earlier(name, parameters)}.isdisjoint(mark["parameters"]):
                parameter.requires_grad_(True)
        del vars(self._model)[MARK]

    def arrange(self) -> None:
        """Find the modules and parameters that the model has now."""
        modules = dict(self._model.named_modules(remove_duplicate=False))
        self._held, self._shared = self._modules_to_hold(modules)
        self._held_modules = list(self._held.values())
        self._places: list[list[_Place]] = [[] for _ in range(self._count)]
        names = dict.fromkeys(name for name, _ in self._model.named_parameters())
        for name in names:
            index = self._owner_of(name)
            if index is not None:
                path, _, key = name.rpartition(".")
                self._places[index].append(_Place(name, _earlier(name, names), modules[path]._parameters, key))

    # Gradients

    @property
    def owned(self) -> tuple[tuple[Parameter, ...], ...]:
        """The parameters of each partition, as the model has them now, without those that the user froze."""
        frozen = self._frozen()
        return tuple(tuple(each for _, each in _parameters(places, frozen)) for places in self._places)

    def _frozen(self) -> set[str]:
        """The names of those that are frozen, but not by the user."""
        return set(vars(self._model).get(MARK, {}).get("parameters", ()))

    def _owner_of(self, name: str) -> int | None:
        """The first partition that uses a parameter. One that came after tracing is used where its module is."""
        if name in self._known:
            return self._owner.get(name)
        inside = (self._inside[path] for path in reversed(prefixes(name)) if path and path in self._inside)
        return min(next(inside, ()), default=None)

    # Modes

    def take(self) -> None:
        """Put what is held into evaluation."""
        self.estimating = any(map(_is_reset, self._statistics))
        if self._mark is None or self.estimating:
            return
        self._hold(self._mark)
        self._statistics = [
            _Statistics(module, module.momentum, module.momentum is None and _batches(module) > 0)
            for module in self._held_modules
            if isinstance(module, _BatchNorm) and module.track_running_stats
        ]
        self._averaging = [each.norm for each in self._statistics if each.momentum is not None]

    def _hold(self, mark: dict[str, Any]) -> None:
        modes = mark["modes"]
        if mark["training"] is not self._model.training:
            # All of the model was put into another mode, and what it held before does not matter any more.
            modes.clear()
            mark["training"] = self._model.training
        # All before any, because a module may put those in it into evaluation as well.
        for path, module in self._held.items():
            if module.training or path not in modes:
                modes[path] = module.training
        for module in self._held_modules:
            _put(module, False)

    def give_back(self) -> None:
        """Put what is held into the modes in which it would be without this executor."""
        if self._mark is None:
            return
        modes = self._mark["modes"]
        if modes and self._mark["training"] is self._model.training:
            # Somebody may have put a module into training since.
            modes.update({path: True for path, module in self._held.items() if module.training})
            _put_back(self._held, modes)
        modes.clear()

    def look(self) -> bool:
        """Hold again what somebody has put into training since. Returns whether partitions are held now.

        They are not while the statistics of norms are estimated anew, as `torch.optim.swa_utils.update_bn` does: reset,
        with a momentum of None, which means all batches alike.

        Raises PartitionError when another executor holds the model and it is in training.
        """
        training = self._model.training
        if training and vars(self._model).get(MARK) is not self._mark:
            self._make_way()
        if self._mark is None:
            return False
        if None in [norm.momentum for norm in self._averaging]:
            self.estimating = self.estimating or (training and any(map(_is_reset, self._statistics)))
        elif self._averaging:
            self.estimating = False
        if self.estimating:
            self.give_back()
        elif self._mark["training"] is not training or True in [module.training for module in self._held_modules]:
            self._hold(self._mark)
        return not self.estimating

    def covers(self, path: str) -> bool:
        """Whether the mode of a module concerns partitions outside the window alone, when these are held."""
        inside = self._inside.get(path)
        is_outside = bool(path) and inside is not None and not any(self.start <= index < self.stop for index in inside)
        return is_outside or path in self._held

    @contextmanager
    def evaluating(self, *outside: int) -> Iterator[None]:
        """Inside, what partitions outside the window call is in evaluation, also what the window calls as well."""
        on = [module for index in outside for module in self._shared[index] if module.training]
        for module in on:
            _put(module, False)
        try:
            yield
        finally:
            for module in on:
                _put(module, True)

    def _modules_to_hold(self, modules: Mapping[str, nn.Module]) -> tuple[dict[str, nn.Module], list[list[nn.Module]]]:
        """Those that are held all the time, by path, and by partition those that the window calls as well."""
        window = range(self.start, self.stop)
        trained = {id(module) for index in window for _, module in _below(modules, self._called[TRAINING][index])}
        outside = set(range(self._count)) - set(window)
        held: set[str] = set()
        shared: list[list[nn.Module]] = [[] for _ in range(self._count)]
        for index in outside:
            for path, module in _below(modules, self._called[EVALUATION][index]):
                if id(module) not in trained:
                    held.add(path)
                elif module not in shared[index]:
                    shared[index].append(module)
        own = [
            path
            for path, module in modules.items()
            if path and _has_own_train(module) and path in self._inside and self._inside[path] <= outside
        ]
        held |= {path for path, module in _below(modules, own) if id(module) not in trained}
        # In this order a module comes before those in it.
        return {path: module for path, module in modules.items() if path in held}, shared


_all: weakref.WeakSet[Holding] = weakref.WeakSet()


def _is_held(mark: Mapping[str, Any]) -> bool:
    return any(holding._mark is mark for holding in _all)


def _called(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(path for node in nodes if (path := called_module(node)) is not None))


def _below(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    """The modules at these paths, where there still are any, and all that they hold."""
    for path in paths:
        if path in modules:
            yield from modules[path].named_modules(prefix=path)


def _parameters(places: Iterable[_Place], frozen: Container[str]) -> Iterator[tuple[str, Parameter]]:
    """Those that want a gradient, or would if they were not frozen."""
    for name, earlier, parameters, key in places:
        parameter = parameters.get(key)
        if parameter is not None and (parameter.requires_grad or name in frozen or earlier in frozen):
            yield name, parameter


def _earlier(name: str, names: Container[str]) -> str:
    """The name that a parameter may have had before it was parametrized or pruned."""
    earlier = RENAMED.sub(lambda match: match[1] or "", name)
    return name if earlier in names else earlier


def _has_own_train(module: nn.Module) -> bool:
    return "train" in vars(module) or type(module).train is not nn.Module.train


def _put(module: nn.Module, mode: bool) -> None:
    if module.training is mode:
        return
    if _has_own_train(module):
        module.train(mode)
    else:
        module.training = mode


def _put_back(modules: Mapping[str, nn.Module], modes: Mapping[str, bool]) -> None:
    for path, mode in modes.items():
        if path in modules:
            _put(modules[path], mode)


def _batches(norm: _BatchNorm) -> int:
    counter = norm.num_batches_tracked
    return 0 if counter is None or counter.is_meta else int(counter)


def _is_reset(each: _Statistics) -> bool:
    """Whether its statistics were reset, to become those of the batches to come."""
    was_used = each.momentum is not None or each.counted
    return each.norm.momentum is None and was_used and _batches(each.norm) == 0
