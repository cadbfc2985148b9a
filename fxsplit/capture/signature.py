"""How a model is called: which arguments, nested how, and where the tensors stand in them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxsplit.errors import GuardError


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """The form of the traced call. `constants` has None where a tensor stands, else the argument itself.

    `names` are those of the tensors, in order: `x`, or `batch.image` for a tensor in a dict.
    """

    parameters: inspect.Signature
    structure: pytree.TreeSpec
    constants: tuple[Any, ...]
    is_tensor: tuple[bool, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Signature:
        """Raises TypeError when the model cannot be called like that."""
        parameters = inspect.signature(model.forward)
        # Annotations may refer to what cannot be pickled, and nothing needs them.
        bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters.parameters.values()]
        parameters = inspect.Signature(bare)
        leaves, structure = pytree.tree_flatten_with_path(_bound(parameters, args, kwargs).arguments)
        return cls(
            parameters=parameters,
            structure=structure,
            constants=tuple(None if isinstance(leaf, Tensor) else leaf for _, leaf in leaves),
            is_tensor=tuple(isinstance(leaf, Tensor) for _, leaf in leaves),
            names=tuple(_name(path) for path, leaf in leaves if isinstance(leaf, Tensor)),
        )

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
        """The call with its defaults filled in."""
        return _bound(self.parameters, args, kwargs)

    def tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call, in the order of `names`.

        Raises GuardError when the call has another form than the traced one, TypeError when it has none at all.
        """
        leaves, structure = pytree.tree_flatten(self.bind(args, kwargs).arguments)
        if structure != self.structure:
            raise GuardError(
                f"the model was traced for a call of the form {self.structure} and is now called as {structure}; "
                "trace it again in this form"
            )
        for leaf, is_tensor, constant in zip(leaves, self.is_tensor, self.constants, strict=True):
            if isinstance(leaf, Tensor) is not is_tensor or not (is_tensor or leaf is constant or leaf == constant):
                raise GuardError(
                    f"the model was traced with {'a tensor' if is_tensor else repr(constant)} where it is now given "
                    f"{'a tensor' if isinstance(leaf, Tensor) else repr(leaf)}; trace it again with that"
                )
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _bound(parameters: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    bound = parameters.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
