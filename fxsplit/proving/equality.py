"""Compares what two calls leave behind, by structure and bit by bit.

    a step ──► output, loss, gradients, buffers, random state ──► leaves   {"output['logits']": a tensor, ...}

Every value is taken apart into leaves with names: tensors, and atoms such as numbers, strings and types. Two leaves
are equal if they have the same type and the same bits. Neither `repr` nor the `==` of foreign classes is used: the
first may leave things out, the second may be defined in any way.
"""

from __future__ import annotations

import math
import pickle
import random
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType, NoneType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fxsplit.objects.structure import tensors_in

# Runs a module, backward included, and gives the values that this leaves, with names.
Step = Callable[[nn.Module], Iterable[tuple[str, Any]]]

# Types whose `==` compares contents and nothing else.
PLAIN = (NoneType, bool, int, str, bytes, range, torch.dtype, torch.device, torch.layout, torch.memory_format)
BY_IDENTITY = (type, ModuleType, BuiltinFunctionType, Enum)
SPARSE_PARTS = ("crow_indices", "col_indices", "ccol_indices", "row_indices", "values")


class Leaf(NamedTuple):
    """Holds a tensor or an atom; an atom's `value` is plain data, or an object that is compared by identity."""

    kind: type
    value: Any
    wants_gradient: bool = False


