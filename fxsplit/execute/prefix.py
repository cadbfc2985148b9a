"""The settled prefix: settled partitions in evaluation, without autograd, made cheaper because they never change again.

Each settled partition has a third variant beside training and evaluation: folded. Its code is kept for all phases; its
folded weights are computed again when the model's have changed. Results are the same within rounding: norms are folded,
convolutions may run in another memory format, and 1x1 ones as matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxsplit.capture.tracing import Trace
from fxsplit.execute.code import Backend, code_of
from fxsplit.execute.folding import Attribute, fold
from fxsplit.execute.stages import Stage, stage_graph
from fxsplit.graph import EVALUATION
from fxsplit.meta.rest import calls_method
from fxsplit.objects.hooks import hooks_of, is_untouched
from fxsplit.objects.structure import map_tensors

# Ops that depend on the memory layout of their input: these may fail, or return something else, in another layout,
LAYOUT_BOUND = {
    "view", "view_as", "unflatten", "Unflatten", "as_strided", "stride", "is_contiguous", "storage_offset", "data_ptr",
}  # fmt: skip
# and these return a view in one layout and a copy in another.
RESHAPING = {"reshape", "reshape_as", "flatten", "Flatten", "ravel", "contiguous"}
# Ops that draw a random number for each element, in the order in which elements lie in memory.
RANDOM = {
    "rand_like", "randn_like", "randint_like", "bernoulli", "bernoulli_", "normal", "normal_", "log_normal_",
    "uniform_", "random_", "exponential_", "geometric_", "cauchy_", "poisson", "binomial", "rrelu", "rrelu_",
    "gumbel_softmax", "dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "alpha_dropout_",
    "feature_dropout", "feature_alpha_dropout", "native_dropout",
}  # fmt: skip
# Packages whose ops are known; those from elsewhere may do anything.
ORIGINS = {"torch", "_operator", "math", "builtins"}

Weights = list[tuple[Tensor, Tensor | None]]


class SettledStage:
    """Runs a settled partition folded: it computes what its stage computes in evaluation, within rounding.

    It holds no tensor of its own. It calls the stage instead when that has hooks, or when a module that folding passes
    over has got hooks or a parametrization after tracing or has been replaced.
    """

    def __init__(self, trace: Trace, stage: Stage, backend: Backend | None = None) -> None:
        self._stage = stage
        graph = stage_graph(trace, stage.partition, is_last=False, training=EVALUATION)
        self._folds, self._passed_over = fold(graph, trace.model)
        # After folding, which has removed dropout: that would count as random.
        self.takes_any_layout = takes_any_layout(graph, trace.model)
        self._code = code_of(graph, f"partition {stage.partition.index} settled", backend)

    def arrange(self, modules: Mapping[str, nn.Module]) -> None:
        """Find what it folds among the modules that the model has now."""
        self._modules = {each.path: modules[each.path] for each in self._attributes() if each.path in modules}
        self._is_complete = all(each.is_unchanged(modules) for each in self._passed_over) and all(
            each.is_there(modules) for each in self._folds
        )
        self._skipped = [(modules[each.path], each.kind) for each in self._passed_over] if self._is_complete else []

    def _attributes(self) -> Iterator[Attribute]:
        for each in self._folds:
            yield from filter(None, (each.weight, each.bias, *each.statistics))

    def is_foldable(self) -> bool:
        """Tell whether the folded code computes what the stage, and the modules that are passed over, would compute."""
        return (
            self._is_complete
            and not any(hooks_of(self._stage))
            and all(is_untouched(module, kind) for module, kind in self._skipped)
        )

    def originals(self) -> list[Tensor | None]:
        """Return the model's tensors that are folded."""
        return [tensor for each in self._folds for tensor in each.originals(self._modules)]

    def weights(self, layout: torch.memory_format) -> Weights:
        """Compute the folded weights; those of 2D convolutions get that memory format."""
        return [each.tensors(self._modules, layout) for each in self._folds]

    def __call__(self, model: nn.Module, values: list[Any], weights: Weights | None) -> Any:
        """Run on boundary values, and return boundary values; without folded weights the stage itself runs."""
        if weights is None:
            return self._stage(values, training=EVALUATION)
        values.append(weights)
        return self._code(model, values)


