"""Describes how a model is called, and checks that later calls have the same form."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn

from fxsplit.errors import GuardError
from fxsplit.objects.same import same_value
from fxsplit.objects.structure import leaves_of

Leaves = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """Describes the form of the traced call; every leaf of an argument has a name such as `x` or `batch.image`.

    `names` are those of the tensors, in order; `constants` are all other leaves with their values. `positions` counts
    the arguments that were given by position. A call is `plain` when it gives tensors by position and nothing else.
    """

    parameters: inspect.Signature
    positions: int
    names: tuple[str, ...]
    constants: Mapping[str, Any]
    plain: bool

    @classmethod
    def of(cls, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Signature:
        """Describe a call of `model`. Raises TypeError when it cannot be called like that."""
        given = inspect.signature(model.forward).parameters.values()
        # Annotations are not needed, and some cannot be pickled.
        parameters = inspect.Signature([each.replace(annotation=inspect.Parameter.empty) for each in given])
        leaves = _leaves(parameters, args, kwargs)
        names = tuple(name for name, leaf in leaves.items() if isinstance(leaf, Tensor))
        constants = {name: leaf for name, leaf in leaves.items() if not isinstance(leaf, Tensor)}
        # A default that holds others can be changed in place.
        plain = _is_plain(args, kwargs) and len(args) == len(names) and constants.keys() <= parameters.parameters.keys()
        return cls(parameters=parameters, positions=len(args), names=names, constants=constants, plain=plain)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
        """Bind a call to the parameters of forward, with defaults filled in."""
        return _bound(self.parameters, args, kwargs)

    def call(self, arguments: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Turn named arguments into those of a call of the traced form, leaving out defaults.

        Those that were given by position are given so again: a decorator around forward may look for them there.
        """
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for name, parameter in self.parameters.parameters.items():
            value = arguments[name]
            if parameter.kind is parameter.VAR_POSITIONAL:
                args.extend(value)
            elif parameter.kind is parameter.VAR_KEYWORD:
                kwargs.update(value)
            elif parameter.kind is parameter.POSITIONAL_ONLY or len(args) < self.positions:
                args.append(value)
            elif value is not parameter.default:
                kwargs[name] = value
        return args, kwargs

    def tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """List the tensors of a call in the order of `names`.

        Raises GuardError when the call has another form than the traced one, TypeError when the model cannot take it.
        """
        if self.plain and len(args) == self.positions and _is_plain(args, kwargs):
            return list(args)
        leaves = _leaves(self.parameters, args, kwargs)
        for name, leaf in leaves.items():
            if not isinstance(leaf, Tensor) and not same_value(leaf, self.constants.get(name, _NOTHING)):
                self._refuse(name, leaves)
        tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
        if tuple(tensors) != self.names or len(leaves) != len(self.names) + len(self.constants):
            named = dict.fromkeys((*leaves, *self.names, *self.constants))
            self._refuse(next(name for name in named if self._traced(name) != _described(name, leaves)), leaves)
        return list(tensors.values())

    def _refuse(self, name: str, leaves: Leaves) -> NoReturn:
        raise GuardError(
            f"the model was traced with {self._traced(name)} for {name!r} and is now given "
            f"{_described(name, leaves)}; trace it again with such a call"
        )

    def _traced(self, name: str) -> str:
        return "a tensor" if name in self.names else _described(name, self.constants)


# Equal to no argument.
_NOTHING = object()


def _described(name: str, leaves: Leaves | Mapping[str, Any]) -> str:
    if name not in leaves:
        return "nothing"
    return "a tensor" if isinstance(leaves[name], Tensor) else reprlib.repr(leaves[name])


def _is_plain(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return not kwargs and all(isinstance(arg, Tensor) for arg in args)


def _bound(parameters: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    bound = parameters.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound


def _leaves(parameters: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Leaves:
    arguments = _bound(parameters, args, kwargs).arguments.items()
    return {name: leaf for argument, value in arguments for name, leaf in leaves_of(value, argument)}
