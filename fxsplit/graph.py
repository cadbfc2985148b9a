"""The captured network as pure data: values, the operations that produce them, and what is live between them.

    x ──► op 0 ──► op 1 ──► op 2 ──► ... ──► output
              cut 1    cut 2    cut 3

Cut `k` lies between op `k - 1` and op `k`; cut 0 is before the first op, cut `len(ops)` after the last. The values
that are produced before a cut and needed after it are its boundary. Nothing here owns a tensor or imports torch.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Literal, Protocol, TypeVar

from fxsplit.errors import PartitionError, nearest

OpKind = Literal["module", "function", "method"]
Result = TypeVar("Result")

# What is kept by mode has these keys, as a module's own `training` says them.
TRAINING, EVALUATION = True, False


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """What an input or an op delivers.

    `shape` is that of the traced batch, or None when the value is not a tensor; `dtype` is then the Python type.
    `storage` names the value whose memory this one shares (its own name unless it is a view or was written in place).
    """

    name: str
    shape: tuple[int, ...] | None
    dtype: str
    bytes_per_sample: int = 0
    storage: str = ""

    def __post_init__(self) -> None:
        if not self.storage:
            object.__setattr__(self, "storage", self.name)
        if self.bytes_per_sample < 0 or any(size < 0 for size in self.shape or ()):
            raise ValueError(f"value {self.name!r} has a negative size")


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A parameter or a buffer of the model, under the first of its names."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    is_parameter: bool

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operation: a leaf module, a function or a method call.

    `name` is unique and also names the value that the op delivers (`output`). `path` is the dotted path of the module
    in which the op happens, or of the module that it is. `reads` are values, `state` parameters and buffers;
    `mutates` lists those of both that are written in place.

    Costs are for one sample, in training: `macs` (one multiply-add is 1) and `backward_macs`, and `activation_bytes`,
    what autograd keeps for backward because of this op, each storage counted once. `saves` are the storages of values
    that it keeps, whether or not an earlier op keeps them too, and `hidden_bytes` what it keeps besides, such as a
    mask. An op that is `uncounted` does work that torch's counter of multiply-adds does not know. One that
    `mixes_samples`, as BatchNorm does with the statistics of its batch, gives a sample what depends on the others.
    `single_value_norm` is the path of a BatchNorm in it whose statistics get one value a channel of a sample, so that
    it needs two samples. One that `is_dropout` drops values at random in training. `autocast` numbers the region of
    forward's own autocast in which it runs, if any: a parameter is cast once for all ops of a region.

    Measured on a device, and for the traced batch, are `seconds` (forward and backward) and `forward_seconds`, None
    before, and `forward_workspace_bytes` and `backward_workspace_bytes`, which kernels borrow while they run; of an op
    in evaluation also `settled_seconds` and `settled_workspace_bytes`, once it is settled: 0 if it was folded away.
    """

    name: str
    path: str
    kind: OpKind
    target: str
    reads: tuple[str, ...]
    output: Value
    state: tuple[str, ...] = ()
    mutates: tuple[str, ...] = ()
    macs: int = 0
    activation_bytes: int = 0
    backward_macs: int = 0
    seconds: float | None = None
    forward_seconds: float | None = None
    saves: tuple[str, ...] = ()
    hidden_bytes: int = 0
    uncounted: bool = False
    mixes_samples: bool = False
    single_value_norm: str | None = None
    is_dropout: bool = False
    autocast: int | None = None
    forward_workspace_bytes: int = 0
    backward_workspace_bytes: int = 0
    settled_seconds: float | None = None
    settled_workspace_bytes: int = 0

    def __post_init__(self) -> None:
        if self.output.name != self.name:
            raise ValueError(f"op {self.name!r} delivers a value of another name, {self.output.name!r}")


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The ops of one mode of a model, in the order in which they run.

    Raises ValueError when a name is used twice or read before it is written.
    """

    batch_size: int
    inputs: tuple[Value, ...]
    ops: tuple[Op, ...]
    outputs: tuple[str, ...]
    state: tuple[State, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError("the batch size must be at least 1")
        known: set[str] = set()
        for value in self.inputs:
            if value.name in known:
                raise ValueError(f"the name {value.name!r} is used twice")
            known.add(value.name)
        for op in self.ops:
            missing = [name for name in op.reads if name not in known]
            if missing:
                raise ValueError(f"op {op.name!r} reads {missing[0]!r} before it is written")
            if op.name in known:
                raise ValueError(f"the name {op.name!r} is used twice")
            known.add(op.name)
        if missing := [name for name in self.outputs if name not in known]:
            raise ValueError(f"the output {missing[0]!r} is never written")

    def __len__(self) -> int:
        return len(self.ops)

    @cached_property
    def values(self) -> dict[str, Value]:
        """Every value by name, inputs first."""
        return {value.name: value for value in (*self.inputs, *(op.output for op in self.ops))}

    @cached_property
    def written_at(self) -> dict[str, int]:
        """First cut at which a value exists: 0 for inputs, `i + 1` for the output of op `i`."""
        return {
            **{value.name: 0 for value in self.inputs},
            **{op.name: index + 1 for index, op in enumerate(self.ops)},
        }

    @cached_property
    def read_until(self) -> dict[str, int]:
        """The last op that reads each value that any op reads."""
        return {name: index for index, op in enumerate(self.ops) for name in op.reads}

    @cached_property
    def needed_until(self) -> dict[str, int]:
        """Last cut at which a value is still needed: `i` when op `i` reads it last, `len(ops)` for outputs."""
        last = dict.fromkeys(self.values, -1)
        for index, op in enumerate(self.ops):
            for name in op.reads:
                last[name] = index
        for name in self.outputs:
            last[name] = len(self.ops)
        return last

    @cached_property
    def boundaries(self) -> tuple[tuple[str, ...], ...]:
        """The boundary of every cut `0 .. len(ops)`, each in the order in which its values are written."""
        found: list[list[str]] = [[] for _ in range(len(self.ops) + 1)]
        for name, written in self.written_at.items():
            for cut in range(written, self.needed_until[name] + 1):
                found[cut].append(name)
        return tuple(tuple(names) for names in found)

    def live_at(self, cut: int) -> tuple[str, ...]:
        """Names of the values in the boundary of `cut`, in the order in which they are written.

        Raises IndexError when there is no such cut.
        """
        if not 0 <= cut <= len(self.ops):
            raise IndexError(f"cut {cut} is outside 0..{len(self.ops)}")
        return self.boundaries[cut]

    def find(self, path: str) -> int:
        """Index of the first op at or inside the module `path`.

        Raises PartitionError when no op lies there.
        """
        for index, op in enumerate(self.ops):
            if op.path == path or op.path.startswith(f"{path}."):
                return index
        paths = {".".join(op.path.split(".")[:depth]) for op in self.ops for depth in range(1, op.path.count(".") + 2)}
        raise PartitionError(f"no operation of the model lies in {path!r}{nearest(path, sorted(paths - {''}))}")

    def digest(self) -> str:
        """A fingerprint of the structure: 16 hexadecimal digits.

        They depend on neither weights, costs nor the size of the input, so that one model has one digest for any
        batch and any image.
        """
        lines: Iterable[object] = (
            *((value.name, value.dtype) for value in self.inputs),
            *((op.name, op.kind, op.target, op.reads, op.state) for op in self.ops),
            *((state.name, state.shape) for state in self.state),
            self.outputs,
        )
        return hashlib.sha256("\n".join(map(repr, lines)).encode()).hexdigest()[:16]


class Modes(Protocol):
    """A model as its two graphs: `train` runs in training, `eval` in evaluation. A `fxsplit.Trace` is one."""

    @property
    def train(self) -> Graph: ...

    @property
    def eval(self) -> Graph: ...


def once_a_pair(function: Callable[[Modes], Result]) -> Callable[[Modes], Result]:
    """Work out what follows from a pair of graphs only once, whoever holds the pair, and forget it with the graphs.

    The result must not hold the graphs themselves, which would then live for ever.
    """
    found: dict[tuple[int, int], Result] = {}

    @wraps(function)
    def kept(modes: Modes) -> Result:
        key = id(modes.train), id(modes.eval)
        if key not in found:
            found[key] = function(modes)
            # Before another graph can get the id of one of them.
            for graph in (modes.train, modes.eval):
                weakref.finalize(graph, found.pop, key, None).atexit = False
        return found[key]

    return kept


def prefixes(path: str) -> list[str]:
    """The modules around a path, from the outside in, and itself: `""`, `"layer1"`, `"layer1.0"`."""
    parts = path.split(".")
    return ["", *(".".join(parts[: depth + 1]) for depth in range(len(parts)) if path)]
