"""Checks for every new form of input that Python's questions have the same answers as when the model was traced."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxsplit.capture.contexts import Context, contexts_of, opened
from fxsplit.capture.questions import QUESTIONS
from fxsplit.capture.recording import Recording
from fxsplit.errors import GuardError
from fxsplit.meta.evaluate import ImpureCall, StandIn, evaluate, resolve
from fxsplit.objects.structure import META

# Attributes that depend on whether autograd records.
OF_AUTOGRAD = ("requires_grad", "is_leaf", "grad_fn")


class _Ref(str):
    """Stands for the value of the step with this name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    name: str
    kind: str
    target: Any
    args: Any
    kwargs: Any
    contexts: tuple[Context, ...]

    @property
    def asks_autograd(self) -> bool:
        """Whether its value depends on what autograd records."""
        return self.target is getattr and self.args[1] in OF_AUTOGRAD


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    step: str
    op: str
    question: str
    answer: Any
    where: str

    def ask(self, value: Any, advice: str) -> None:
        """Raise GuardError, which ends in `advice`, if the answer has changed."""
        answer = QUESTIONS[self.question](value)
        if answer != self.answer:
            raise GuardError(
                f"this input takes another path through the model than the traced one: {self.question}() of "
                f"{self.op!r} was {self.answer} and is now {answer} ({self.where}); {advice}"
            )


@dataclass(kw_only=True)
class Guards:
    """Holds the questions of one mode and the ops, run on the meta device, on which they depend. Can be pickled.

    `ask_autograd` tells whether answers depend on autograd.
    """

    questions: tuple[_Question, ...]
    inputs: tuple[str, ...]
    steps: tuple[_Step, ...]
    meta_model: nn.Module
    _passed: set[Any] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._ambient = _ambient(self.steps)
        self.ask_autograd = any(step.asks_autograd for step in self.steps)

    @classmethod
    def of(cls, recording: Recording, names: Mapping[fx.Node, str], meta_model: nn.Module) -> Guards:
        """Extract the questions of a recording, whose ops have these `names`; they run on `meta_model`."""
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
            meta_model=meta_model,
        )

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Ask all questions for these inputs, once for each combination of shapes, dtypes and devices.

        Where an answer depends on autograd, gradients are on or off as they are now. Raises GuardError when an answer
        has changed.
        """
        if not self.questions:
            return
        form: tuple[Any, ...] = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
        ambient = _answers_now(self._ambient)
        form += tuple(ambient.values())
        if self.ask_autograd:
            form += (torch.is_grad_enabled(), *(tensor.requires_grad for tensor in tensors))
        if form in self._passed:
            return
        advice = "trace the model again with such an input"
        if self.ask_autograd:
            advice += ", or call it with gradients on or off as it was traced: on in training, off in evaluation"
        asked: dict[str, list[_Question]] = {}
        for question in self.questions:
            asked.setdefault(question.step, []).append(question)
        with closing(_values(self.steps, self.inputs, self.meta_model, tensors, tensors[0].device, ambient)) as values:
            for name, value in values:
                for question in asked.get(name, ()):
                    question.ask(value, advice)
        if len(self._passed) >= MOST_FORMS:
            self._passed.clear()
        self._passed.add(form)


# Forgotten beyond this number: a detector gets a new combination of image sizes at almost every step.
MOST_FORMS = 1024


def answers(recording: Recording, meta_model: nn.Module, tensors: Sequence[Tensor], device: torch.device) -> list[Any]:
    """Compute the answers to the guards' questions for other inputs."""
    inputs = [node.name for node in recording.graph.nodes if node.op == "placeholder"]
    steps = _steps(recording)
    ambient = _answers_now(_ambient(steps))
    values = dict(_values(steps, inputs, meta_model, tensors, device, ambient))
    return [QUESTIONS[guard.question](values[guard.node.name]) for guard in recording.guards]


def _steps(recording: Recording) -> tuple[_Step, ...]:
    """Extract the nodes on which the questions depend."""
    needed = {guard.node for guard in recording.guards}
    for node in reversed(recording.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return tuple(_step(node) for node in recording.graph.nodes if node in needed and node.op != "placeholder")


def _values(
    steps: Sequence[_Step],
    inputs: Sequence[str],
    meta_model: nn.Module,
    tensors: Sequence[Tensor],
    device: torch.device,
    ambient: Mapping[str, Any],
) -> Generator[tuple[str, Any], None, None]:
    """Yield the names and values of the inputs, of the `ambient` answers and of the steps.

    A generator, because a step may fail where an earlier one has another value than when it was traced: the question
    about that value is asked first.
    """
    records = any(step.asks_autograd for step in steps)
    on_meta = (tensor.detach().to(META).requires_grad_(records and tensor.requires_grad) for tensor in tensors)
    values: dict[str, Any] = dict(zip(inputs, on_meta, strict=True))
    values.update(ambient)
    yield from list(values.items())
    with nullcontext() if records else torch.no_grad():
        for step in steps:
            if step.name in ambient:
                continue
            args, kwargs = resolve(
                (step.args, step.kwargs), lambda leaf: values[leaf] if isinstance(leaf, _Ref) else leaf
            )
            with opened(step.contexts if records else ()):
                value = (
                    _attribute(meta_model, step.target)
                    if step.kind == "get_attr"
                    else evaluate(meta_model, step.kind, step.target, args, kwargs, device)
                )
            values[step.name] = value.value if isinstance(value, StandIn) else value
            yield step.name, values[step.name]


def _ambient(steps: Sequence[_Step]) -> tuple[_Step, ...]:
    """Select the steps that ask for the state of the contexts around the call."""
    return tuple(step for step in steps if isinstance(step.target, ImpureCall))


def _answers_now(steps: Sequence[_Step]) -> dict[str, Any]:
    """Ask for the state of the contexts around the call now, by the name of each step that asks."""
    return {step.name: step.target(*step.args, **step.kwargs) for step in steps}


def _step(node: fx.Node) -> _Step:
    def reference(argument: Any) -> Any:
        return _Ref(argument.name) if isinstance(argument, fx.Node) else argument

    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), reference)
    return _Step(name=node.name, kind=node.op, target=node.target, args=args, kwargs=kwargs, contexts=contexts_of(node))


def _attribute(root: nn.Module, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    return getattr(root.get_submodule(parent), name)
