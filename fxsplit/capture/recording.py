"""One call of a model, in one mode, recorded: torch.fx's nodes, and what was found out on the way.

A recording counts only if a second one, from the state in which the first leaves the model, is the same: a forward that
counts its calls, or takes another way once it has kept something, would not run again as recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxsplit.capture.contexts import contexts_of
from fxsplit.capture.patches import AMBIENT, watched
from fxsplit.capture.questions import Guard
from fxsplit.capture.signature import Signature
from fxsplit.capture.tracer import COMPILED, Leaf, ValueTracer, reason_of
from fxsplit.capture.user_code import compiled_function, failing_function
from fxsplit.errors import BranchError, TraceError, UntraceableError
from fxsplit.meta.costs import CostMeter
from fxsplit.meta.evaluate import Constant, Outside, on_meta, resolve
from fxsplit.meta.kernels import Kernels
from fxsplit.meta.rest import Rest
from fxsplit.objects.contents import Contents, drawing_nothing, generators_around
from fxsplit.objects.same import Comparison
from fxsplit.objects.structure import META, map_tensors, tensors_in


@dataclass(kw_only=True)
class Recording:
    """`guards` are the answers that fixed the path, `opaque` the modules that became one op, with the reasons.

    `checkpoints` says whether the model recomputes by itself, `cuts_gradients` whether that gives parameters no
    gradient because no input wants one.
    """

    graph: fx.Graph
    guards: list[Guard]
    opaque: dict[str, str]
    checkpoints: bool = False
    cuts_gradients: bool = False


@dataclass(kw_only=True)
class Recorder:
    """Records `twin`, a copy of the model over meta tensors, in the mode in which it is.

    `arguments` are those of the call, by name; `originals` and `compiled` as the tracer has them.
    """

    twin: nn.Module
    signature: Signature
    arguments: dict[str, Any]
    leaves: Sequence[Leaf]
    originals: Mapping[int, Any]
    compiled: Mapping[str | FunctionType, str]
    kernels: Kernels
    _whole: dict[str | FunctionType, str] = field(default_factory=dict)
    _lenient: bool = False
    _rest: tuple[Rest, Exception] | None = None

    def record(self, batch_size: int | None = None, *, costs: bool = False) -> Recording:
        """At the batch size of the arguments, or at another one. With `costs` the nodes know theirs.

        A function or method that cannot be recorded becomes one op, as a module does, and so does the rest of the
        model's own forward from the first statement on that cannot.
        Raises TraceError when that is the first one of all, or the model cannot run.
        """
        while True:
            try:
                return self._record(batch_size, costs=costs)
            except TraceError:
                raise
            except Exception as error:
                compiled = compiled_function(error)
                function = compiled or failing_function(error, known=self._whole)
                if compiled is not None and compiled in self._whole:
                    raise self._error(UntraceableError(f"it calls {compiled.__name__!r}, which {COMPILED}")) from error
                if compiled is not None:
                    self._whole[compiled] = COMPILED
                elif function is not None and function not in self._whole:
                    self._whole[function] = reason_of(error)
                elif isinstance(error, UntraceableError) and not self._lenient:
                    self._lenient = True
                elif self._rest is None and (rest := self._rest_after(error)) is not None:
                    self._rest = rest, error
                else:
                    first = error if self._rest is None else self._rest[1]
                    raise self._error(first) from first

    def _rest_after(self, error: Exception) -> Rest | None:
        return Rest.after(self.twin, error) if isinstance(error, BranchError) else None

    def _record(self, batch_size: int | None, *, costs: bool) -> Recording:
        while True:
            held = Contents(self.twin)
            tracer, graph = self._trace(batch_size, costs=costs)
            changed = held.changed(self._whole)
            if not tracer.assigned and not changed:
                break
            assigned = {each.path: each.name for each in tracer.assigned}
            keeps_values = held.holds_values()
            for assignment in tracer.assigned:
                assignment.owner[assignment.name] = resolve(assignment.value, _value_of)
            held_then = Contents(self.twin)
            again, second = self._trace(batch_size)
            # What is kept once and for all, such as a table of positions, changes nothing the second time.
            goes_on = keeps_values or held_then.changed(self._whole)
            for assignment in (*reversed(again.assigned), *reversed(tracer.assigned)):
                assignment.undo()
            held.restore()
            if same_nodes(needed_nodes(graph), needed_nodes(second)) and not (changed and goes_on):
                break
            reasons = {path: _reason(name) for path, name in (changed or assigned).items()}
            # One that is whole already is changed from elsewhere.
            if known := [path for path in reasons if not path or path in self._whole]:
                raise self._error(UntraceableError(reasons[known[0]]))
            self._whole.update(reasons)
        return Recording(
            graph=graph,
            guards=tracer.guards,
            opaque=tracer.opaque,
            checkpoints=tracer.checkpoints,
            cuts_gradients=tracer.cuts_gradients,
        )

    def keep_whole(self, modules: dict[str, str]) -> None:
        """From now on each of these paths is one op, for the reason given."""
        self._whole.update(modules)

    def unsteady(self, recording: Recording) -> dict[str, str]:
        """The module that computes with another number or object when it is recorded once more, and the reason.

        Raises TraceError when that is the model itself.
        """
        node = first_difference(needed_nodes(recording.graph), needed_nodes(self.record().graph))
        if node is None:
            return {}
        path = node.meta.get("path", "")
        where = f"an op of {path!r}" if path else "an op"
        reason = (
            f"{where}, {node.name!r}, takes a number or an object that is another one at each call, such as one drawn, "
            "counted or read from a clock where tracing does not see it"
        )
        if not path or path in self._whole:
            raise self._error(UntraceableError(reason))
        return {path: reason}

    @property
    def device(self) -> torch.device:
        """Where the inputs really are."""
        given = tensors_in(self.arguments)
        return given[0].device if given else META

    @property
    def batch_size(self) -> int:
        """The first size of the first input that has one."""
        sizes = (len(tensor) for tensor in tensors_in(self.arguments) if tensor.dim())
        return max(next(sizes, 1), 1)

    def inputs(self, batch_size: int) -> list[Tensor]:
        """The tensors of the call at another batch size, on the meta device."""
        return tensors_in(self._resized(batch_size))

    def _resized(self, batch_size: int | None) -> dict[str, Any]:
        own = self.batch_size

        def resized(tensor: Tensor) -> Tensor:
            if batch_size is None or tensor.dim() == 0 or len(tensor) != own:
                return tensor
            return tensor.new_empty((batch_size, *tensor.shape[1:]))

        arguments: dict[str, Any] = map_tensors(resized, on_meta(self.arguments))
        return arguments

    def _trace(self, batch_size: int | None, *, costs: bool = False) -> tuple[ValueTracer, fx.Graph]:
        arguments = self._resized(batch_size)
        known = [*self.twin.parameters(), *self.twin.buffers(), *tensors_in(arguments)]
        tracer = ValueTracer(
            self.twin,
            self.signature,
            arguments,
            device=self.device,
            leaves=self.leaves,
            whole=dict(self.compiled) | self._whole,
            originals=self.originals,
            lenient=self._lenient,
            kernels=self.kernels,
            meter=CostMeter(known, self.kernels) if costs else None,
        )
        if self._rest is not None:
            rest, error = self._rest
            beginning = rest.beginning(self.twin, partial(tracer.call_rest, rest, reason_of(error)))
        functions = {each for each in (*self.leaves, *self._whole) if isinstance(each, FunctionType)}
        # Not watched: it is no context of the model's.
        with (
            torch.set_grad_enabled(self.twin.training),
            watched(tracer, functions),
            drawing_nothing(generators_around(self.twin)),
            nullcontext() if self._rest is None else _attribute(self.twin, "forward", beginning),
        ):
            try:
                graph = tracer.trace(self.twin)
            except BaseException:
                for assignment in reversed(tracer.assigned):
                    assignment.undo()
                raise
        return tracer, graph

    def _error(self, error: Exception) -> TraceError:
        mode = "training" if self.twin.training else "evaluation"
        advice = (
            "; move that part into a function or a module of its own, which then stays one op"
            if isinstance(error, UntraceableError)
            else ""
        )
        return TraceError(f"{type(self.twin).__name__} cannot be traced in {mode}: {reason_of(error)}{advice}")


@contextmanager
def _attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Inside, the module has an attribute of its own."""
    vars(module)[name] = value
    try:
        yield
    finally:
        del vars(module)[name]


