"""The settled prefix: settled partitions in evaluation, without autograd, made cheaper because they never change again.

Each settled partition has two variants beside training and evaluation: folded, and fused. Their code is kept for all
phases; their weights are made again when the model's have changed. Results are the same within rounding: norms are
folded, convolutions may run in another memory format, 1x1 ones as matrix products, and on CUDA together with what
follows them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import repeat
from operator import contains, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fxsplit.capture.naming import called_module
from fxsplit.capture.tracing import Trace
from fxsplit.execute.code import Backend, Code, Place, code_of, compiled_chain, place_of
from fxsplit.execute.settled.folding import Fold, PassedOver, fold
from fxsplit.execute.settled.fusing import DEVICES, Device, Form, Kernel, fuse
from fxsplit.execute.settled.offload import Offload, device_of, on_host
from fxsplit.execute.stages import Stage, stage_graph
from fxsplit.graph import EVALUATION
from fxsplit.meta.rest import calls_method
from fxsplit.objects.hooks import hooks_of
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

# What the code of a settled partition takes as one more value: folded weights, or kernels.
Weights = list[tuple[Tensor, Tensor | None]] | list[Kernel]


class Folded:
    """The code of a settled partition that takes its weights as one more value, and the modules that it passes over.

    It holds no tensor of its own. `reads` are the paths of modules and tensors that it reads beside these weights.
    """

    def __init__(self, graph: fx.Graph, code: Code, folds: Sequence[Fold], passed_over: Sequence[PassedOver]) -> None:
        self.code, self.folds, self._passed_over = code, tuple(folds), tuple(passed_over)
        reads = (str(node.target) if node.op == "get_attr" else called_module(node) for node in graph.nodes)
        self.reads = frozenset(path for path in reads if path is not None)

    def arrange(self, modules: Mapping[str, nn.Module]) -> None:
        """Find what it folds among the modules that the model has now."""
        self.code.forget()
        paths = {attribute.path for each in self.folds for attribute in each.attributes()}
        self.modules = {path: modules[path] for path in paths if path in modules}
        self._is_complete = all(each.is_unchanged(modules) for each in self._passed_over) and all(
            each.is_there(modules) for each in self.folds
        )
        self._skipped = Untouched(
            [(modules[each.path], each.kind) for each in self._passed_over] if self._is_complete else ()
        )

    def is_sound(self) -> bool:
        """Tell whether the code computes what the modules that it passes over would compute."""
        return self._is_complete and self._skipped.are_so()

    def originals(self) -> list[tuple[Place, str, Tensor | None]]:
        """List the model's tensors that are folded, each with where it is kept, and its name there."""
        attributes = [(self.modules[each.path], each.name) for fold in self.folds for each in fold.attributes()]
        return [(place_of(module, name), name, getattr(module, name)) for module, name in attributes]


class SettledStage:
    """Runs a settled partition: it computes what its stage computes in evaluation, within rounding.

    It holds no tensor of its own. It calls the stage instead when that has hooks, or when a module that is passed over
    has got hooks or a parametrization after tracing or has been replaced.
    """

    def __init__(self, trace: Trace, stage: Stage, backend: Backend | None = None) -> None:
        self._stage = stage
        label = f"partition {stage.partition.index} settled"
        graph = stage_graph(trace, stage.partition, is_last=False, training=EVALUATION)
        folds, passed_over = fold(graph, trace.model)
        # After folding, which has removed dropout: that would count as random.
        self.takes_any_layout = takes_any_layout(graph, trace.model)
        self.folded = Folded(graph, code_of(graph, label, backend), folds, passed_over)
        graph = stage_graph(trace, stage.partition, is_last=False, training=EVALUATION)
        self._sites, passed_over = fuse(graph, trace.model)
        self.fused = Folded(graph, code_of(graph, label), [site.fold for site in self._sites], passed_over)
        # For each site, what was measured to be fastest.
        self._ways: list[dict[Form, str]] = [{} for _ in self._sites]

    def arrange(self, modules: Mapping[str, nn.Module]) -> None:
        """Find what it folds among the modules that the model has now."""
        self.folded.arrange(modules)
        self.fused.arrange(modules)

    def is_sound(self, variant: Folded) -> bool:
        """Tell whether the variant computes what the stage would compute."""
        return not any(hooks_of(self._stage)) and variant.is_sound()

    def kernels(self, device: Device) -> list[Kernel]:
        """Make what the fused variant takes."""
        return [
            Kernel(site, self.fused.modules, device, ways) for site, ways in zip(self._sites, self._ways, strict=True)
        ]

    def __call__(self, model: nn.Module, values: list[Any], variant: Folded, weights: Weights | None) -> Any:
        """Run on boundary values, and return boundary values; without weights the stage itself runs."""
        if weights is None:
            return self._stage(values, training=EVALUATION)
        values.append(weights)
        return variant.code(model, values)

    def __getstate__(self) -> dict[str, Any]:
        # A copy may run on another device of the same name.
        return {**vars(self), "_ways": [{} for _ in self._sites]}