class Prefix:
    """Runs settled partitions; all but the last can settle. Holds the folded weights of those that are settled now."""

    def __init__(self, trace: Trace, stages: Sequence[Stage], backend: Backend | None = None) -> None:
        self._stages = [SettledStage(trace, stage, backend) for stage in stages[:-1]]
        self.arrange(trace.model)

    def __call__(self, model: nn.Module, values: list[Any], count: int, dtype: torch.dtype | None = None) -> list[Any]:
        """Run the first `count` partitions, and return the values at the cut after them.

        Args:
            model: its modules are called.
            values: those that the first partition reads.
            count: how many partitions are settled.
            dtype: convolutions and matrix products run in it, and results of that type become float32 again unless
                autocast is on; None changes nothing.
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
        """Find the modules that the model has now, and drop the folded weights."""
        modules = dict(model.named_modules(remove_duplicate=False))
        for stage in self._stages:
            stage.arrange(modules)
        self._forget()

    def _forget(self) -> None:
        self._originals: list[Tensor] = []
        self._stamp: list[Any] = []
        self._weights: list[Weights | None] = []

    def _folded(self, stages: Sequence[SettledStage], layout: torch.memory_format) -> list[Weights | None]:
        """Return the folded weights of each stage; computed again if the model's were replaced or written into."""
        foldable = [stage.is_foldable() for stage in stages]
        folded = [stage for stage, fold in zip(stages, foldable, strict=True) if fold]
        originals = [tensor for stage in folded for tensor in stage.originals() if tensor is not None]
        stamp = [foldable, layout, *((id(tensor), tensor._version, tensor.data_ptr()) for tensor in originals)]
        if stamp != self._stamp:
            self._forget()
            weights = (stage.weights(layout) if fold else None for stage, fold in zip(stages, foldable, strict=True))
            self._weights = list(weights)
            # The tensors themselves are kept, so that no new one can get the id of one of them.
            self._originals, self._stamp = originals, stamp
        return self._weights

    def __getstate__(self) -> dict[str, Any]:
        # A copy folds the weights of its own model.
        return {**vars(self), "_originals": [], "_stamp": [], "_weights": []}


def in_precision(values: Sequence[Any], dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Make the context in which convolutions and matrix products of such values run in `dtype`, unless it is None."""
    device = next((value.device.type for value in values if isinstance(value, Tensor)), "cpu")
    return nullcontext() if dtype is None else torch.autocast(device, dtype)


def out_of_precision(values: list[Any], dtype: torch.dtype | None) -> list[Any]:
    """Convert values of `dtype` to float32 again, unless autocast is on."""
    device = next((value.device.type for value in values if isinstance(value, Tensor)), "cpu")
    if dtype is None or torch.is_autocast_enabled(device):
        return values
    converted: list[Any] = map_tensors(lambda tensor: tensor.float() if tensor.dtype is dtype else tensor, values)
    return converted


def without_history(values: list[Any]) -> list[Any]:
    """Detach the values from autograd: a model's forward may turn gradients on again by itself."""
    detached: list[Any] = map_tensors(lambda tensor: tensor.detach() if tensor.requires_grad else tensor, values)
    return detached


def takes_any_layout(graph: fx.Graph, model: nn.Module) -> bool:
    """Tell whether all ops of a stage surely return the same numbers in whatever memory layout they get tensors."""
    views = writes = False
    for node in graph.nodes:
        if "op" not in node.meta:
            continue
        op = node.meta["op"]
        called = type(model.get_submodule(op.path)) if op.kind == "module" else node.target
        name = called if isinstance(called, str) else called.__name__
        origin = "torch" if isinstance(called, str) else (called.__module__ or "torch")
        if name in LAYOUT_BOUND | RANDOM or calls_method(called) or origin.partition(".")[0] not in ORIGINS:
            return False
        views |= name in RESHAPING and op.output.storage != op.name
        writes |= bool(op.mutates)
    # A reshape that is a view in one layout is a copy in another, which does not see what is written into its input.
    return not (views and writes)


def may_be_relaid(value: Any) -> bool:
    """Tell whether a value may be converted to channels_last, in which 2D convolutions run faster on a CPU."""
    return not isinstance(value, Tensor) or (value.device.type == "cpu" and value.is_contiguous())


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous() if tensor.dim() == 4 else tensor
