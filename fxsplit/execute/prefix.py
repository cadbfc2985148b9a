"""The settled prefix: settled partitions in evaluation, without autograd, cheaper because they never change again.

Each settled partition has a third variant beside training and evaluation, folded, which every phase uses again; only
the folded weights are made anew when they are missing or no longer those of the model. What it delivers is the same
within rounding: norms are folded, convolutions may run in another layout, and pointwise ones as matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxsplit.capture.tracing import Trace
from fxsplit.execute.folding import Place, fold
from fxsplit.execute.stages import Backend, Stage, code_of, stage_graph
from fxsplit.graph import EVALUATION
from fxsplit.meta.rest import calls_method
from fxsplit.objects.hooks import hooks_of, is_untouched
from fxsplit.objects.structure import map_tensors

# What depends on how a tensor lies in memory: methods that ask for it, and ops that give a view or a copy by it.
ASKING = {
    "view", "view_as", "unflatten", "Unflatten", "as_strided", "stride", "is_contiguous", "storage_offset", "data_ptr",
}  # fmt: skip
RESHAPING = {"reshape", "reshape_as", "flatten", "Flatten", "ravel", "contiguous"}
# What draws a number for each element, in the order in which they lie in memory.
DRAWING = {
    "rand_like", "randn_like", "randint_like", "bernoulli", "bernoulli_", "normal", "normal_", "log_normal_",
    "uniform_", "random_", "exponential_", "geometric_", "cauchy_", "poisson", "binomial", "rrelu", "rrelu_",
    "gumbel_softmax", "dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "alpha_dropout_",
    "feature_dropout", "feature_alpha_dropout", "native_dropout",
}  # fmt: skip
# Modules and functions from elsewhere may do anything.
ORIGINS = {"torch", "_operator", "math", "builtins"}

Weights = list[tuple[Tensor, Tensor | None]]


class SettledStage:
    """A partition that is settled: what its stage computes in evaluation, within rounding.

    It holds no tensor of its own. Where the stage has hooks, or a module that it passes over was given hooks or a
    parametrization after tracing, or is another one, it leaves the work to the stage.
    """

    def __init__(self, trace: Trace, stage: Stage, backend: Backend | None = None) -> None:
        self._stage = stage
        graph = stage_graph(trace, stage.partition, is_last=False, training=EVALUATION)
        self._folds, self._passed_over = fold(graph, trace.model)
        # Dropout that does nothing in evaluation is out of the graph by now.
        self.takes_any_layout = takes_any_layout(graph, trace.model)
        self._code = code_of(graph, f"partition {stage.partition.index} settled", backend)

    def arrange(self, modules: Mapping[str, nn.Module]) -> None:
        """Find what it folds in the modules that the model has now."""
        self._modules = {place.path: modules[place.path] for place in self._places() if place.path in modules}
        self._is_there = all(each.is_there(modules) for each in self._passed_over) and all(
            each.is_there(modules) for each in self._folds
        )
        self._skipped = [(modules[each.path], each.kind) for each in self._passed_over] if self._is_there else []

    def _places(self) -> Iterator[Place]:
        for each in self._folds:
            yield from filter(None, (each.weight, each.bias, *each.statistics))

    def is_foldable(self) -> bool:
        """Whether to call the stage, and the modules that are passed over, would give nothing else."""
        return (
            self._is_there
            and not any(hooks_of(self._stage))
            and all(is_untouched(module, kind) for module, kind in self._skipped)
        )

    def sources(self) -> list[Tensor | None]:
        """The model's tensors that the folded weights are made of."""
        return [tensor for each in self._folds for tensor in each.sources(self._modules)]

    def weights(self, layout: torch.memory_format) -> Weights:
        """The folded weights, with those of 2D convolutions in that layout."""
        return [each.tensors(self._modules, layout) for each in self._folds]

    def __call__(self, model: nn.Module, values: list[Any], weights: Weights | None) -> Any:
        """Boundary values in, boundary values out; without weights, by the stage itself."""
        if weights is None:
            return self._stage(values, training=EVALUATION)
        values.append(weights)
        return self._code(model, values)


