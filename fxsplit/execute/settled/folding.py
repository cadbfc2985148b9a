"""Folds the graph of a settled partition: norms go into the weights before them, and idle ops go away.

    conv ─► norm ─► dropout ─► relu      becomes      conv, with the norm in its weights ─► relu

The folded graph takes all weights of linear ops and convolutions as one more value, a list, in the precision in which
they are computed with. The model's parameters and buffers stay as they are.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fxsplit.capture.contexts import contexts_of
from fxsplit.execute import pointwise

Modules = Mapping[str, nn.Module]

FUNCTIONS: dict[Any, Any] = {nn.Linear: F.linear, nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
# How many dimensions their output has if its second one is the channels, as a norm after them takes it.
RANKS: dict[Any, int] = {F.linear: 2, F.conv1d: 3, F.conv2d: 4, F.conv3d: 5}
OPTIONS = ("stride", "padding", "dilation", "groups")
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# In evaluation these return the very tensor that they are given.
IDLE = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
IDLE_FUNCTIONS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


class Attribute(NamedTuple):
    """Refers to an attribute of the module at `path`: a tensor or None, or the epsilon of a norm."""

    path: str
    name: str

    def of(self, modules: Modules) -> Any:
        """Return its present value."""
        return getattr(modules[self.path], self.name)


class Affine(NamedTuple):
    """A linear op or a convolution that can take a norm: `function(input, weight, bias, **options)`."""

    function: Any
    input: fx.Node
    weight: Attribute
    bias: Attribute | None
    options: dict[str, Any]

    def fastest(self, modules: Modules) -> Any:
        """Return the function, or a faster one that computes the same."""
        is_pointwise = self.function is F.conv2d and pointwise.is_pointwise(self.weight.of(modules), **self.options)
        return pointwise.conv2d if is_pointwise else self.function


class Norm(NamedTuple):
    """A BatchNorm in evaluation; `statistics` are its mean, variance, weight and bias."""

    input: fx.Node
    statistics: tuple[Attribute | None, ...]
    epsilon: Attribute | float


class PassedOver(NamedTuple):
    """A module that a folded graph no longer calls. The folding is right as long as its class and attributes stay."""

    path: str
    kind: type[nn.Module]
    attributes: dict[str, Any]

    def is_unchanged(self, modules: Modules) -> bool:
        """Tell whether the module has the class and the attributes that it had when the graph was folded."""
        module = modules.get(self.path)
        return type(module) is self.kind and all(
            getattr(module, name) == value for name, value in self.attributes.items()
        )


class Fold(NamedTuple):
    """Says how a folded weight and bias are computed: from those of an op, and from the `statistics` of a norm or ().

    `shape` is that of the op's weight when the graph was folded. `is_ambient` says that the op runs in the precision
    around the model, not in one that the model chooses itself.
    """

    weight: Attribute
    bias: Attribute | None
    shape: torch.Size
    is_ambient: bool
    statistics: tuple[Attribute | None, ...] = ()
    epsilon: Attribute | float = 0.0

    def is_there(self, modules: Modules) -> bool:
        """Tell whether the model still has all that is folded here, with a weight of the same shape."""
        if not all(each.path in modules and hasattr(modules[each.path], each.name) for each in self.attributes()):
            return False
        weight, needed = self.weight.of(modules), [each for each in self.statistics[:2] if each is not None]
        return (
            weight is not None and weight.shape == self.shape and all(each.of(modules) is not None for each in needed)
        )

    def originals(self, modules: Modules) -> list[Tensor | None]:
        """Return the model's tensors that are folded: weight, bias and statistics."""
        return [None if each is None else each.of(modules) for each in (self.weight, self.bias, *self.statistics)]

    def attributes(self) -> list[Attribute]:
        """Return what is folded: weight, bias and statistics, as far as there are any."""
        return [each for each in (self.weight, self.bias, *self.statistics) if each is not None]

    def epsilon_in(self, modules: Modules) -> float:
        """Return the present epsilon of the norm."""
        return float(self.epsilon.of(modules) if isinstance(self.epsilon, Attribute) else self.epsilon)

    def tensors(
        self, modules: Modules, layout: torch.memory_format, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute weight and bias, in double precision; the weight of a 2D convolution gets that memory format.

        `dtype` is the precision of the autocast around the model, None without one: of an op that runs in it, weight
        and bias are cast, as autocast would.
        """
        tensors = [each if each is None else each.detach() for each in self.originals(modules)]
        weight, bias = tensors[:2]
        assert weight is not None
        if self.statistics:
            # Apple's GPUs have no double precision.
            place = "cpu" if weight.device.type == "mps" else weight.device
            exact: list[Any] = [each if each is None else each.to(place, torch.float64) for each in tensors]
            own, own_bias, mean, variance, gain, shift = exact
            fused = fuse_conv_bn_weights(own, own_bias, mean, variance, self.epsilon_in(modules), gain, shift)
            weight, bias = (each.detach().to(weight) for each in fused)
        weight = weight.to(memory_format=layout) if weight.dim() == 4 else weight
        if dtype is None or not self.is_ambient:
            return weight, bias
        return cast(weight, dtype), None if bias is None else cast(bias, dtype)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a tensor as autocast in `dtype` does: double precision stays."""
    return tensor if tensor.dtype is torch.float64 else tensor.to(dtype)


def fold(graph: fx.Graph, model: nn.Module) -> tuple[list[Fold], list[PassedOver]]:
    """Fold a stage's graph in place, wherever the result is surely equal but for rounding.

    Returns how to compute the weights that the graph then takes, in their order, and the modules that it no longer
    calls.
    """
    folder = Folder(graph, model)
    folder.run()
    return folder.folds, folder.passed_over


class Folder:
    def __init__(self, graph: fx.Graph, model: nn.Module) -> None:
        self._graph = graph
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._written = {name for node in self._ops() for name in node.meta["op"].mutates}
        self.folds: list[Fold] = []
        self.passed_over: list[PassedOver] = []

    def run(self) -> None:
        values = next(iter(self._graph.nodes))
        with self._graph.inserting_after(values):
            self._weights = self._graph.call_method("pop", (values,))
        for node in self._ops():
            if given := self._idle(node):
                self._replace(node, given)
        for node in self._ops():
            if norm := self._norm(node):
                self._fold_norm(node, norm)
        for node in self._ops():
            # Without a norm, too, a weight is cast once, and that of a 2D convolution gets a faster memory format.
            if affine := self._affine(node):
                self._put(affine, None, node)
        for node in reversed(self._graph.nodes):
            if node.op == "get_attr" and not node.users:
                self._graph.erase_node(node)

    def _ops(self) -> list[fx.Node]:
        return [node for node in self._graph.nodes if "op" in node.meta]

    def _fold_norm(self, node: fx.Node, norm: Norm) -> None:
        affine = self._affine(norm.input)
        if affine is None or len(norm.input.users) > 1 or contexts_of(norm.input) != contexts_of(node):
            return
        shape = norm.input.meta["op"].output.shape
        if shape is not None and len(shape) == RANKS[affine.function]:
            self._put(affine, norm, norm.input, node)

    def _fold(self, affine: Affine, norm: Norm | None, node: fx.Node) -> Fold:
        shape = affine.weight.of(self._modules).shape
        is_ambient = all(context.kind != "autocast" for context in contexts_of(node))
        statistics, epsilon = ((), 0.0) if norm is None else (norm.statistics, norm.epsilon)
        return Fold(affine.weight, affine.bias, shape, is_ambient, statistics, epsilon)

    def _put(self, affine: Affine, norm: Norm | None, *nodes: fx.Node) -> None:
        """Put one op with folded weights in the place of `nodes`, each of which reads the one before it."""
        with self._graph.inserting_before(nodes[0]):
            pair = self._graph.call_function(operator.getitem, (self._weights, len(self.folds)))
            weight, bias = (self._graph.call_function(operator.getitem, (pair, index)) for index in (0, 1))
            one = self._graph.call_function(affine.fastest(self._modules), (affine.input, weight, bias), affine.options)
            one.meta.update(nodes[0].meta)
        self.folds.append(self._fold(affine, norm, nodes[0]))
        for node in reversed(nodes):
            self._replace(node, one)

    def _replace(self, node: fx.Node, other: fx.Node) -> None:
        if (module := self._module(node)) is not None:
            names = (*OPTIONS, "padding_mode") if type(module) in FUNCTIONS else ()
            attributes = {name: getattr(module, name) for name in names if hasattr(module, name)}
            self.passed_over.append(PassedOver(str(node.target), type(module), attributes))
        node.replace_all_uses_with(other)
        self._graph.erase_node(node)

    def _idle(self, node: fx.Node) -> fx.Node | None:
        """Return the input of an op that does nothing in evaluation; None for any other op."""
        given = node.args[0] if node.args else None
        if not isinstance(given, fx.Node):
            return None
        if node.target in IDLE_FUNCTIONS:
            return given if _arguments(node)["training"] is False else None
        return given if type(self._module(node)) in IDLE else None

    def _affine(self, node: fx.Node) -> Affine | None:
        if "op" not in node.meta or not self._written.isdisjoint(node.meta["op"].state):
            return None
        module = self._module(node)
        if module is not None:
            function = FUNCTIONS.get(type(module))
            if function is None or "weight" not in module._parameters or len(node.args) != 1:
                return None
            if getattr(module, "padding_mode", "zeros") != "zeros":
                return None
            options = {name: getattr(module, name) for name in OPTIONS if function is not F.linear}
            path = str(node.target)
            return Affine(
                function, node.all_input_nodes[0], Attribute(path, "weight"), Attribute(path, "bias"), options
            )
        if node.target not in RANKS:
            return None
        # Builtin functions have no signature that could be bound.
        given = dict(zip(("input", "weight", "bias", *OPTIONS), node.args, strict=False)) | node.kwargs
        tensors = self._attributes(node, given.pop("weight"), given.pop("bias", None))
        read: Any = given.pop("input")
        return None if tensors is None else Affine(node.target, read, tensors[0], tensors[1], given)

    def _norm(self, node: fx.Node) -> Norm | None:
        if not self._written.isdisjoint(node.meta["op"].state):
            return None
        module = self._module(node)
        if type(module) in NORMS:
            if module.running_mean is None or module.running_var is None or len(node.args) != 1:
                return None
            names = ("running_mean", "running_var", "weight", "bias")
            path = str(node.target)
            return Norm(node.all_input_nodes[0], tuple(Attribute(path, name) for name in names), Attribute(path, "eps"))
        if node.target is not F.batch_norm:
            return None
        given = _arguments(node)
        if given["training"] is not False:
            return None
        statistics = self._attributes(
            node, *(given[name] for name in ("running_mean", "running_var", "weight", "bias"))
        )
        return None if statistics is None else Norm(given["input"], statistics, given["eps"])

    def _attributes(self, node: fx.Node, *arguments: Any) -> tuple[Any, ...] | None:
        """Find the model's attributes that an op is given; None when any argument was computed instead."""
        found: list[Attribute | None] = []
        for argument in arguments:
            if argument is None:
                found.append(None)
            elif isinstance(argument, fx.Node) and argument.target in node.meta["op"].state:
                path, _, name = str(argument.target).rpartition(".")
                found.append(Attribute(path, name))
            else:
                return None
        return tuple(found)

    def _module(self, node: fx.Node) -> Any:
        return self._modules[str(node.target)] if node.op == "call_module" else None


def _arguments(node: fx.Node) -> dict[str, Any]:
    given = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    given.apply_defaults()
    return given.arguments
