"""Records one call of a model in one mode: the nodes of torch.fx, guards and costs.

Where forward changes the model, a second call is recorded from the state in which the first one leaves it, and must
give the same graph: a forward that counts its calls, or goes another way once it has stored something, is not recorded.
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
from fxsplit.capture.reasons import COMPILED, READS_ANOTHER, reason_of
from fxsplit.capture.signature import Signature
from fxsplit.capture.tracer import Leaf, ValueTracer
from fxsplit.capture.user_code import compiled_function, failing_function
from fxsplit.errors import BranchError, TraceError, UntraceableError
from fxsplit.meta.costs import CostMeter
from fxsplit.meta.evaluate import Constant, ImpureCall, on_meta
from fxsplit.meta.kernels import Kernels
from fxsplit.meta.rest import Rest
from fxsplit.objects.contents import Contents, drawing_nothing, generators_around
from fxsplit.objects.effects import Assignment, Effects
from fxsplit.objects.same import Comparison
from fxsplit.objects.structure import META, map_tensors, tensors_in
from fxsplit.objects.surroundings import Change, Surroundings


@dataclass(kw_only=True)
class Recording:
    """Holds the graph of one call and what was found while it was recorded.

    Args:
        guards: answers that decided which way forward went.
        opaque: modules and functions that became one op although they have ops inside, with the reasons.
        checkpoints: the model recomputes by itself (`torch.utils.checkpoint`).
        cuts_gradients: it does so by the older, reentrant kind, which gives parameters no gradient where no input
            wants one.
        numbers: numbers, flags and strings that modules returned, by path and by place in what they returned.
    """

    graph: fx.Graph
    guards: list[Guard]
    opaque: dict[str, str]
    checkpoints: bool = False
    cuts_gradients: bool = False
    numbers: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)


@dataclass(kw_only=True)
class Recorder:
    """Records calls of `meta_model`, a copy of the model with meta tensors, in its current mode.

    `arguments` are those of the call, by name; `compiled` are paths and functions that torch.compile made, with the
    reason why they stay one op; `leaves`, `originals`, `kernels` and `surroundings` go to the tracer.
    """

    meta_model: nn.Module
    signature: Signature
    arguments: dict[str, Any]
    leaves: Sequence[Leaf]
    originals: Mapping[int, Any]
    compiled: Mapping[str | FunctionType, str]
    kernels: Kernels
    surroundings: Surroundings
    _whole: dict[str | FunctionType, str] = field(default_factory=dict)
    _lenient: bool = False
    _rest: tuple[Rest, Exception] | None = None

    def record(self, batch_size: int | None = None, *, costs: bool = False) -> Recording:
        """Record a call at the batch size of the arguments, or at another one; with `costs` each op is measured.

        A function or method that cannot be recorded becomes one op, as a module does, and so does the rest of the
        model's own forward from the first statement on that cannot; then recording starts again. Raises TraceError when
        that is the first statement of all, or the model cannot run.
        """
        while True:
            try:
                return self._record(batch_size, costs=costs)
            except TraceError:
                raise
            except Exception as error:
                compiled = compiled_function(error)
                function = compiled or failing_function(error, kept_whole=self._whole)
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
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # forward calls sys.exit, say, which is to end no program that traces it
                raise self._error(error) from error

    def _rest_after(self, error: Exception) -> Rest | None:
        return Rest.after(self.meta_model, error) if isinstance(error, BranchError) else None

    def _record(self, batch_size: int | None, *, costs: bool) -> Recording:
        # (1) Record a call. If it left the model as it was, that is all.
        # (2) Else put in place what it assigned, and what modules that are one op left in themselves, and record a
        #     second call from there.
        # (3) Restore the model. If the second call is the same and changes nothing more, the first one stands.
        # (4) Else the modules that changed become one op, or the one that reads what another left, and recording
        #     starts again. So does a module whose forward changes what is around the model, which must really happen
        #     in each call.
        while True:
            held = Contents(self.meta_model)
            try:
                tracer, graph = self._trace(batch_size, costs=costs)  # (1)
            except Exception as error:
                if not self._keep_readers_whole(error, batch_size):
                    raise
                continue
            if tracer.around:
                _undo(tracer.assigned)
                held.restore()
                if self._keep_what_changes_around(batch_size):
                    continue
                tracer, graph = self._trace(batch_size, costs=costs)
            changed = held.changed(self._whole)
            left: list[Assignment | Effects] = [*tracer.assigned, *tracer.effects]
            if not left and not changed:
                break
            assigned = {each.path: each.name for each in tracer.assigned}
            keeps_values = held.holds_values()
            for each in left:
                each.redo()
            try:
                held_after = Contents(self.meta_model)
                second_tracer, second_graph = self._trace(batch_size)  # (2)
                # What is stored once, such as a table of positions, changes no more in the second call.
                keeps_changing = keeps_values or held_after.changed(self._whole)
                _undo(second_tracer.assigned)  # (3)
                if second_tracer.around and self._keep_what_changes_around(batch_size):
                    continue
            finally:
                _undo(left)
                held.restore()
            difference = first_difference(needed_nodes(graph), needed_nodes(second_graph))
            if difference is None and not (changed and keeps_changing):
                break
            reasons = {path: _changes_itself(name) for path, name in (changed or assigned).items()}
            if not reasons:
                assert difference is not None
                either = {**tracer.opaque, **second_tracer.opaque}
                both = tracer.opaque.keys() & second_tracer.opaque.keys()
                in_one = {path: why for path, why in either.items() if path not in both and path not in self._whole}
                reasons = in_one or {_around(difference): f"at {difference.name!r} it {READS_WHAT_IS_LEFT}"}
            # A module that is one op already is changed by code outside of it.
            if known := [path for path in reasons if not path or path in self._whole]:
                raise self._error(UntraceableError(reasons[known[0]]))
            self._whole.update(reasons)  # (4)
        return Recording(
            graph=graph,
            guards=tracer.guards,
            opaque=tracer.opaque,
            checkpoints=tracer.checkpoints,
            cuts_gradients=tracer.cuts_gradients,
            numbers=tracer.numbers,
        )

    def _keep_readers_whole(self, error: Exception, batch_size: int | None) -> bool:
        """Keep modules whole that read what others, which are one op, left in themselves, if it failed for that reason.

        Whether it did shows a call from there. Returns whether there are such modules.
        """
        left: Sequence[Effects] = getattr(error, "effects", ())
        if isinstance(error, UntraceableError) or not left:
            return False
        for each in left:
            each.redo()
        try:
            opaque = self._trace(batch_size)[0].opaque
        except Exception:
            return False
        finally:
            for each in reversed(left):
                each.undo()
        new = {path: why for path, why in opaque.items() if path not in self._whole and READS_ANOTHER in why}
        self._whole.update(new)
        return bool(new)

    def _keep_what_changes_around(self, batch_size: int | None) -> bool:
        """Record the modules as one op each whose forwards change what is around the model, if there are any.

        Of the model's own forward, the functions become one op which name what is changed. Raises TraceError if none
        do, or if that did not help. Returns whether anything became one op.
        """
        tracer, _ = self._trace(batch_size, attributing=True)
        _undo(tracer.assigned)
        own = tracer.around.pop("", None)
        found: dict[str | FunctionType, str] = {path: _changes_around(each) for path, each in tracer.around.items()}
        if own is not None and not found:
            functions = self.surroundings.functions_naming(own.name)
            found = {each: _changes_around(own) for each in functions if each not in self._whole}
            if not found:
                raise self._error(UntraceableError(_changes_around(own)))
        self._whole |= found
        return bool(found)

    def keep_whole(self, modules: dict[str, str]) -> None:
        """Record each of these paths as one op from now on, for the reason given."""
        self._whole.update(modules)

    def nondeterministic_module(self, recording: Recording) -> dict[str, str]:
        """Find a module whose ops take another number or object when it is recorded once more, with that as reason.

        Returns a dict of one item, or of none. Raises TraceError when it is the model itself.
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
        """Return the device of the inputs."""
        given = tensors_in(self.arguments)
        return given[0].device if given else META

    @property
    def batch_size(self) -> int:
        """Return the first size of the first input that has sizes."""
        sizes = (len(tensor) for tensor in tensors_in(self.arguments) if tensor.dim())
        return max(next(sizes, 1), 1)

    def inputs(self, batch_size: int) -> list[Tensor]:
        """List the input tensors at another batch size, on the meta device."""
        return tensors_in(self._resized(batch_size))

    def _resized(self, batch_size: int | None) -> dict[str, Any]:
        own = self.batch_size

        def resized(tensor: Tensor) -> Tensor:
            if batch_size is None or tensor.dim() == 0 or len(tensor) != own:
                return tensor
            return tensor.new_empty((batch_size, *tensor.shape[1:]))

        arguments: dict[str, Any] = map_tensors(resized, on_meta(self.arguments))
        return arguments

    def _trace(
        self, batch_size: int | None, *, costs: bool = False, attributing: bool = False
    ) -> tuple[ValueTracer, fx.Graph]:
        """Trace a call. What it changes around the model is undone; the tracer says that there was something."""
        while True:
            moment = self.surroundings.now()
            try:
                tracer, graph = self._trace_once(batch_size, costs=costs, attributing=attributing)
            except BaseException:
                moment.restore()
                if self.surroundings.emptied_caches():
                    continue
                raise
            if changes := moment.changed():
                moment.restore()
                if not attributing:
                    tracer.around.setdefault("", changes[0])
            if not self.surroundings.emptied_caches():
                return tracer, graph
            _undo(tracer.assigned)

    def _trace_once(self, batch_size: int | None, *, costs: bool, attributing: bool) -> tuple[ValueTracer, fx.Graph]:
        arguments = self._resized(batch_size)
        known = [*self.meta_model.parameters(), *self.meta_model.buffers(), *tensors_in(arguments)]
        tracer = ValueTracer(
            self.meta_model,
            self.signature,
            arguments,
            device=self.device,
            leaves=self.leaves,
            whole=dict(self.compiled) | self._whole,
            originals=self.originals,
            lenient=self._lenient,
            kernels=self.kernels,
            meter=CostMeter(known, self.kernels) if costs else None,
            surroundings=self.surroundings,
            attributing=attributing,
        )
        if self._rest is not None:
            rest, error = self._rest
            beginning = rest.beginning(self.meta_model, partial(tracer.call_rest, rest, reason_of(error)))
        functions = {each for each in (*self.leaves, *self._whole) if isinstance(each, FunctionType)}
        # Opened before the patches: it is not a context of the model.
        with (
            torch.set_grad_enabled(self.meta_model.training),
            watched(tracer, functions),
            self.surroundings.without_caches(tracer.uncached),
            drawing_nothing(generators_around(self.meta_model)),
            nullcontext() if self._rest is None else _attribute(self.meta_model, "forward", beginning),
        ):
            try:
                graph = tracer.trace(self.meta_model)
            except BaseException as error:
                _undo(tracer.assigned)
                left = dict.fromkeys(name for effects in tracer.effects for name in effects.names())
                if left and not isinstance(error, UntraceableError):
                    vars(error)["effects"] = tracer.effects
                    error.add_note(f"perhaps it {READS_WHAT_IS_LEFT}: {', '.join(left)}")
                raise
        return tracer, graph

    def _error(self, error: BaseException) -> TraceError:
        mode = "training" if self.meta_model.training else "evaluation"
        advice = (
            "; move that part into a function or a module of its own, which then stays one op"
            if isinstance(error, UntraceableError)
            else ""
        )
        return TraceError(f"{type(self.meta_model).__name__} cannot be traced in {mode}: {reason_of(error)}{advice}")