class Prefix:
    """Runs settled partitions; all but the last can settle. Holds the weights of those that are settled now.

    On devices of `fusing.DEVICES`, convolutions run together with what follows them, in the way that is fastest there.
    On others, and compiled or offloaded, partitions run folded. Compiled, they are one graph.
    """

    def __init__(
        self, trace: Trace, stages: Sequence[Stage], backend: Backend | None = None, offload: Offload | None = None
    ) -> None:
        self._stages = [SettledStage(trace, stage, backend) for stage in stages[:-1]]
        self._backend, self._offload = backend, offload
        self._chains: dict[tuple[int, int], Callable[[nn.Module, list[Any], list[Any]], Any]] = {}
        self.arrange(trace.model)

    def __call__(
        self, model: nn.Module, values: list[Any], start: int, stop: int, dtype: torch.dtype | None = None
    ) -> list[Any]:
        """Run the settled partitions [start, stop), and return the values at the cut after them.

        Args:
            model: its modules are called.
            values: those at cut `start`.
            start: the first partition that runs.
            stop: the one after the last.
            dtype: convolutions and matrix products run in it, and results of that type become float32 again unless
                autocast is on; None changes nothing.
        """
        stages = self._stages[start:stop]
        relaid = all(stage.takes_any_layout for stage in stages) and all(map(may_be_relaid, values))
        layout = torch.channels_last if relaid else torch.preserve_format
        # A compiler fuses by itself, and kernels would keep weights on the device.
        is_folded = self._backend is not None or self._offload is not None or torch.compiler.is_compiling()
        place = device_of(values)
        device = None if is_folded else DEVICES.get(place.type)
        variants = [stage.folded if device is None else stage.fused for stage in stages]
        with torch.no_grad(), in_precision(values, dtype):
            has_precision = torch.is_autocast_enabled(place.type)
            precision = torch.get_autocast_dtype(place.type) if has_precision else None
            weights = self._weights_of((start, stop), variants, device, (layout, precision), place)
            if self._backend is not None and None not in weights:
                values = self._chain(start, stop, self._backend)(model, values, weights)
            else:
                for index, (stage, variant, each) in enumerate(zip(stages, variants, weights, strict=True), start):
                    if self._offload is None:
                        values = stage(model, values, variant, each)
                        continue
                    with self._offload.placed(index, values, reads=None if each is None else variant.reads):
                        given = map_tensors(lambda tensor: tensor.to(place, non_blocking=True), each)
                        values = stage(model, values, variant, given)
        values = without_history(out_of_precision(values, dtype))
        return map_tensors(_contiguous, values) if relaid else values

    def _chain(self, start: int, stop: int, backend: Backend) -> Callable[[nn.Module, list[Any], list[Any]], Any]:
        if (start, stop) not in self._chains:
            codes = [stage.folded.code for stage in self._stages[start:stop]]
            self._chains[start, stop] = compiled_chain(codes, backend)
        return self._chains[start, stop]

    def arrange(self, model: nn.Module) -> None:
        """Find the modules that the model has now, and drop the weights."""
        modules = dict(model.named_modules(remove_duplicate=False))
        for stage in self._stages:
            stage.arrange(modules)
        # By the partitions that run together, what they take. No partition is in two of them.
        self._held: dict[tuple[int, int], Held] = {}

    def _weights_of(
        self,
        span: tuple[int, int],
        variants: Sequence[Folded],
        device: Device | None,
        form: tuple[torch.memory_format, torch.dtype | None],
        place: torch.device,
    ) -> list[Weights | None]:
        """Return what the variants take; made again if the model's tensors were replaced or written into.

        None for a stage that has to run itself. Folded weights lie where the model's do, also where these are on the
        host and `place`, where they are used, is not.
        """
        stages = self._stages[slice(*span)]
        sound = [stage.is_sound(variant) for stage, variant in zip(stages, variants, strict=True)]
        stamp, held = (sound, device, form, place), self._held.get(span)
        if held is not None and held.stamp == stamp and held.originals.are_unchanged():
            return held.weights
        # Before others are made, those in their place are dropped.
        held = None
        self._held = {other: each for other, each in self._held.items() if other[1] <= span[0] or span[1] <= other[0]}
        used = [variant for variant, is_sound in zip(variants, sound, strict=True) if is_sound]
        originals = Originals([each for variant in used for each in variant.originals()])
        weights: list[Weights | None] = []
        for stage, variant, is_sound in zip(stages, variants, sound, strict=True):
            if not is_sound:
                weights.append(None)
            elif device is None:
                folded = [each.tensors(variant.modules, *form) for each in variant.folds]
                weights.append(
                    folded if self._offload is None else map_tensors(lambda each: on_host(each, place), folded)
                )
            else:
                weights.append(stage.kernels(device))
        self._held[span] = Held(stamp, weights, originals)
        return weights

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes the weights of its own model.
        return {**vars(self), "_held": {}, "_chains": {}}