Outcome = dict[str, Leaf]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A value that two calls left different: its name, the largest difference of its numbers, and both in words.

    Where the difference is not one of numbers, such as another shape or type, `size` is infinite.
    """

    name: str
    size: float
    words: str

    def __str__(self) -> str:
        return f"{self.name} ({self.words})"


def outcome(net: nn.Module, step: Step) -> Outcome:
    """Run a step with `net`, and return all that it leaves behind, by name. Gradients are dropped before and after."""
    net.zero_grad(set_to_none=True)
    left: Outcome = {}
    for name, value in step(net):
        left[f"type of {name}"] = Leaf(type, type(value))
        left |= leaves(value, name)
    for name, parameter in net.named_parameters():
        left |= leaves(parameter.grad, f"gradient of {name}", copied=False)
    net.zero_grad(set_to_none=True)
    for name, buffer in net.named_buffers():
        left |= leaves(buffer, f"buffer {name}")
    for source, state in random_states().items():
        left |= leaves(state, f"random state of {source}")
    return left


def loss_of(output: Any) -> Tensor | None:
    """Compute a scalar that depends on every element of the output, on each in another way.

    Returns None when nothing in the output requires a gradient.
    """
    leaves = [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in tensors_in(output)]
    leaves = [leaf.float() for leaf in leaves if leaf.requires_grad and leaf.numel()]
    if not leaves:
        return None
    weighted = [leaf * torch.linspace(-1, 2, leaf.numel(), device=leaf.device).view_as(leaf) for leaf in leaves]
    return torch.stack([each.mean() for each in weighted]).sum()


def random_states() -> dict[str, Any]:
    """Return the states of the global random generators: torch's, Python's and numpy's."""
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        # As bytes: each is a tuple of hundreds of numbers, which would become as many leaves.
        "Python": pickle.dumps(random.getstate()),
        "numpy": pickle.dumps(np.random.get_state()),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["CUDA"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """Set the states that `random_states` returned."""
    torch.set_rng_state(states["torch"])
    random.setstate(pickle.loads(states["Python"]))
    np.random.set_state(pickle.loads(states["numpy"]))
    if "CUDA" in states:
        torch.cuda.set_rng_state_all(states["CUDA"])


def leaves(value: Any, name: str, *, copied: bool = True) -> Outcome:
    """Take any value apart into leaves, by name; tensors are `copied` unless nothing is written into them later."""
    return dict(_Parts(copied=copied).of(value, name))


def differences(expected: Mapping[str, Leaf], found: Mapping[str, Leaf]) -> list[Difference]:
    """List all in which `found` differs from what was `expected`, in the order in which a step leaves it."""
    return [
        Difference(name=name, size=size, words=words)
        for name in {**expected, **found}
        for size, words in _between(expected.get(name), found.get(name))
    ]


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Tell whether two dense tensors of one shape and type are equal bit by bit: NaN equals itself, 0 is not -0."""
    return torch.equal(bytes_of(one), bytes_of(other))


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a dense tensor, uint8 (N,)."""
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


class _Parts:
    """Takes values apart; an object that was met before becomes a reference to its first name."""

    def __init__(self, *, copied: bool) -> None:
        self._copied = copied
        # By id, with the object itself, so that no other can get the same id.
        self._met: dict[int, tuple[str, Any]] = {}

    def of(self, value: Any, name: str) -> Iterator[tuple[str, Leaf]]:
        kind = type(value)
        if kind in PLAIN:
            yield name, Leaf(kind, value)
        elif kind in (float, complex):
            yield name, Leaf(kind, struct.pack("dd", complex(value).real, complex(value).imag))
        elif isinstance(value, BY_IDENTITY):
            yield name, Leaf(kind, value)
        elif isinstance(value, FunctionType):
            # Two copies of a model may each have created a function from the same code.
            yield name, Leaf(kind, value.__code__)
        elif isinstance(value, nn.Module):
            yield name, Leaf(kind, None)
        elif id(value) in self._met:
            yield name, Leaf(kind, f"the same as {self._met[id(value)][0]}")
        else:
            self._met[id(value)] = name, value
            yield from self._object(value, name)

    def _object(self, value: Any, name: str) -> Iterator[tuple[str, Leaf]]:
        kind = type(value)
        if isinstance(value, Tensor):
            yield from self._tensor(value, name)
        elif isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
            yield name, Leaf(kind, f"{value.dtype.str} {value.shape}".encode() + value.tobytes())
        elif isinstance(value, torch.Generator):
            yield name, Leaf(kind, value.get_state().numpy().tobytes())
        else:
            yield f"type of {name}", Leaf(type, kind)
            yield from self._items(value, name)

    def _items(self, value: Any, name: str) -> Iterator[tuple[str, Leaf]]:
        attributes = _attributes(value)
        if isinstance(value, dict):
            keys = [repr(key) if type(key) in PLAIN else f"key {index}" for index, key in enumerate(value)]
            yield f"keys of {name}", Leaf(str, "\n".join(keys))
            for key, item in zip(keys, value.items(), strict=True):
                # A plain key is in the name already; any other is taken apart with its item.
                yield from self.of(item if key.startswith("key ") else item[1], f"{name}[{key}]")
        elif isinstance(value, tuple | list | deque):
            yield f"length of {name}", Leaf(int, len(value))
            for index, item in enumerate(value):
                yield from self.of(item, f"{name}[{index}]")
        elif isinstance(value, set | frozenset) and all(type(item) in PLAIN for item in value):
            yield from self.of(sorted(value, key=lambda item: (type(item).__name__, str(item))), name)
        elif not attributes:
            yield from self._reduced(value, name)
        for attribute, item in attributes.items():
            yield from self.of(item, f"{name}.{attribute}")

    def _tensor(self, value: Tensor, name: str) -> Iterator[tuple[str, Leaf]]:
        kind, bare = type(value), value.detach()
        if value.layout is torch.strided and not value.is_nested:
            yield name, Leaf(kind, bare.clone() if self._copied else bare, value.requires_grad)
            return
        yield f"layout of {name}", Leaf(kind, f"{value.layout} of {value.dtype}", value.requires_grad)
        if value.is_nested:
            parts = {str(index): part for index, part in enumerate(bare.unbind())}
        else:
            yield f"shape of {name}", Leaf(str, str(tuple(bare.shape)))
            is_coo = value.layout is torch.sparse_coo
            names = ("_indices", "_values") if is_coo else SPARSE_PARTS
            parts = {part: getattr(bare, part)() for part in names if is_coo or _has(bare, part)}
        for part, inner in parts.items():
            yield from self._tensor(inner, f"{name}.{part}")

    def _reduced(self, value: Any, name: str) -> Iterator[tuple[str, Leaf]]:
        """Take apart what an object would be pickled as; one that cannot be pickled is compared by identity."""
        try:
            parts = value.__reduce_ex__(2)
        except Exception:
            parts = None
        if isinstance(parts, tuple):
            yield from self.of([list(part) if isinstance(part, Iterator) else part for part in parts], name)
        else:
            yield name, Leaf(type(value), value)


def _attributes(value: Any) -> dict[str, Any]:
    slots = [slot for kind in type(value).__mro__ for slot in _slots(kind) if slot[:2] != "__" and hasattr(value, slot)]
    return {**getattr(value, "__dict__", {}), **{slot: getattr(value, slot) for slot in slots}}


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _has(tensor: Tensor, part: str) -> bool:
    try:
        getattr(tensor, part)()
    except RuntimeError:
        return False
    return True


def _between(expected: Leaf | None, found: Leaf | None) -> Iterator[tuple[float, str]]:
    """Give by how much two leaves differ, and how in words; nothing if they are equal."""
    if expected is None or found is None:
        yield math.inf, "in only one of the two"
    elif not _same_type(expected.kind, found.kind):
        kinds = [("nothing" if leaf.kind is NoneType else leaf.kind.__name__) for leaf in (found, expected)]
        yield math.inf, " instead of ".join(kinds)
    elif expected.wants_gradient != found.wants_gradient:
        yield math.inf, "requires a gradient in only one of the two"
    elif isinstance(expected.value, Tensor) and isinstance(found.value, Tensor):
        yield from _between_tensors(expected.value, found.value)
    elif isinstance(expected.value, type) and isinstance(found.value, type):
        if not _same_type(expected.value, found.value):
            yield math.inf, f"{found.value.__name__} instead of {expected.value.__name__}"
    elif expected.value is not found.value and not (
        type(expected.value) is type(found.value)
        and type(found.value) in (*PLAIN, CodeType)
        and expected.value == found.value
    ):
        yield math.inf, "another value"


def _same_type(one: type, other: type) -> bool:
    """Tell whether two types mean the same: a class that a function defines is a new object at each call."""
    return one is other or (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


def _between_tensors(expected: Tensor, found: Tensor) -> Iterator[tuple[float, str]]:
    for noun in ("dtype", "shape", "device"):
        own, other = getattr(expected, noun), getattr(found, noun)
        if own != other:
            yield math.inf, f"{noun} {other} instead of {own}"
            return
    if same_bits(expected, found):
        return
    if not (expected.is_floating_point() or expected.is_complex()):
        yield math.inf, "other numbers"
        return
    size = (expected.to(torch.complex128) - found.to(torch.complex128)).abs().max().item()
    yield (size, f"by {size:.2g} at most") if math.isfinite(size) else (math.inf, "where one is not finite")
