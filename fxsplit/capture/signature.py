"""How a model is called: which arguments, nested how, and where the tensors stand in them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxsplit.errors import GuardError

Leaves = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """The form of the traced call: every argument, or part of one, by a name such as `x` or `batch.image`.

    `names` are those of the tensors, in order; `constants` are all other parts, with their values.
    """

    parameters: inspect.Signature
    names: tuple[str, ...]
    constants: Mapping[str, Any]

    @classmethod
    def of(cls, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Signature:
        """Raises TypeError when the model cannot be called like that."""
        given = inspect.signature(model.forward).parameters.values()
        # Annotations may refer to what cannot be pickled, and nothing needs them.
        parameters = inspect.Signature([each.replace(annotation=inspect.Parameter.empty) for each in given])
        leaves = _leaves(parameters, args, kwargs)
        return cls(
            parameters=parameters,
            names=tuple(name for name, leaf in leaves.items() if isinstance(leaf, Tensor)),
            constants={name: leaf for name, leaf in leaves.items() if not isinstance(leaf, Tensor)},
        )

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
        """The call with its defaults filled in."""
        return _bound(self.parameters, args, kwargs)

    def tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call, in the order of `names`.

        Raises GuardError when the call has another form than the traced one, TypeError when it has none at all.
        """
        leaves = _leaves(self.parameters, args, kwargs)
        for name in {**leaves, **dict.fromkeys(self.names), **self.constants}:
            traced = self._describe(name, self.constants) if name not in self.names else "a tensor"
            given = self._describe(name, leaves)
            if traced != given:
                raise GuardError(
                    f"the model was traced with {traced} for {name!r} and is now given {given}; "
                    "trace it again with such a call"
                )
        return [leaves[name] for name in self.names]

    @staticmethod
    def _describe(name: str, leaves: Leaves | Mapping[str, Any]) -> str:
        if name not in leaves:
            return "nothing"
        return "a tensor" if isinstance(leaves[name], Tensor) else repr(leaves[name])


def _bound(parameters: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    bound = parameters.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound


def _leaves(parameters: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Leaves:
    paths, _ = pytree.tree_flatten_with_path(_bound(parameters, args, kwargs).arguments)
    return {_name(path): leaf for path, leaf in paths}


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