def _undo(changes: Sequence[Assignment | Effects]) -> None:
    for each in reversed(changes):
        each.undo()


@contextmanager
def _attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of the module while the context is open."""
    vars(module)[name] = value
    try:
        yield
    finally:
        del vars(module)[name]


def same_nodes(first: Sequence[fx.Node], second: Sequence[fx.Node]) -> bool:
    """Whether the nodes of two recordings are the same ops, one by one, in the same contexts."""
    return first_difference(first, second) is None


def first_difference(first: Sequence[fx.Node], second: Sequence[fx.Node]) -> fx.Node | None:
    """Find the first node that differs from its partner in the other recording, or None."""
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
    """Whether ops of one mode take numbers or objects that those of the `other` mode do not.

    Numbers that were drawn, counted or read from a clock differ between modes, and few others do: it is then worth
    recording once more. A number that several ops of a kind which only this mode has take alike, such as the 1 that is
    added to batch counters of norms, is not drawn.
    """
    counts, others = (Counter(map(_numbers_taken, needed_nodes(each.graph))) for each in (recording, other))
    kinds = {key[:2] for key in others}
    return any(key[2] and (counts[key] == 1 or key[:2] in kinds) for key in counts - others)


def _numbers_taken(node: fx.Node) -> tuple[str, str, tuple[Any, ...]]:
    """Describe an op by its kind and, in order, the numbers and objects that it takes; flags and None do not count."""
    found: list[Any] = []

    def note(leaf: Any) -> None:
        if not isinstance(leaf, fx.Node | bool | None):
            found.append(leaf if type(leaf) in (int, float, complex, str, bytes) else id(leaf))

    fx.node.map_aggregate((node.args, node.kwargs), note)
    if isinstance(node.target, Constant):
        note(node.target.value)
    return node.op, getattr(node.target, "__qualname__", str(node.target)), tuple(found)


def needed_nodes(graph: fx.Graph) -> list[fx.Node]:
    """List the nodes without the sizes, numbers and flags that only guards use."""
    needed: dict[fx.Node, None] = {}
    for node in reversed(graph.nodes):
        if not (is_only_a_number(node) or node.op == "get_attr") or any(user in needed for user in node.users):
            needed[node] = None
    return list(reversed(needed))


def is_only_a_number(node: fx.Node) -> bool:
    """Whether an op gives a number, size or flag and has no other effect, so that it can be left out if unused.

    An op that makes a tensor may also draw or write, and stays.
    """
    value = node.meta.get("value")
    if value is None or node.op not in ("call_function", "call_method") or tensors_in(value):
        return False
    return not isinstance(node.target, ImpureCall) or node.target.name in AMBIENT


READS_WHAT_IS_LEFT = "reads what a module that is one op leaves in itself or around it"


def _around(node: fx.Node) -> str:
    """Return the path of the module in whose forward an op is; the model's own for what it returns."""
    path = str(node.meta.get("path", ""))
    return path.rpartition(".")[0] if node.op == "call_module" else path


def _changes_around(change: Change) -> str:
    return f"its forward changes {change.words}, which a recording would lose"


def _changes_itself(name: str) -> str:
    return f"its forward changes {name!r} in it, and would take another way the next time"
