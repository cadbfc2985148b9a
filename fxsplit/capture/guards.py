"""The answers that fixed a model's path while it was traced, asked again of every new form of input."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxsplit.capture.questions import QUESTIONS
from fxsplit.capture.recording import Recording
from fxsplit.errors import GuardError
from fxsplit.meta.evaluate import Outside, StandIn, evaluate, resolve
from fxsplit.objects.structure import META


class _Ref(str):
    """The value of the step with this name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    name: str
    kind: str
    target: Any
    args: Any
    kwargs: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    step: str
    op: str
    question: str
    answer: Any
    where: str

    def ask(self, value: Any) -> None:
        """Raises GuardError when the answer is another one now."""
        answer = QUESTIONS[self.question](value)
        if answer != self.answer:
            raise GuardError(
                f"this input takes another path through the model than the traced one: {self.question}() of "
                f"{self.op!r} was {self.answer} and is now {answer} ({self.where}); "
                "trace the model again with such an input"
            )


@dataclass(kw_only=True)
class Guards:
    """The questions of one mode, and the steps that lead to them, run on the meta device. Can be pickled."""

    questions: tuple[_Question, ...]
    inputs: tuple[str, ...]
    steps: tuple[_Step, ...]
    twin: nn.Module
    _passed: set[Any] = field(default_factory=set)

    @classmethod
    def of(cls, recording: Recording, names: Mapping[fx.Node, str], twin: nn.Module) -> Guards:
        """From the guards of a recording; `names` are those of its ops."""
        return cls(
            questions=tuple(
                _Question(
                    step=guard.node.name,
                    op=names.get(guard.node, guard.node.name),
                    question=guard.question,
                    answer=guard.answer,
                    where=guard.where,
                )
                for guard in recording.guards
            ),
            inputs=tuple(node.name for node in recording.graph.nodes if node.op == "placeholder"),
            steps=_steps(recording),
            twin=twin,
        )

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Ask again for these inputs, once for each combination of shapes and types.

        Raises GuardError when an answer is another one now.
        """
        if not self.questions:
            return
        form: tuple[Any, ...] = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
        around = _asked_around(self.steps)
        form += tuple(around.values())
        if form in self._passed:
            return
        asked: dict[str, list[_Question]] = {}
        for question in self.questions:
            asked.setdefault(question.step, []).append(question)
        with closing(_values(self.steps, self.inputs, self.twin, tensors, tensors[0].device, around)) as values:
            for name, value in values:
                for question in asked.get(name, ()):
                    question.ask(value)
        if len(self._passed) >= MOST_FORMS:
            self._passed.clear()
        self._passed.add(form)


# A detector meets a new combination of image sizes at almost every step.
MOST_FORMS = 1024


def answers(recording: Recording, twin: nn.Module, tensors: Sequence[Tensor], device: torch.device) -> list[Any]:
    """What these inputs answer to the questions of the guards."""
    inputs = [node.name for node in recording.graph.nodes if node.op == "placeholder"]
    steps = _steps(recording)
    around = _asked_around(steps)
    values = dict(_values(steps, inputs, twin, tensors, device, around))
    return [QUESTIONS[guard.question](values[guard.node.name]) for guard in recording.guards]


def _steps(recording: Recording) -> tuple[_Step, ...]:
    """The nodes that lead to the questions."""
    needed = {guard.node for guard in recording.guards}
    for node in reversed(recording.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return tuple(_step(node) for node in recording.graph.nodes if node in needed and node.op != "placeholder")


def _values(
    steps: Sequence[_Step],
    inputs: Sequence[str],
    twin: nn.Module,
    tensors: Sequence[Tensor],
    device: torch.device,
    around: Mapping[str, Any],
) -> Generator[tuple[str, Any], None, None]:
    """The inputs, what is asked of the contexts `around` the call, and then the steps, by name.

    A step may fail once an earlier one has another value than traced.
    """
    values: dict[str, Any] = dict(zip(inputs, (tensor.detach().to(META) for tensor in tensors), strict=True))
    values.update(around)
    yield from list(values.items())
    with torch.no_grad():
        for step in steps:
            if step.name in around:
                continue
            args, kwargs = resolve(
                (step.args, step.kwargs), lambda leaf: values[leaf] if isinstance(leaf, _Ref) else leaf
            )
            value = (
                _attribute(twin, step.target)
                if step.kind == "get_attr"
                else evaluate(twin, step.kind, step.target, args, kwargs, device)
            )
            values[step.name] = value.value if isinstance(value, StandIn) else value
            yield step.name, values[step.name]


def _asked_around(steps: Sequence[_Step]) -> dict[str, Any]:
    """What the contexts around the call answer now, by the name of the step that asks."""
    return {step.name: step.target(*step.args, **step.kwargs) for step in steps if isinstance(step.target, Outside)}


def _step(node: fx.Node) -> _Step:
    def reference(argument: Any) -> Any:
        return _Ref(argument.name) if isinstance(argument, fx.Node) else argument

    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), reference)
    return _Step(name=node.name, kind=node.op, target=node.target, args=args, kwargs=kwargs)


def _attribute(root: nn.Module, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    return getattr(root.get_submodule(parent), name)