def same_nodes(first: Sequence[fx.Node], second: Sequence[fx.Node]) -> bool:
    """Whether the nodes of two recordings do the same, one by one, in the same contexts."""
    return first_difference(first, second) is None


def first_difference(first: Sequence[fx.Node], second: Sequence[fx.Node]) -> fx.Node | None:
    """The first node that does not do what its partner in the other recording does, as `same_nodes` says."""
    comparison = Comparison(dict(zip(first, second, strict=False)))
    for one, other in zip(first, second, strict=False):
        if not (
            one.op == other.op
            and comparison.values(one.target, other.target)
            and comparison.values((one.args, one.kwargs), (other.args, other.kwargs))
            and contexts_of(one) == contexts_of(other)
        ):
            return one
    return None if len(first) == len(second) else max(first, second, key=len)[min(len(first), len(second))]


def has_numbers_of_its_own(recording: Recording, other: Recording) -> bool:
    """Whether ops of a mode take numbers or objects that the `other` mode's do not.

    Those that are drawn, counted or read from a clock do, and few others. What many ops of a kind that only this mode
    has take alike, such as the 1 that is added to counters of batches, is not drawn.
    """
    ours, theirs = (Counter(map(_numbers_taken, needed_nodes(each.graph))) for each in (recording, other))
    kinds = {key[:2] for key in theirs}
    return any(key[2] and (ours[key] == 1 or key[:2] in kinds) for key in ours - theirs)


def _numbers_taken(node: fx.Node) -> tuple[str, str, tuple[Any, ...]]:
    """The kind of an op and, in order, the numbers and objects that it takes; flags apart."""
    found: list[Any] = []

    def note(leaf: Any) -> None:
        if not isinstance(leaf, fx.Node | bool | None):
            found.append(leaf if type(leaf) in (int, float, complex, str, bytes) else id(leaf))

    fx.node.map_aggregate((node.args, node.kwargs), note)
    if isinstance(node.target, Constant):
        note(node.target.value)
    return node.op, getattr(node.target, "__qualname__", str(node.target)), tuple(found)


def needed_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes without the sizes, numbers and flags that only guards looked at."""
    needed: dict[fx.Node, None] = {}
    for node in reversed(graph.nodes):
        if not (is_only_a_number(node) or node.op == "get_attr") or any(user in needed for user in node.users):
            needed[node] = None
    return list(reversed(needed))


def is_only_a_number(node: fx.Node) -> bool:
    """Whether an op has no use but the number, size or flag that it delivers.

    A tensor may be of none either, but making it may draw or write.
    """
    value = node.meta.get("value")
    if value is None or node.op not in ("call_function", "call_method") or tensors_in(value):
        return False
    return not isinstance(node.target, Outside) or node.target.name in AMBIENT


def _value_of(leaf: Any) -> Any:
    return leaf.meta["value"] if isinstance(leaf, fx.Node) else leaf


def _reason(name: str) -> str:
    return f"its forward changes {name!r} in it, and would take another way the next time"
