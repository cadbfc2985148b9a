"""Freezes the partitions of a model that do not train in a phase, and undoes it: modes of modules, and gradients.

    before              enter(phase)                               release()
    norm.training       False, and True is remembered              True
    requires_grad       False, and the name is remembered          True

What an executor froze must be told apart from what the user froze, even when the executor is gone, and in a copy of the
model. So the record of it is an attribute of the model, MARK, which is there as long as something is frozen.
"""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

_NOTHING = nullcontext()


class _Entry(NamedTuple):
    """A parameter of the model: its name, an earlier name under which it may have been frozen, and where it is kept."""

    name: str
    earlier: str
    parameters: dict[str, Parameter | None]
    key: str


class ModesNow:
    """Reads the modes that modules are in: a call returns them, in order.

    They are read from the dicts in which modules keep their attributes, which is faster than to ask the modules. A copy
    finds the dicts of its own modules.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = tuple(modules)
        self._attributes: list[dict[str, Any]] | None = None

    def __call__(self) -> tuple[bool, ...]:
        if self._attributes is None:
            self._attributes = [vars(module) for module in self._modules]
        try:
            return tuple([each["training"] for each in self._attributes])
        except KeyError:
            # The mode of a module is a property of its class.
            return tuple([module.training for module in self._modules])

    def __getstate__(self) -> dict[str, Any]:
        return {"_modules": self._modules, "_attributes": None}


class _Statistics(NamedTuple):
    """A norm with running statistics, as it was when it was frozen."""

    norm: _BatchNorm
    momentum: float | None
    counted: bool


class Freezing:
    """Freezes partitions for one executor: [start, stop) train, the others are frozen.

    Modules that only frozen partitions call are in evaluation mode all the time. One that training partitions call as
    well is in evaluation mode only while a frozen one calls it, see `evaluating`. The mode of a module that has a
    `train` method of its own is changed by that, since it may do more than set a flag, such as merge weights.

    Args:
        trace: of the model.
        partitions: all of this trace, in order.
    """

    def __init__(self, trace: Trace, partitions: Sequence[Partition]) -> None:
        self._model = trace.model
        self._called = {
            training: [_called(program.nodes[partition.span(training=training)]) for partition in partitions]
            for training, program in trace.programs.items()
        }
        # By the path of a module, the partitions that have ops in it.
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
        self._undo_others(insist=False)
        self.arrange()
        _all.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _all.add(self)

    def enter(self, start: int, stop: int) -> None:
        """Let partitions [start, stop) train and freeze the others: their parameters have no gradient and require none.

        Raises PartitionError when another executor has frozen partitions of the model.
        """
        self._undo_others()
        self.restore_modes()
        self._statistics, self._averaging = [], []
        self.start, self.stop = start, stop
        self.arrange()
        frozen = self._frozen_names()
        self._mark = None if (start, stop) == (0, self._count) else {"parameters": [], "modes": {}, "training": None}
        for index, entries in enumerate(self._entries):
            trains = start <= index < stop
            for name, parameter in _parameters(entries, frozen):
                parameter.requires_grad_(trains)
                if not trains:
                    # Momentum would move a parameter even with a gradient of zero.
                    parameter.grad = None
                    assert self._mark is not None
                    self._mark["parameters"].append(name)
        vars(self._model).pop(MARK, None)
        if self._mark is not None:
            vars(self._model)[MARK] = self._mark
        self.freeze_modes()

    def _undo_others(self, *, insist: bool = True) -> None:
        """Undo what an executor that is gone has frozen, in this model or in the one that it is a copy of.

        Raises PartitionError when that executor is still there and `insist` is true.
        """
        mark = vars(self._model).get(MARK)
        if mark is None or mark is self._mark:
            return
        if _is_in_use(mark):
            # The other executor may be garbage that was not collected yet.
            gc.collect()
        if _is_in_use(mark):
            if not insist:
                return
            raise PartitionError(
                f"another executor over this model has entered a phase and has frozen {len(mark['parameters'])} "
                "parameters for it; call that executor's release() first, or go on with it"
            )
        if self._model.training is mark["training"]:
            _set_modes(dict(self._model.named_modules()), mark["modes"])
        parameters = dict(self._model.named_parameters())
        for name, parameter in parameters.items():
            if not {name, _earlier(name, parameters)}.isdisjoint(mark["parameters"]):
                parameter.requires_grad_(True)
        del vars(self._model)[MARK]

    def arrange(self) -> None:
        """Find the modules and parameters that the model has now."""
        modules = dict(self._model.named_modules(remove_duplicate=False))
        self._frozen, self._shared = self._modules_to_freeze(modules)
        self._frozen_list = list(self._frozen.values())
        self._frozen_modes = ModesNow(self._frozen_list)
        self._entries: list[list[_Entry]] = [[] for _ in range(self._count)]
        names = dict.fromkeys(name for name, _ in self._model.named_parameters())
        for name in names:
            index = self._owner_of(name)
            if index is not None:
                path, _, key = name.rpartition(".")
                self._entries[index].append(_Entry(name, _earlier(name, names), modules[path]._parameters, key))

    # Gradients

    @property
    def owned(self) -> tuple[tuple[Parameter, ...], ...]:
        """The parameters of each partition, as the model has them now, without those that the user froze."""
        frozen = self._frozen_names()
        return tuple(tuple(each for _, each in _parameters(entries, frozen)) for entries in self._entries)

    def _frozen_names(self) -> set[str]:
        """Return the names of the parameters that an executor froze, not the user."""
        return set(vars(self._model).get(MARK, {}).get("parameters", ()))

    def _owner_of(self, name: str) -> int | None:
        """Find the first partition that uses a parameter; if it is new since tracing, the first in its module."""
        if name in self._known:
            return self._owner.get(name)
        inside = (self._inside[path] for path in reversed(prefixes(name)) if path and path in self._inside)
        return min(next(inside, ()), default=None)

    # Modes

    def freeze_modes(self) -> None:
        """Put frozen modules into evaluation mode, and remember their modes."""
        self.estimating = any(map(_is_reset, self._statistics))
        if self._mark is None or self.estimating:
            return
        self._freeze(self._mark)
        self._statistics = [
            _Statistics(module, module.momentum, module.momentum is None and _batches(module) > 0)
            for module in self._frozen_list
            if isinstance(module, _BatchNorm) and module.track_running_stats
        ]
        self._averaging = [each.norm for each in self._statistics if each.momentum is not None]

    def _freeze(self, mark: dict[str, Any]) -> None:
        modes = mark["modes"]
        if mark["training"] is not self._model.training:
            # The model as a whole was put into another mode, which makes the remembered ones obsolete.
            modes.clear()
            mark["training"] = self._model.training
        # All modes are read before any is changed, because a module may change those in it as well.
        for path, module in self._frozen.items():
            if module.training or path not in modes:
                modes[path] = module.training
        for module in self._frozen_list:
            _set_mode(module, False)

    def restore_modes(self) -> None:
        """Put frozen modules into the modes in which they would be without this executor."""
        if self._mark is None:
            return
        modes = self._mark["modes"]
        if modes and self._mark["training"] is self._model.training:
            # The user may have put a module into training mode since.
            modes.update({path: True for path, module in self._frozen.items() if module.training})
            _set_modes(self._frozen, modes)
        modes.clear()

    def refresh(self) -> bool:
        """Freeze the modes again that the user has changed since, and return whether modes are frozen now.

        They are not while BatchNorm statistics are estimated again, as `torch.optim.swa_utils.update_bn` does: this is
        seen by norms whose statistics were reset and whose momentum is None, for the mean over all batches.

        Raises PartitionError when another executor has frozen partitions and the model is in training.
        """
        training = self._model.training
        if training and vars(self._model).get(MARK) is not self._mark:
            self._undo_others()
        if self._mark is None:
            return False
        if None in [norm.momentum for norm in self._averaging]:
            self.estimating = self.estimating or (training and any(map(_is_reset, self._statistics)))
        elif self._averaging:
            self.estimating = False
        if self.estimating:
            self.restore_modes()
        elif self._mark["training"] is not training or True in self._frozen_modes():
            self._freeze(self._mark)
        return not self.estimating

    def covers(self, path: str) -> bool:
        """Tell whether the mode of a module matters to frozen partitions alone."""
        inside = self._inside.get(path)
        is_outside = bool(path) and inside is not None and not any(self.start <= index < self.stop for index in inside)
        return is_outside or path in self._frozen

    def evaluating(self, *outside: int) -> AbstractContextManager[None]:
        """Inside, all that the frozen partitions `outside` call is in evaluation mode, even if others train it."""
        training = [module for index in outside for module in self._shared[index] if module.training]
        return self._evaluating(training) if training else _NOTHING

    @contextmanager
    def _evaluating(self, training: Sequence[nn.Module]) -> Iterator[None]:
        self._set_modes(training, False)
        try:
            yield
        finally:
            self._set_modes(training, True)

    def _set_modes(self, modules: Sequence[nn.Module], mode: bool) -> None:
        for module in modules:
            if module is self._model:
                # A `train` of its own would put all that is in it into that mode as well.
                module.training = mode
            else:
                _set_mode(module, mode)

    def _modules_to_freeze(
        self, modules: Mapping[str, nn.Module]
    ) -> tuple[dict[str, nn.Module], list[list[nn.Module]]]:
        """Find the modules to freeze all the time, by path; and by partition those that training partitions share."""
        training = range(self.start, self.stop)
        trained = {id(module) for index in training for _, module in _below(modules, self._called[TRAINING][index])}
        outside = set(range(self._count)) - set(training)
        frozen: set[str] = set()
        shared: list[list[nn.Module]] = [[] for _ in range(self._count)]
        for index in outside:
            for path, module in _below(modules, self._called[EVALUATION][index]):
                # The model itself is never frozen, since its mode is that of all. A method of it that is one op
                # finds it in evaluation mode while it runs.
                if path and id(module) not in trained:
                    frozen.add(path)
                elif module not in shared[index]:
                    shared[index].append(module)
        own = [
            path
            for path, module in modules.items()
            if path and _has_own_train(module) and path in self._inside and self._inside[path] <= outside
        ]
        frozen |= {path for path, module in _below(modules, own) if id(module) not in trained}
        # In the model's order, in which a module comes before those in it.
        return {path: module for path, module in modules.items() if path in frozen}, shared


_all: weakref.WeakSet[Freezing] = weakref.WeakSet()


def _is_in_use(mark: Mapping[str, Any]) -> bool:
    return any(each._mark is mark for each in _all)


def _called(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(path for node in nodes if (path := called_module(node)) is not None))


def _below(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    """Give the modules at these paths, as far as they still exist, and all modules in them."""
    for path in paths:
        if path in modules:
            yield from modules[path].named_modules(prefix=path)


def _parameters(entries: Iterable[_Entry], frozen: Container[str]) -> Iterator[tuple[str, Parameter]]:
    """Give the parameters that require a gradient, or would if they were not `frozen`."""
    for name, earlier, parameters, key in entries:
        parameter = parameters.get(key)
        if parameter is not None and (parameter.requires_grad or name in frozen or earlier in frozen):
            yield name, parameter


def _earlier(name: str, names: Container[str]) -> str:
    """Return the name that a parameter may have had before it was parametrized or pruned."""
    earlier = RENAMED.sub(lambda match: match[1] or "", name)
    return name if earlier in names else earlier


def _has_own_train(module: nn.Module) -> bool:
    return "train" in vars(module) or type(module).train is not nn.Module.train


def _set_mode(module: nn.Module, mode: bool) -> None:
    if module.training is mode:
        return
    if _has_own_train(module):
        module.train(mode)
    else:
        module.training = mode


def _set_modes(modules: Mapping[str, nn.Module], modes: Mapping[str, bool]) -> None:
    for path, mode in modes.items():
        if path in modules:
            _set_mode(modules[path], mode)


def _batches(norm: _BatchNorm) -> int:
    counter = norm.num_batches_tracked
    return 0 if counter is None or counter.is_meta else int(counter)


def _is_reset(each: _Statistics) -> bool:
    """Tell whether statistics were reset, to be estimated again from the batches to come."""
    was_used = each.momentum is not None or each.counted
    return each.norm.momentum is None and was_used and _batches(each.norm) == 0