class Held(NamedTuple):
    """What settled partitions take, with all that it depends on."""

    stamp: Any
    weights: list[Weights | None]
    originals: Originals


class Untouched:
    """Tells of many modules whether each is untouched, as `is_untouched` tells of one, in a few calls for all.

    Args:
        modules: with the class that each is to have.
    """

    def __init__(self, modules: Sequence[tuple[nn.Module, type[nn.Module]]]) -> None:
        self._modules = modules
        self._parts: tuple[list[Any], ...] | None = None

    def are_so(self) -> bool:
        """Whether all of them are untouched."""
        if self._parts is None:
            modules = [module for module, _ in self._modules]
            hooks = [each for module in modules for each in hooks_of(module)]
            self._parts = hooks, modules, [kind for _, kind in self._modules], [vars(module) for module in modules]
        hooks, modules, kinds, attributes = self._parts
        return (
            not any(hooks)
            and all(map(is_, map(type, modules), kinds))
            and not any(map(contains, attributes, repeat("forward")))
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy finds the hooks of its own modules.
        return {"_modules": self._modules, "_parts": None}


class Originals:
    """Remembers tensors of a model, each with where it is kept: whether one was replaced or written into since."""

    def __init__(self, kept: Sequence[tuple[Place, str, Tensor | None]]) -> None:
        self._places = [place for place, _, _ in kept]
        self._names = [name for _, name, _ in kept]
        # The tensors themselves are kept, so that no new one can be taken for one of them.
        self._values = [value for _, _, value in kept]
        self._tensors = [each for each in self._values if each is not None]
        self._states = self._states_now()

    def are_unchanged(self) -> bool:
        """Whether all of them are there, with the same numbers as far as torch counts writes."""
        return (
            all(map(is_, map(dict.get, self._places, self._names), self._values)) and self._states_now() == self._states
        )

    def _states_now(self) -> list[tuple[int, int]]:
        return [(each._version, each.data_ptr()) for each in self._tensors]


def in_precision(values: Sequence[Any], dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Make the context in which convolutions and matrix products of such values run in `dtype`, unless it is None."""
    return nullcontext() if dtype is None else torch.autocast(device_of(values).type, dtype)


def out_of_precision(values: list[Any], dtype: torch.dtype | None) -> list[Any]:
    """Convert values of `dtype` to float32 again, unless autocast is on."""
    if dtype is None or torch.is_autocast_enabled(device_of(values).type):
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
