"""Runs a convolution of a settled partition, and what follows it, in the fastest of several ways.

    conv ─► norm ─► (+ shortcut) ─► relu     plain     a kernel for each, as the model does; weights are cast once
                                             folded    conv with bias, the norm in both ─► (+ shortcut) ─► relu
                                             product   likewise, a 1x1 convolution as a matrix product
                                             fused     one kernel

Which way is fastest depends on the device, the type and the shape: a bias may be a kernel of its own, which costs more
than a norm in evaluation, and a product takes it along. So the ways are timed, on the first batch of a shape. A way
that is less exact than `plain` is out.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxsplit.capture.contexts import contexts_of
from fxsplit.execute import pointwise
from fxsplit.execute.settled.folding import Affine, Fold, Folder, Modules, Norm, PassedOver

# Functions, and methods by name, with the function that a site calls for them.
SUMS: dict[Any, Any] = {
    **dict.fromkeys((operator.add, torch.add, "add"), operator.add),
    **dict.fromkeys((operator.iadd, "add_"), operator.iadd),
}
RELUS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")

# Each way is timed in that many rounds, the ways in turn; the best time counts.
ROUNDS = 3
# A way may be off from exact arithmetic by that many times as much as `plain` is, on that many samples.
SLACK, SAMPLES = 1.25, 2
# Beyond that many forms none is timed any more, as with a detector, whose images have ever new sizes.
MOST_FORMS = 16

# Called with the input, and with the shortcut if one is added.
Run = Callable[..., Tensor]
# The precision, and of the tensors that a site is given sizes, types and layouts; of the batch its order of magnitude.
Form = tuple[Any, ...]


class Device(NamedTuple):
    """What a kind of device offers.

    Args:
        convolution_relu: called with input, weight, bias, stride, padding, dilation and groups.
        convolution_add_relu: called with input, weight, shortcut, 1.0 as its factor, bias and the same further ones.
        seconds: takes a function that computes on a device, and that device, and returns what a call takes.
        is_free: whether anything may be timed and kept now, which it may not be while a graph is recorded.
    """

    convolution_relu: Run
    convolution_add_relu: Run
    seconds: Callable[[Callable[[], object], torch.device], float]
    is_free: Callable[[], bool]


def seconds_on_cuda(run: Callable[[], object], device: torch.device, *, warmup: int = 2, calls: int = 5) -> float:
    """Time a function that computes on a CUDA device, on its present stream: seconds a call."""
    with torch.cuda.device(device):
        for _ in range(warmup):
            run()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        for _ in range(calls):
            run()
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1000 / calls


# By the type of a device. On others a settled partition runs folded.
DEVICES = {
    "cuda": Device(
        convolution_relu=torch.cudnn_convolution_relu,
        convolution_add_relu=torch.cudnn_convolution_add_relu,
        seconds=seconds_on_cuda,
        is_free=lambda: not torch.cuda.is_current_stream_capturing(),
    )
}


class Site(NamedTuple):
    """A convolution or linear op of a settled partition with what follows it: a norm, a sum with a shortcut, a ReLU.

    `fold` says where its weights are, and those of the norm; `function` is called with them and with `options`. `add`
    is the function of the sum, None without one.
    """

    fold: Fold
    function: Any
    options: dict[str, Any]
    add: Any
    has_relu: bool


def fuse(graph: fx.Graph, model: nn.Module) -> tuple[list[Site], list[PassedOver]]:
    """Put one call in the place of each convolution or linear op, and of what follows it, in a stage's graph.

    What is called are the items of a list that the graph takes as one more value: a `Kernel` for each of the sites that
    are returned, in their order. Returned are also the modules that the graph no longer calls.
    """
    fuser = _Fuser(graph, model)
    fuser.run()
    return fuser.sites, fuser.passed_over


class _Fuser(Folder):
    def __init__(self, graph: fx.Graph, model: nn.Module) -> None:
        super().__init__(graph, model)
        self.sites: list[Site] = []

    def _put(self, affine: Affine, norm: Norm | None, *nodes: fx.Node) -> None:
        added, shortcut, relu = self._what_follows(nodes)
        add = None if added is None else SUMS[added.target]
        self.sites.append(
            Site(self._fold(affine, norm, nodes[0]), affine.function, affine.options, add, relu is not None)
        )
        whole = [*nodes, *(node for node in (added, relu) if node is not None)]
        given = (affine.input,) if shortcut is None else (affine.input, shortcut)
        # At the end, where the shortcut is there.
        with self._graph.inserting_before(whole[-1]):
            kernel = self._graph.call_function(operator.getitem, (self._weights, len(self.sites) - 1))
            one = self._graph.call_function(operator.call, (kernel, *given))
            one.meta.update(nodes[0].meta)
        for node in reversed(whole):
            self._replace(node, one)

    def _what_follows(
        self, nodes: Sequence[fx.Node]
    ) -> tuple[fx.Node, fx.Node, fx.Node] | tuple[None, None, fx.Node | None]:
        """Find the sum after `nodes`, what it adds, and the ReLU; without a sum the ReLU alone, if there is one."""
        user = self._only_user(nodes[-1])
        if user is None:
            return None, None, None
        shortcut = _shortcut(user, nodes[-1])
        if shortcut is None:
            return None, None, user if self._is_relu(user) and self._may_move(nodes, user) else None
        relu = self._only_user(user)
        if relu is None or not self._is_relu(relu) or not self._may_move((*nodes, user), relu):
            return None, None, None
        return user, shortcut, relu

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        users = tuple(node.users)
        return users[0] if len(users) == 1 and "op" in users[0].meta else None

    def _may_move(self, nodes: Sequence[fx.Node], end: fx.Node) -> bool:
        """Tell whether the ops `nodes` may run together with `end`: no op between writes into what they read."""
        node = nodes[0]
        while node is not end:
            node = node.next
            if node not in nodes and node is not end and "op" in node.meta and node.meta["op"].mutates:
                return False
        return all(contexts_of(node) == contexts_of(end) for node in nodes)

    def _is_relu(self, node: fx.Node) -> bool:
        return type(self._module(node)) is nn.ReLU if node.op == "call_module" else node.target in RELUS


def _shortcut(node: fx.Node, branch: fx.Node) -> fx.Node | None:
    """Return what a sum adds to `branch`, None if it is no such sum."""
    if node.op == "call_module" or node.target not in SUMS or len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    # In place, the sum is written into the first of the two.
    other = second if first is branch else None if SUMS[node.target] is operator.iadd else first
    return other if isinstance(other, fx.Node) and other is not branch else None


class Kernel:
    """Runs a site: called with its input, and with the shortcut if it adds one. Holds the weights that this takes.

    Args:
        site: what to run.
        modules: those of the model, by path.
        device: what the device of the tensors offers.
        ways: the way that was chosen for each form of what is given; what is chosen is put into it.
    """

    def __init__(self, site: Site, modules: Modules, device: Device, ways: dict[Form, str]) -> None:
        self._site, self._modules, self._device, self._ways = site, modules, device, ways
        self._runs: dict[Form, Run] = {}
        # Forms with the same way, precision and layout share one, and with it its weights.
        self._shared: dict[Any, Run] = {}

    def __call__(self, x: Tensor, *shortcut: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        shape = x.shape
        form: Form = (dtype, x.device, x.dtype, shape[1:], x.stride(), shape[0].bit_length())
        for each in shortcut:
            form += (each.dtype, each.shape[1:], each.stride(), each.shape[:1] == shape[:1])
        run = self._runs.get(form)
        if run is None:
            run = self._run_of(form, dtype, x, *shortcut)
        return run(x, *shortcut)

    def _run_of(self, form: Form, dtype: torch.dtype | None, x: Tensor, *shortcut: Tensor) -> Run:
        if not x.numel() or not self._device.is_free():
            return self._made("plain", dtype, x)
        # Times differ from run to run, so deterministic runs do without.
        if torch.are_deterministic_algorithms_enabled():
            way = "plain"
        elif form in self._ways or len(self._ways) >= MOST_FORMS:
            way = self._ways.get(form, "plain")
        else:
            way = self._ways[form] = self._fastest(dtype, x, *shortcut)
        if len(self._runs) >= MOST_FORMS:
            self._runs.clear()
        shared = way, dtype, _layout_of(x)
        if shared not in self._shared:
            self._shared[shared] = self._made(way, dtype, x)
        run = self._runs[form] = self._shared[shared]
        return run

    def _fastest(self, dtype: torch.dtype | None, x: Tensor, *shortcut: Tensor) -> str:
        """Time all ways that deliver what `plain` does, and return the name of the fastest."""
        ways = list(self._possible(x))
        if not ways:
            return "plain"
        plain = self._made("plain", dtype, x)
        expected, exact = plain(x, *shortcut), self._exact(x, *shortcut)
        most = SLACK * _distance(expected, exact)
        runs = {"plain": plain}
        # The fused kernel neither casts nor expands what it adds.
        if any(each.shape != expected.shape or each.dtype is not (dtype or x.dtype) for each in shortcut):
            ways = [way for way in ways if way != "fused"]
        for way in ways:
            run = self._made(way, dtype, x)
            try:
                found = run(x, *shortcut)
            except RuntimeError:
                continue  # the device has no kernel for this
            if _is_alike(found, expected) and _distance(found, exact) <= most:
                runs[way] = run
        if len(runs) == 1:
            return "plain"
        seconds = dict.fromkeys(runs, math.inf)
        for _ in range(ROUNDS):
            for way, run in runs.items():
                seconds[way] = min(seconds[way], self._device.seconds(partial(run, x, *shortcut), x.device))
        return min(seconds, key=seconds.__getitem__)

    def _possible(self, x: Tensor) -> Iterator[str]:
        """Give the ways beside `plain` for such an input."""
        site = self._site
        if site.fold.statistics:
            yield "folded"
        if site.function is not F.conv2d or x.dim() != 4:
            return
        if x.permute(0, 2, 3, 1).is_contiguous() and pointwise.is_pointwise(
            site.fold.weight.of(self._modules), **site.options
        ):
            yield "product"
        if site.has_relu and torch.backends.cudnn.enabled and not isinstance(site.options.get("padding"), str):
            yield "fused"

    def _made(self, way: str, dtype: torch.dtype | None, x: Tensor) -> Run:
        """Make what runs the site in a way, with weights for the precision and the layout of such an input."""
        site = self._site
        fold = site.fold._replace(is_ambient=True, statistics=() if way == "plain" else site.fold.statistics)
        weight, bias = fold.tensors(self._modules, _layout_of(x), dtype)
        if way == "plain":
            return self._unfused(partial(site.function, weight=weight, bias=bias, **site.options), self._norm())
        if way == "folded":
            return self._unfused(partial(site.function, weight=weight, bias=bias, **site.options))
        if way == "product":
            return self._unfused(partial(pointwise.as_product, weight=weight, bias=bias))
        return self._fused(weight, weight.new_zeros(len(weight)) if bias is None else bias)

    def _unfused(self, linear: Run, norm: Run | None = None) -> Run:
        add, has_relu = self._site.add, self._site.has_relu

        def run(x: Tensor, *shortcut: Tensor) -> Tensor:
            y = linear(x)
            if norm is not None:
                y = norm(y)
            if add is not None:
                y = add(y, *shortcut)
            return torch.relu_(y) if has_relu else y

        return run

    def _norm(self, dtype: torch.dtype | None = None) -> Run | None:
        """Make the norm in evaluation, None without one; its tensors stay as they are unless there is a `dtype`."""
        fold = self._site.fold
        if not fold.statistics:
            return None
        tensors = (None if each is None else each.detach() for each in fold.originals(self._modules)[2:])
        mean, variance, gain, shift = (each if dtype is None or each is None else each.to(dtype) for each in tensors)
        epsilon = fold.epsilon_in(self._modules)
        return lambda x: F.batch_norm(x, mean, variance, gain, shift, False, 0.0, epsilon)

    def _exact(self, x: Tensor, *shortcut: Tensor) -> Tensor:
        """Compute what the site delivers for the first samples, in double precision."""
        site = self._site
        weight, bias = (
            None if each is None else each.detach().double() for each in site.fold.originals(self._modules)[:2]
        )
        given = [each[:SAMPLES].double() if len(each) == len(x) else each.double() for each in (x, *shortcut)]
        run = self._unfused(partial(site.function, weight=weight, bias=bias, **site.options), self._norm(torch.float64))
        with torch.autocast(x.device.type, enabled=False):
            return run(*given)

    def _fused(self, weight: Tensor, bias: Tensor) -> Run:
        dtype = weight.dtype
        options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | self._site.options
        pairs = (options[name] for name in ("stride", "padding", "dilation"))
        where = *([each] * 2 if isinstance(each, int) else list(each) for each in pairs), options["groups"]
        relu, add_relu = self._device.convolution_relu, self._device.convolution_add_relu
        if self._site.add is None:
            return lambda x: relu(x.to(dtype), weight, bias, *where)
        return lambda x, shortcut: add_relu(x.to(dtype), weight, shortcut, 1.0, bias, *where)


def _layout_of(x: Tensor) -> torch.memory_format:
    """Return the layout for the weights of a convolution of `x`."""
    is_channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_channels_last else torch.preserve_format


def _is_alike(found: Tensor, expected: Tensor) -> bool:
    """Whether a tensor is like another for the ops that read it: of the same type and shape, in the same layout."""
    layouts = (
        [step for step, size in zip(each.stride(), each.shape, strict=True) if size > 1] for each in (found, expected)
    )
    return found.dtype is expected.dtype and found.shape == expected.shape and operator.eq(*layouts)


def _distance(found: Tensor, exact: Tensor) -> float:
    """Measure how far the first samples are from what they exactly are."""
    return float((found[: len(exact)].double() - exact).norm())
