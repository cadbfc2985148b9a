"""Leave the batch size free where Python asked for it.

`len(x)` and `int(x.shape[0])` give Python a plain number, which stands in the recording as a constant: a reshape to
(2, -1), a division by 2. Recordings at several batch sizes tell which constants follow the batch. Where all of them
do, and nothing else changes, they become ops, and the questions need no guard any more:

    at 2    len(x)   view(y, 2, -1)          at 5    len(x)   view(y, 5, -1)      ──►     view(y, len(x), -1)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx

from fxsplit.capture.contexts import contexts_of
from fxsplit.capture.guards import answers
from fxsplit.capture.questions import QUESTIONS, Guard
from fxsplit.capture.recording import Recorder, Recording
from fxsplit.errors import TraceError
from fxsplit.objects.same import same_value


class _NotFreeError(Exception):
    """The recordings differ in more than the batch size."""


def free_batch(recording: Recording, recorder: Recorder) -> None:
    """Change `recording` so that it serves any batch size, if it can."""
    guards = [guard for guard in recording.guards if _may_follow_the_batch(guard)]
    if not guards:
        return
    sizes = _sizes(recorder.batch_size)
    # With the constants of the recording the model may not run at all at another size.
    with suppress(Exception):
        if _answers(recording, guards, recorder, sizes[0]) == [guard.answer for guard in guards]:
            return
    probes = [recording]
    for size in sizes:
        try:
            probes.append(recorder.record(size))
        except TraceError:
            return
        if len(probes[-1].graph.nodes) != len(recording.graph.nodes):
            return
    # BatchNorm, for one, cannot be trained on a single value a channel.
    with suppress(TraceError):
        probes.append(recorder.record(1))
    with suppress(_NotFreeError):
        _Merger(probes).merge()


def _may_follow_the_batch(guard: Guard) -> bool:
    """The length of a shape, or of a tuple, does not."""
    is_length = guard.question == "len" and isinstance(guard.node.meta["value"], Tensor)
    return is_length or guard.question in ("int", "index")


def _answers(recording: Recording, guards: list[Guard], recorder: Recorder, size: int) -> list[Any]:
    asked = replace(recording, guards=guards)
    return answers(asked, recorder.twin, recorder.inputs(size), recorder.device)


def _sizes(batch_size: int) -> tuple[int, int]:
    """Other batch sizes: an odd one, and one that is larger than any threshold in a model."""
    return 2 * batch_size + 1, 65_537


@dataclass
class _Merger:
    probes: Sequence[Recording]
    _sources: list[tuple[Guard, tuple[int, ...]]] = field(default_factory=list)
    _made: dict[tuple[Any, ...], fx.Node] = field(default_factory=dict)

    def merge(self) -> None:
        """Raises _NotFreeError, having changed nothing that counts, when a difference is no function of the batch."""
        self._sources = self._varying()
        graphs = [list(probe.graph.nodes) for probe in self.probes]
        if len({len(nodes) for nodes in graphs}) > 1:
            raise _NotFreeError
        changed = []
        for nodes in zip(*graphs, strict=True):
            if len({(node.op, node.name) for node in nodes}) > 1:
                raise _NotFreeError
            if not all(same_value(node.target, nodes[0].target) for node in nodes):
                raise _NotFreeError
            arguments = self._merged(tuple((node.args, node.kwargs) for node in nodes), nodes[0])
            changed.append((nodes[0], arguments))
        for node, (args, kwargs) in changed:
            node.args, node.kwargs = args, kwargs
        varying = [guard for guard, _ in self._sources]
        self.probes[0].guards[:] = [guard for guard in self.probes[0].guards if guard not in varying]

    def _varying(self) -> list[tuple[Guard, tuple[int, ...]]]:
        try:
            together = list(zip(*(probe.guards for probe in self.probes), strict=True))
        except ValueError:
            raise _NotFreeError from None
        found = []
        for guards in together:
            if len({(guard.node.name, guard.question) for guard in guards}) > 1:
                raise _NotFreeError
            numbers = tuple(guard.answer for guard in guards)
            if len(set(numbers)) > 1:
                if not all(type(number) is int for number in numbers):
                    raise _NotFreeError
                found.append((guards[0], numbers))
        return found

    def _merged(self, values: tuple[Any, ...], user: fx.Node) -> Any:
        first = values[0]
        if isinstance(first, fx.Node):
            if len({getattr(value, "name", None) for value in values}) > 1:
                raise _NotFreeError
            return first
        if isinstance(first, tuple | list) and len({(type(value), len(value)) for value in values}) == 1:
            items = [self._merged(parts, user) for parts in zip(*values, strict=True)]
            return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
        if isinstance(first, dict) and len({tuple(value) for value in values}) == 1:
            return {key: self._merged(tuple(value[key] for value in values), user) for key in first}
        if isinstance(first, slice):
            ends = [(value.start, value.stop, value.step) for value in values]
            return slice(*(self._merged(parts, user) for parts in zip(*ends, strict=True)))
        if all(same_value(value, first) for value in values):
            return first
        return self._expression(values, user)

    def _expression(self, values: tuple[Any, ...], user: fx.Node) -> fx.Node:
        """The op that delivers these numbers: an answer, a multiple of one, or one divided."""
        # The constant that differs, and the answers of Python, in the recordings at batch sizes 2, 5, 65537 and 1:
        #
        #                      2     5     65537     1
        #     len(x)           2     5     65537     1         asked of Python, the one in `_sources`
        #     the constant     2     5     65537     1         (1) the answer itself:  len(x)
        #                      8    20    262148     4         (2) a multiple:  len(x) * 4, the factor is 20 // 5
        #     the constant     2     5     65537     1
        #     x.shape[0] * 4   8    20    262148     4         (3) a quotient:  int(x.shape[0] * 4) // 4
        #
        # The factor is read off the second recording, and must hold in all of them. A constant that fits none is no
        # function of the batch that is known here, and the recording stays as it was.
        if any(type(value) is not int for value in values):
            raise _NotFreeError
        for guard, numbers in self._sources:
            if values == numbers:
                return self._answer(guard, user)  # (1)
            for name, function in (("mul", operator.mul), ("floordiv", operator.floordiv)):
                larger, smaller = (values, numbers) if name == "mul" else (numbers, values)  # (2), (3)
                factor = larger[1] // smaller[1] if smaller[1] else 0
                if factor > 1 and all(
                    function(number, factor) == value for number, value in zip(numbers, values, strict=True)
                ):
                    return self._op(user, function, self._answer(guard, user), factor)
        raise _NotFreeError

    def _answer(self, guard: Guard, user: fx.Node) -> fx.Node:
        if type(guard.node.meta["value"]) is int:
            return guard.node
        return self._op(user, QUESTIONS[guard.question], guard.node)

    def _op(self, user: fx.Node, function: Any, source: fx.Node, *factor: int) -> fx.Node:
        key = (function, source, *factor)
        if key not in self._made:
            with user.graph.inserting_before(user):
                node = user.graph.call_function(function, (source, *factor))
            value = function(source.meta["value"], *factor)
            node.meta.update(value=value, path=source.meta.get("path", ""), state=(), written=[])
            if contexts := contexts_of(user):
                # A number needs none, but would divide the region around its user.
                node.meta["contexts"] = contexts
            self._made[key] = node
        return self._made[key]
