"""What a call of a module leaves in it besides numbers: other attributes and buffers, other contents of containers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fxsplit.objects.contents import Contents
from fxsplit.objects.structure import META, map_tensors

MISSING = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Records that a call set `name` in `owner`, the buffers or attributes of the module `path`, to `value`."""

    path: str
    owner: dict[str, Any]
    name: str
    before: Any
    value: Any

    def redo(self) -> None:
        """Set it to the value once more."""
        self.owner[self.name] = self.value

    def undo(self) -> None:
        """Set it back to what it was before."""
        if self.before is MISSING:
            self.owner.pop(self.name, None)
        else:
            self.owner[self.name] = self.before


class Restorable(Protocol):
    """Remembers what can be put back."""

    def restore(self) -> None:
        """Put it back as it was."""


@dataclass(slots=True)
class Effects:
    """Holds what one call changed in a module or around the model, all of which is as before now.

    That is what it assigned, and `before` and `after` remember contents of containers and values of globals. `module`
    is the name of its class; the paths of assignments lead on from it.
    """

    module: str
    assignments: Sequence[Assignment] = ()
    before: Restorable | None = None
    after: Restorable | None = None

    def __bool__(self) -> bool:
        return bool(self.assignments) or self.after is not None

    def redo(self) -> None:
        """Leave the module as the call did."""
        for assignment in self.assignments:
            assignment.redo()
        if self.after is not None:
            self.after.restore()

    def undo(self) -> None:
        """Leave the module as it was before the call."""
        for assignment in reversed(self.assignments):
            assignment.undo()
        if self.before is not None:
            self.before.restore()

    def names(self) -> list[str]:
        """List what was assigned, by dotted names that begin with the module's class."""
        return [".".join(filter(None, (self.module, each.path, each.name))) for each in self.assignments]

    def replaced(self) -> list[Assignment]:
        """List the assignments of a tensor in the place of another one."""
        return [each for each in self.assignments if isinstance(each.before, Tensor) and isinstance(each.value, Tensor)]


@contextmanager
def undone(module: nn.Module) -> Iterator[Effects]:
    """Undo at the end what was left in the module inside, and fill the Effects that are given.

    Writes into tensors stay.
    """
    effects, held, owners = Effects(type(module).__name__), Contents(module), list(_owners(module))
    before = [dict(owner) for _, owner in owners]
    try:
        yield effects
    finally:
        effects.assignments = [
            Assignment(path=path, owner=owner, name=name, before=earlier.get(name, MISSING), value=owner[name])
            for (path, owner), earlier in zip(owners, before, strict=True)
            for name in _set_since(earlier, owner)
        ]
        if held.changed():
            effects.before, effects.after = held, held.again()
        for (_, owner), earlier in zip(owners, before, strict=True):
            owner.clear()
            owner.update(earlier)
        held.restore()


@contextmanager
def seen_in_copy(copy: nn.Module, original: nn.Module) -> Iterator[Effects]:
    """Fill the Effects that are given with what was left in a copy inside, as if it had been left in the original.

    Tensors among it are on the meta device.
    """
    effects, held = Effects(type(copy).__name__), Contents(copy)
    pairs = list(zip(_owners(copy), _owners(original), strict=True))
    before = [dict(owner) for (_, owner), _ in pairs]
    yield effects
    changed = held.changes()
    effects.assignments = [
        Assignment(
            path=path,
            owner=original_owner,
            name=name,
            before=original_owner.get(name, MISSING),
            value=map_tensors(lambda tensor: tensor.to(META), owner[name]),
        )
        for ((path, owner), (_, original_owner)), earlier in zip(pairs, before, strict=True)
        for name in owner
        if name in _set_since(earlier, owner) or (path, name) in changed
    ]


def _owners(module: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the dicts in which attributes and buffers of a module, and of those inside it, lie, with their paths."""
    for path, each in module.named_modules():
        # A scripted module keeps its state elsewhere.
        if not isinstance(each, torch.jit.ScriptModule):
            yield path, vars(each)
            yield path, each._buffers


def _set_since(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the names that hold another object than before."""
    return [name for name, value in now.items() if value is not before.get(name, MISSING)]
