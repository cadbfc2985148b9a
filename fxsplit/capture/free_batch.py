"""Makes a recording serve any batch size where Python code has asked for it.

`len(x)` and `int(x.shape[0])` give Python a plain number, which becomes a constant in the recording: a reshape to
(2, -1), a division by 2. Recordings at several batch sizes show which constants depend on the batch size. Where all
that differs can be computed from it, ops take the place of the constants, and the questions need no guard any more:

    at 2    len(x)   view(y, 2, -1)          at 5    len(x)   view(y, 5, -1)      ──►     view(y, len(x), -1)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxsplit.capture.contexts import contexts_of
from fxsplit.capture.guards import answers
from fxsplit.capture.questions import QUESTIONS, Guard
from fxsplit.capture.recording import Recorder, Recording
from fxsplit.errors import TraceError
from fxsplit.objects.same import same_value


class _NotFreeError(Exception):
    """The recordings differ by more than functions of the batch size."""


def free_batch(recording: Recording, recorder: Recorder) -> None:
    """Change `recording` so that it serves any batch size, if that is possible; `recorder` made it."""
    guards = [guard for guard in recording.guards if _may_follow_the_batch(guard)]
    if not guards:
        return
    sizes = _sizes(recorder.batch_size)
    # With the constants of the recording the ops may fail at another size.
    with suppress(Exception):
        if _answers(recording, guards, recorder, sizes[0]) == [guard.answer for guard in guards]:
            return
    recordings = [recording]
    for size in sizes:
        try:
            recordings.append(recorder.record(size))
        except TraceError:
            return
        if len(recordings[-1].graph.nodes) != len(recording.graph.nodes):
            return
    # A batch of 1 may be refused, for example by BatchNorm in training.
    with suppress(TraceError):
        recordings.append(recorder.record(1))
    with suppress(_NotFreeError):
        _Merger(recordings).merge()


def _may_follow_the_batch(guard: Guard) -> bool:
    """Whether an answer may depend on the batch size; the length of a shape or a tuple does not."""
    is_length = guard.question == "len" and isinstance(guard.node.meta["value"], Tensor)
    return is_length or guard.question in ("int", "index")


def _answers(recording: Recording, guards: list[Guard], recorder: Recorder, size: int) -> list[Any]:
    asked = replace(recording, guards=guards)
    with torch.set_grad_enabled(recorder.meta_model.training):
        return answers(asked, recorder.meta_model, recorder.inputs(size), recorder.device)


def _sizes(batch_size: int) -> tuple[int, int]:
    """Choose two other batch sizes: an odd one, and one larger than any threshold in a model."""
    return 2 * batch_size + 1, 65_537


@dataclass
class _Merger:
    """Merges recordings at several batch sizes into the first of them."""

    recordings: Sequence[Recording]
    _varying_answers: list[tuple[Guard, tuple[int, ...]]] = field(default_factory=list)
    _made: dict[tuple[Any, ...], fx.Node] = field(default_factory=dict)

    def merge(self) -> None:
        """Replace the constants that depend on the batch size by ops, and drop the guards of their answers.

        Raises _NotFreeError, and leaves the recording as it was but for unused nodes, when some difference is no known
        function of the batch size.
        """
        self._varying_answers = self._find_varying_answers()
        graphs = [list(probe.graph.nodes) for probe in self.recordings]
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
        varying = [guard for guard, _ in self._varying_answers]
        self.recordings[0].guards[:] = [guard for guard in self.recordings[0].guards if guard not in varying]

    def _find_varying_answers(self) -> list[tuple[Guard, tuple[int, ...]]]:
        try:
            together = list(zip(*(probe.guards for probe in self.recordings), strict=True))
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
        """Merge an argument of `user` that has one value in each recording."""
        first = values[0]
        if isinstance(first, fx.Node):
            if len({getattr(value, "name", None) for value in values}) > 1:
                raise _NotFreeError
            return first
        if isinstance(first, tuple | list) and len({(type(value), len(value)) for value in values}) == 1:
            items = [self._merged(each, user) for each in zip(*values, strict=True)]
            return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
        if isinstance(first, dict) and len({tuple(value) for value in values}) == 1:
            return {key: self._merged(tuple(value[key] for value in values), user) for key in first}
        if isinstance(first, slice):
            ends = [(value.start, value.stop, value.step) for value in values]
            return slice(*(self._merged(each, user) for each in zip(*ends, strict=True)))
        if all(same_value(value, first) for value in values):
            return first
        return self._expression(values, user)

    def _expression(self, values: tuple[Any, ...], user: fx.Node) -> fx.Node:
        """Make the op that gives these numbers: an answer, a multiple of one, or one divided by a constant."""
        # The constant that differs, and the answers of Python, in the recordings at batch sizes 2, 5, 65537 and 1:
        #
        #                      2     5     65537     1
        #     len(x)           2     5     65537     1         asked of Python, in `_varying_answers`
        #     the constant     2     5     65537     1         (1) the answer itself:  len(x)
        #                      8    20    262148     4         (2) a multiple:  len(x) * 4, the factor is 20 // 5
        #     x.shape[0] * 4   8    20    262148     4         asked of Python
        #     the constant     2     5     65537     1         (3) a quotient:  int(x.shape[0] * 4) // 4
        #
        # The factor is read off the second recording, and must hold in all of them. If none fits, the constant is no
        # function of the batch size that is known here.
        if any(type(value) is not int for value in values):
            raise _NotFreeError
        for guard, numbers in self._varying_answers:
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

    def _op(self, user: fx.Node, function: Any, operand: fx.Node, *factor: int) -> fx.Node:
        key = (function, operand, *factor)
        if key not in self._made:
            with user.graph.inserting_before(user):
                node = user.graph.call_function(function, (operand, *factor))
            value = function(operand.meta["value"], *factor)
            node.meta.update(value=value, path=operand.meta.get("path", ""), state=(), written=[])
            if contexts := contexts_of(user):
                # A number needs no context, but an op without it would split the autocast region of its user in two.
                node.meta["contexts"] = contexts
            self._made[key] = node
        return self._made[key]
