"""Describes a captured network as pure data: values, the operations (ops) that produce them, and the cuts between ops.

    x ──► op 0 ──► op 1 ──► op 2 ──► ... ──► output
              cut 1    cut 2    cut 3

Cut `k` lies between op `k - 1` and op `k`; cut 0 is before the first op, cut `len(ops)` after the last. The boundary of
a cut are the values that are produced before it and needed after it. Nothing here owns a tensor or imports torch.
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

# The keys of whatever is kept for both modes: the values of `nn.Module.training`.
TRAINING, EVALUATION = True, False


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """Describes what an input or an op delivers.

    Args:
        shape: that of the traced batch, or None when the value is not a tensor.
        dtype: the tensor's dtype such as "float32", or else the name of the Python type.
        storage: the name of the value whose memory this one shares: its own, unless it is a view or the result of an
            in-place op.

    Raises ValueError for a negative size.
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
    """Describes a parameter or a buffer of the model, under the first of its names where it is tied."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    is_parameter: bool

    @property
    def elements(self) -> int:
        """Count the numbers in the tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """Describes one operation, a call of a leaf module, a function or a method, and what it costs.

    Costs up to `hidden_bytes` are for one sample in training. Seconds and workspaces are measured on a device for the
    traced batch; before that they are None and 0.

    Args:
        name: unique; also the name of the value that the op delivers (`output`).
        path: dotted path of the module that the op calls, or of the module whose forward calls it.
        reads: names of the values that are its inputs.
        state: names of the parameters and buffers that it uses.
        mutates: names of the values, parameters and buffers that it writes in place.
        macs: multiply-adds of forward, each counted as 1; `backward_macs` are those of backward.
        activation_bytes: what autograd keeps for backward because of this op, each storage charged to the first op that
            keeps it.
        saves: storages of values that autograd keeps for this op, charged to it or not.
        hidden_bytes: what autograd keeps for this op besides values, such as a mask.
        uncounted: it does work that torch's flop counter does not know.
        mixes_samples: what it gives for one sample depends on the others, as in BatchNorm in training.
        single_value_norm: path of a BatchNorm in it that gets one value a channel from a sample, and so needs at least
            two samples to train; None if there is none.
        is_dropout: it drops values at random, in training.
        autocast: number of the autocast region that forward opens around it, if any. A parameter is cast once a region.
        seconds: time of forward and backward; `forward_seconds` is that of forward alone.
        forward_workspace_bytes: memory that its kernels need only while they run; likewise `backward_workspace_bytes`.
        settled_seconds: time once it is settled, for an op of the eval graph; 0 if it was folded away. Likewise
            `settled_workspace_bytes`.

    Raises ValueError when its output has another name.
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
    """Lists the ops of one mode of a model in the order in which they run.

    `outputs` name the values that the model returns. Raises ValueError when a name is used twice or read before it is
    written.
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
        """Map names to values, inputs first."""
        return {value.name: value for value in (*self.inputs, *(op.output for op in self.ops))}

    @cached_property
    def written_at(self) -> dict[str, int]:
        """Map each value to the first cut at which it exists: 0 for inputs, `i + 1` for the output of op `i`."""
        return {
            **{value.name: 0 for value in self.inputs},
            **{op.name: index + 1 for index, op in enumerate(self.ops)},
        }

    @cached_property
    def read_until(self) -> dict[str, int]:
        """Map each value that some op reads to the index of the last op that reads it."""
        return {name: index for index, op in enumerate(self.ops) for name in op.reads}

    @cached_property
    def needed_until(self) -> dict[str, int]:
        """Map each value to the last cut at which it is needed: `i` if op `i` reads it last, `len(ops)` for outputs.

        -1 if nothing needs it.
        """
        last = dict.fromkeys(self.values, -1)
        for index, op in enumerate(self.ops):
            for name in op.reads:
                last[name] = index
        for name in self.outputs:
            last[name] = len(self.ops)
        return last

    @cached_property
    def boundaries(self) -> tuple[tuple[str, ...], ...]:
        """List the boundary of every cut `0 .. len(ops)`, its values in the order in which they are written."""
        found: list[list[str]] = [[] for _ in range(len(self.ops) + 1)]
        for name, written in self.written_at.items():
            for cut in range(written, self.needed_until[name] + 1):
                found[cut].append(name)
        return tuple(tuple(names) for names in found)

    def find(self, path: str) -> int:
        """Find the index of the first op at or inside the module `path`.

        Raises PartitionError when no op lies there.
        """
        for index, op in enumerate(self.ops):
            if op.path == path or op.path.startswith(f"{path}."):
                return index
        paths = {".".join(op.path.split(".")[:depth]) for op in self.ops for depth in range(1, op.path.count(".") + 2)}
        raise PartitionError(f"no operation of the model lies in {path!r}{nearest(path, sorted(paths - {''}))}")

    def digest(self) -> str:
        """Hash the structure into 16 hexadecimal digits.

        Weights, costs and input sizes do not count, so that a model has one digest for any batch and image size.
        """
        lines: Iterable[object] = (
            *((value.name, value.dtype) for value in self.inputs),
            *((op.name, op.kind, op.target, op.reads, op.state) for op in self.ops),
            *((state.name, state.shape) for state in self.state),
            self.outputs,
        )
        return hashlib.sha256("\n".join(map(repr, lines)).encode()).hexdigest()[:16]


class Modes(Protocol):
    """Holds the two graphs of a model: `train` runs in training, `eval` in evaluation. A `fxsplit.Trace` is one."""

    @property
    def train(self) -> Graph: ...

    @property
    def eval(self) -> Graph: ...


def cached_by_graphs(function: Callable[[Modes], Result]) -> Callable[[Modes], Result]:
    """Cache the result of `function` for each pair of graphs, until one of the graphs is freed.

    The result must not hold the graphs themselves, which would then never be freed.
    """
    results: dict[tuple[int, int], Result] = {}

    @wraps(function)
    def cached(modes: Modes) -> Result:
        key = id(modes.train), id(modes.eval)
        if key not in results:
            results[key] = function(modes)
            # A later graph may get the id of a freed one.
            for graph in (modes.train, modes.eval):
                weakref.finalize(graph, results.pop, key, None).atexit = False
        return results[key]

    return cached


def prefixes(path: str) -> list[str]:
    """List the modules around a path from the outside in, and itself: `""`, `"layer1"`, `"layer1.0"`."""
    names = path.split(".")
    return ["", *(".".join(names[: depth + 1]) for depth in range(len(names)) if path)]
