"""Finds out whether the model still computes what was traced.

snapshot ──► differences? ──► none: go on
                 │
                 └──► trace again ──► the same ops: go on, and remember these differences as harmless
                                         │
                                         └──► other ops: GuardError, which names what was changed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._ops import OpOverload, OpOverloadPacket

from fxsplit.capture.contexts import contexts_of
from fxsplit.capture.guards import Guards
from fxsplit.capture.tracing import Program, Trace, trace_again
from fxsplit.errors import GuardError, TraceError, reason
from fxsplit.graph import EVALUATION, TRAINING
from fxsplit.meta.evaluate import resolve
from fxsplit.objects.hooks import hooks_of
from fxsplit.objects.same import same_value
from fxsplit.objects.snapshot import Difference, form_of, is_unchanged

# How many harmless states of the model are remembered, so that they need not be traced again.
MOST_STATES = 16
ADVICE = "; trace the model again, or put it back"


class _Ref(str):
    """The name of what a node refers to: another op, an input, or an attribute of the model."""


class _Step(NamedTuple):
    """An op as it is compared: its name, its module's path, and all that decides what it computes."""

    name: str
    path: str
    what: tuple[Any, ...]


class Changes:
    """Finds changes of the model since it was traced, and refuses those that change what it computes.

    `guards` are those of the model as it is now, by mode.
    """

    def __init__(self, trace: Trace) -> None:
        self._call, self._snapshot, self._modes = trace.call, trace.snapshot, trace.modes
        self._steps = {training: _steps(program) for training, program in trace.programs.items()}
        self._dtype = _dtype_of(trace.model)
        # All that differs from the traced model, by (path, what); nothing at first.
        self._state: dict[tuple[str, str], Any] = {}
        self._harmless = [self._state]
        self._harmless_modes: dict[bool, list[dict[str, bool]]] = {TRAINING: [], EVALUATION: []}
        self.guards: Mapping[bool, Guards] = {mode: program.guards for mode, program in trace.programs.items()}

    def check(self, model: nn.Module) -> None:
        """Raise GuardError when anything was changed since tracing that makes the model compute something else."""
        found = {(each.path, each.what): each for each in self._snapshot.differences(model)}
        for state in self._harmless:
            if state.keys() == found.keys() and all(is_unchanged(state[key], found[key].now) for key in state):
                self._enter_state(state)
                return
        self._prove(model, {}, list(found.values()))
        state = {key: form_of(each.now) for key, each in found.items()}
        self._harmless = [self._harmless[0], *self._harmless[1:][1 - MOST_STATES :], state]
        self._enter_state(state)

    def _enter_state(self, state: dict[tuple[str, str], Any]) -> None:
        if state is not self._state:
            # Which modes are harmless may depend on what was changed, so it is found out again.
            self._state, self._harmless_modes = state, {TRAINING: [], EVALUATION: []}

    def modes_of(self, training: bool, paths: Sequence[str]) -> list[bool]:
        """Return the modes in which the modules at `paths` were when the model was traced in a mode."""
        return [self._modes[training].get(path, training) for path in paths]

    def check_modes(self, model: nn.Module, training: bool, modes: Mapping[str, bool]) -> None:
        """Raise GuardError when modules are in other modes than when traced, and the model computes something else.

        `training` is the mode of the model, `modes` has those of its modules by path.
        """
        traced = self._modes[training]
        others = {path: mode for path, mode in modes.items() if mode is not traced.get(path, training)}
        if not others or others in self._harmless_modes[training]:
            return
        words = ("evaluation", "training")
        differences = [
            Difference(path=path, what="the mode", was=words[not mode], now=words[mode])
            for path, mode in others.items()
        ]
        self._prove(model, {training: others}, differences)
        self._harmless_modes[training] = [*self._harmless_modes[training][1 - MOST_STATES :], others]

    def refuse_hook(self, model: nn.Module) -> None:
        """Raise GuardError when a module that was traced through has hooks, which would never be called."""
        for path, module in self._snapshot.traced_through(model):
            if any(hooks_of(module)):
                raise GuardError(
                    f"{path!r} was given a hook after it was traced through, which would never be called; trace the "
                    "model again, and the module stays one op"
                )

    def hooks(self, model: nn.Module) -> list[Any]:
        """List the containers that would hold hooks of the modules that were traced through, to see if any are there.

        The model's own hooks are called, so they are left out.
        """
        return [hooks for _, module in self._snapshot.traced_through(model) for hooks in hooks_of(module)]

    def visible(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """List the modules whose modes the graph may depend on, with their paths."""
        return self._snapshot.visible(model)

    def _prove(
        self, model: nn.Module, modes: Mapping[bool, Mapping[str, bool]], differences: Sequence[Difference]
    ) -> None:
        """Trace the model again and take over its guards. Raise GuardError when it computes something else."""
        dtype = _dtype_of(model)
        try:
            again = trace_again(model, self._call, modes, {} if dtype == self._dtype else {self._dtype: dtype})
        except TraceError as error:
            raise GuardError(
                f"{_first(differences, None)}, and it cannot be traced like that: {reason(error)}{ADVICE}"
            ) from error
        for training, program in again.programs.items():
            step = _first_difference(self._steps[training], _steps(program))
            if step is not None:
                raise GuardError(
                    f"{_first(differences, step.path)}, which changes what the model computes, first in {step.name!r}"
                    f"{ADVICE}"
                )
        self.guards = {training: program.guards for training, program in again.programs.items()}


def _first(differences: Sequence[Difference], path: str | None) -> Difference:
    """Select the difference that is nearest to `path`, where ops differ: its longest prefix."""

    def nearness(each: Difference) -> int:
        return len(each.path) if path is not None and f"{path}.".startswith(f"{each.path}.".lstrip(".")) else -1

    return max(differences, key=nearness)


def _dtype_of(model: nn.Module) -> torch.dtype:
    """Find the type of the model's floating-point parameters: a model that was converted takes converted inputs."""
    found = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return next(found, torch.get_default_dtype())


def _steps(program: Program) -> list[_Step]:
    """List what a mode does, op by op, in a form that can be compared and pickled, without the graph."""
    names = {
        **{node: op.name for node, op in zip(program.nodes, program.graph.ops, strict=True)},
        **{node: value.name for node, value in zip(program.inputs, program.graph.inputs, strict=True)},
    }

    def refer(leaf: Any) -> Any:
        return _Ref(names.get(leaf, f"attribute {leaf.target}")) if isinstance(leaf, fx.Node) else leaf

    steps = [
        _Step(
            op.name,
            op.path,
            (node.op, _named(node.target), *resolve((node.args, node.kwargs), refer), contexts_of(node)),
        )
        for node, op in zip(program.nodes, program.graph.ops, strict=True)
    ]
    return [*steps, _Step("the output", "", (resolve(program.output.args[0], refer),))]


def _named(target: Any) -> Any:
    """Replace an operator of torch by its name, since it cannot be pickled; return all else as it is."""
    return _Ref(target) if isinstance(target, OpOverload | OpOverloadPacket) else target


def _first_difference(ours: Sequence[_Step], theirs: Sequence[_Step]) -> _Step | None:
    for one, other in zip(ours, theirs, strict=False):
        if one.name != other.name or not same_value(one.what, other.what):
            return one
    return None if len(ours) == len(theirs) else max(ours, theirs, key=len)[min(len(ours), len(theirs))]