class Prefix:
    """The partitions that can settle: all but the last. Holds the folded weights of those that are settled now."""

    def __init__(self, trace: Trace, stages: Sequence[Stage], backend: Backend | None = None) -> None:
        self._stages = [SettledStage(trace, stage, backend) for stage in stages[:-1]]
        self.arrange(trace.model)

    def __call__(self, model: nn.Module, values: list[Any], count: int, dtype: torch.dtype | None = None) -> list[Any]:
        """Values at the end of the first `count` partitions, from those that the first of them reads.

        With a `dtype`, convolutions and matrix products run in it, and results of that type become float32 again unless
        autocast is on.
        """
        stages = self._stages[:count]
        relaid = all(stage.takes_any_layout for stage in stages) and all(map(may_be_relaid, values))
        layout = torch.channels_last if relaid else torch.preserve_format
        with torch.no_grad(), in_precision(values, dtype):
            for stage, weights in zip(stages, self._folded(stages, layout), strict=True):
                values = stage(model, values, weights)
        values = without_history(out_of_precision(values, dtype))
        return map_tensors(_contiguous, values) if relaid else values

    def arrange(self, model: nn.Module) -> None:
        """Find the model's modules anew, and drop the folded weights."""
        modules = dict(model.named_modules(remove_duplicate=False))
        for stage in self._stages:
            stage.arrange(modules)
        self._forget()

    def _forget(self) -> None:
        self._sources: list[Tensor] = []
        self._stamp: list[Any] = []
        self._weights: list[Weights | None] = []

    def _folded(self, stages: Sequence[SettledStage], layout: torch.memory_format) -> list[Weights | None]:
        """The folded weights of each stage; made anew when a tensor of the model was replaced or written into."""
        foldable = [stage.is_foldable() for stage in stages]
        folded = [stage for stage, fold in zip(stages, foldable, strict=True) if fold]
        sources = [tensor for stage in folded for tensor in stage.sources() if tensor is not None]
        stamp = [foldable, layout, *((id(tensor), tensor._version, tensor.data_ptr()) for tensor in sources)]
        if stamp != self._stamp:
            self._forget()
            weights = (stage.weights(layout) if fold else None for stage, fold in zip(stages, foldable, strict=True))
            self._weights = list(weights)
            # The tensors themselves are kept, so that no other can get the id of one of them.
            self._sources, self._stamp = sources, stamp
        return self._weights

    def __getstate__(self) -> dict[str, Any]:
        # Copies fold the weights of their own model.
        return {**vars(self), "_sources": [], "_stamp": [], "_weights": []}


def in_precision(values: Sequence[Any], dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Inside, convolutions and matrix products of such values run in `dtype`, if there is one."""
    device = next((value.device.type for value in values if isinstance(value, Tensor)), "cpu")
    return nullcontext() if dtype is None else torch.autocast(device, dtype)


def out_of_precision(values: list[Any], dtype: torch.dtype | None) -> list[Any]:
    """The values with those that are of `dtype` in float32 again, unless autocast is on."""
    device = next((value.device.type for value in values if isinstance(value, Tensor)), "cpu")
    if dtype is None or torch.is_autocast_enabled(device):
        return values
    converted: list[Any] = map_tensors(lambda tensor: tensor.float() if tensor.dtype is dtype else tensor, values)
    return converted


def without_history(values: list[Any]) -> list[Any]:
    """The values off the tape of autograd: forward may turn gradients on again by itself."""
    detached: list[Any] = map_tensors(lambda tensor: tensor.detach() if tensor.requires_grad else tensor, values)
    return detached


def takes_any_layout(graph: fx.Graph, model: nn.Module) -> bool:
    """Whether all ops of a stage surely deliver the same numbers however tensors lie in memory."""
    views = writes = False
    for node in graph.nodes:
        if "op" not in node.meta:
            continue
        op = node.meta["op"]
        called = type(model.get_submodule(op.path)) if op.kind == "module" else node.target
        name = called if isinstance(called, str) else called.__name__
        origin = "torch" if isinstance(called, str) else (called.__module__ or "torch")
        if name in ASKING | DRAWING or calls_method(called) or origin.partition(".")[0] not in ORIGINS:
            return False
        views |= name in RESHAPING and op.output.storage != op.name
        writes |= bool(op.mutates)
    # A reshape that views its input in one layout copies it in another, and then misses what is written into it.
    return not (views and writes)


def may_be_relaid(value: Any) -> bool:
    """Whether channels_last pays for it, or it is no tensor: convolutions in 2D run faster so on a CPU."""
    return not isinstance(value, Tensor) or (value.device.type == "cpu" and value.is_contiguous())


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous() if tensor.dim() == 4 else tensor
