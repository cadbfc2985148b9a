"""Fully sharded data parallelism: each process keeps a part of what trains, and gathers a partition while it runs.

    phase       settled            trains
    process 0   ░░░░░░░░ ──► ▀▀▀▀ ▀▀▀▀ ▀▀▀▀     its halves of weights, gradients and optimizer
    process 1   ░░░░░░░░ ──► ▄▄▄▄ ▄▄▄▄ ▄▄▄▄     ░ whole in each, without traffic
                              └─ gathered, run, and divided again; in backward once more, and gradients are divided

torch's fully_shard does that to a module, and for good. Here it is given modules of our own, one for each partition
that trains: they hold no more than the places in which the model keeps its parameters. So a phase can end: its
parameters are made whole, one partition at a time, and nothing of it is left at the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import Optimizer

from fxsplit.data.batch import Batch
from fxsplit.distribute.layout import divided_as, whole
from fxsplit.distribute.processes import Processes
from fxsplit.distribute.sync_norms import SyncNorms
from fxsplit.errors import reason
from fxsplit.execute.executor import Executor
from fxsplit.execute.forward import Engine
from fxsplit.objects.structure import tensors_in

# Where a parameter is kept: a module, and its name there.
Place = tuple[nn.Module, str]

# What autocast computes in lower precision, weights and biases alike.
CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Their names are others in newer versions of torch, which warn of the older ones.
gather: Any = getattr(distributed, "all_gather_single", distributed.all_gather_into_tensor)
scatter: Any = getattr(distributed, "reduce_scatter_single", distributed.reduce_scatter_tensor)


class ShardedData(Engine):
    """Runs forward passes over parameters of which each process keeps a part.

    Each partition that trains is a unit of torch's fully_shard. What several partitions use, and what trains beside the
    model, is gathered for the whole of a step. What does not train is whole in all processes, which must have entered
    the same phase. Evaluation gathers, too, so all processes must run as many batches.

    Args:
        executor: is run.
        processes: those of the run.
        device: of the parameters.
        dtype: of autocast, in which weights of matrix products and convolutions are gathered, as it would cast them;
            gradients are added up in float32. None without autocast.
        norms: the pass of the executor that synchronises BatchNorm; None where each process has its own statistics.
    """

    def __init__(
        self,
        executor: Executor,
        processes: Processes,
        device: torch.device,
        *,
        dtype: torch.dtype | None = None,
        norms: SyncNorms | None = None,
    ) -> None:
        super().__init__(executor)
        self._processes, self._norms = processes, norms
        self._mesh = init_device_mesh(device.type, (processes.count,))
        self._dtype = dtype
        self._units: dict[int, _Unit] = {}
        self._root: Any = None
        self._traffic = _Traffic()

    def enter(self, *beside: nn.Module, cut: int = 0) -> None:  # noqa: ARG002 - each process has all partitions
        executor, before = self.executor, self._units
        if self._root is not None:
            self._root.make_whole(within=False)
        self._units, self._traffic = {}, _Traffic()
        training = range(*executor.window)
        own, common = self._places(training)
        for index in sorted({*before, *training}):
            # One partition after the other, so that no more than one is whole.
            if index in before:
                before[index].make_whole()
                executor.offload()
            if places := own.get(index):
                self._units[index] = self._unit(partial(executor.run, index), places)
        common += [(module, name) for each in beside for module in each.modules() for name in _trained_in(module)]
        self._root = self._divided(_Unit(self._run, common, self._units.values()))
        executor.wrap({index: unit.call for index, unit in self._units.items()})

    def leave(self, *, alone: bool = False) -> None:
        if self._norms is not None:
            self._norms.counting = None
        if self._root is None:
            return
        if not alone:
            self._root.make_whole()
        self._units, self._root = {}, None
        self.executor.wrap({})

    @property
    def bytes_per_step(self) -> int:  # type: ignore[override]
        return self._traffic.reduced

    @property
    def gathered_per_step(self) -> int:  # type: ignore[override]
        return self._traffic.gathered

    def together(self, micro_batches: int) -> int:
        return self._processes.most(micro_batches)

    def __call__(self, batch: Batch, stop: int | None = None) -> Any:
        if self._norms is not None:
            self._norms.counting = bool(batch.counted)
        if self._root is None:
            return super().__call__(batch, stop)
        self._traffic.forward_begins()
        with warnings.catch_warnings():
            # No cut lies where a later op writes into an earlier value.
            warnings.filterwarnings("ignore", message=".*returned a view tensor", category=UserWarning)
            result = self._root.call(batch, stop)
        if not torch.is_grad_enabled():
            self._root.reshard()  # which a root leaves to the end of backward
        return result

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        assert self._root is not None
        self._traffic.accumulates = True
        self._root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self._root.set_requires_gradient_sync(True)
            self._traffic.accumulates = False

    def _run(self, batch: Batch, stop: int | None) -> Any:
        return super().__call__(batch, stop)

    def _places(self, training: range) -> tuple[dict[int, list[Place]], list[Place]]:
        """Find where parameters are kept that train: by the partition that alone uses them, and those of several."""
        users: dict[int, set[int]] = {}
        named = dict(self.executor.named_parameters(remove_duplicate=False))
        for partition in self.executor.partitions:
            for name in partition.state:
                if name in named:
                    users.setdefault(id(named[name]), set()).add(partition.index)
        own: dict[int, list[Place]] = {index: [] for index in training}
        common: list[Place] = []
        for module in self.executor.modules():
            for name in _trained_in(module):
                used = users.get(id(module._parameters[name]), set())
                if len(used) == 1 and (index := min(used)) in own:
                    own[index].append((module, name))
                elif used & own.keys():
                    common.append((module, name))
        return own, common

    def _unit(self, run: Callable[..., Any], places: Sequence[Place]) -> _Unit:
        """Make what runs a function with divided parameters; with autocast, two in each other, by their type."""
        cast = [(owner, name) for owner, name in places if self._dtype is not None and type(owner) in CAST]
        if not cast:
            return self._divided(_Unit(run, places))
        unit = self._divided(_Unit(run, cast), self._dtype)
        others = [place for place in places if place not in cast]
        return self._divided(_Unit(unit.call, others, [unit])) if others else unit

    def _divided(self, unit: _Unit, dtype: torch.dtype | None = None) -> _Unit:
        """Give each process its part of the unit's parameters. Others in the same modules stay as they are."""
        reduced = None if dtype is None else torch.float32
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced, cast_forward_inputs=False)
        fully_shard(unit, mesh=self._mesh, mp_policy=policy, ignored_params=unit.others())
        each: Any = unit  # torch has made it an FSDPModule
        each.set_custom_all_gather(_Gather(self._traffic))
        each.set_custom_reduce_scatter(_Scatter(self._traffic))
        return unit


def why_not_divided(
    make_optimizer: Callable[[Sequence[nn.Parameter]], Optimizer], processes: Processes, device: torch.device
) -> str | None:
    """Try an optimizer on small divided parameters in all processes; return why it cannot be used, or None.

    It must compute what it computes on whole ones, within rounding.
    """
    mesh = init_device_mesh(device.type, (processes.count,))
    given = [torch.linspace(-1, 1, 2 * (processes.count + 1)).view(-1, 2), torch.ones(processes.count + 1)]
    whole_ones = [nn.Parameter(each.to(device)) for each in given]
    parts = [
        nn.Parameter(distribute_tensor(each.detach().clone(), mesh, [Shard(0)], src_data_rank=None))
        for each in whole_ones
    ]
    try:
        plain, divided = make_optimizer(whole_ones), make_optimizer(parts)
        for _ in range(2):
            for parameter, part in zip(whole_ones, parts, strict=True):
                parameter.grad = parameter.detach().sin()
                part.grad = divided_as(parameter.grad.clone(), part)
            plain.step()
            divided.step()
        alike = all(
            torch.allclose(whole(part.detach()), each, rtol=1e-5, atol=1e-7)
            for each, part in zip(whole_ones, parts, strict=True)
        )
    except (NotImplementedError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        return reason(error)
    return None if alike else "it does not compute the same with parts of weights"


class _Unit(nn.Module):
    """Runs a function with the parameters in some places, which fully_shard gathers before and divides again after.

    Args:
        run: is called in forward.
        places: where the parameters are kept.
        within: units that it runs.
    """

    _run: Callable[..., Any]

    def __init__(self, run: Callable[..., Any], places: Iterable[Place], within: Iterable[_Unit] = ()) -> None:
        super().__init__()
        self._places, self._within = list(dict.fromkeys(places)), tuple(within)
        vars(self)["_run"] = run  # not a part of this module, whatever it is
        for owner in dict.fromkeys(owner for owner, _ in self._places):
            view = nn.Module()
            # The very dict of the model's module: what is put there is put into the model.
            vars(view)["_parameters"] = owner._parameters
            self.add_module(str(len(self._modules)), view)
        for unit in self._within:
            self.add_module(str(len(self._modules)), unit)

    def forward(self, *args: Any) -> tuple[Any, list[Tensor]]:
        """Return what the function returns, and the tensors in it: torch looks for these in few kinds of objects."""
        result = self._run(*args)
        return result, list(tensors_in(result))

    def call(self, *args: Any) -> Any:
        """Run the function, with what fully_shard does around it; return what it returns."""
        return self(*args)[0]

    def others(self) -> set[nn.Parameter]:
        """List the parameters that are no part of it, but lie in the same modules."""
        own = {id(owner._parameters[name]) for owner, name in self._places}
        return {
            parameter
            for owner, _ in self._places
            for parameter in owner._parameters.values()
            if parameter is not None and id(parameter) not in own
        }

    def make_whole(self, *, within: bool = True) -> None:
        """Put whole parameters into their places, and those of the units `within`. All processes must do so."""
        for each in self._within if within else ():
            each.make_whole()
        unit: Any = self
        unit.reshard()
        found: dict[int, nn.Parameter] = {}
        for owner, name in self._places:
            part = owner._parameters[name]
            assert part is not None
            if id(part) not in found:
                found[id(part)] = nn.Parameter(whole(part.detach()), requires_grad=part.requires_grad)
            owner._parameters[name] = found[id(part)]


class _Traffic:
    """Counts the bytes that steps gather and reduce."""

    def __init__(self) -> None:
        self.accumulates = False
        self._counts = False
        self._steps = self._gathered = self._reduced = 0

    def forward_begins(self) -> None:
        """Count what follows, unless it is no training; a step ends with the pass that does not accumulate."""
        self._counts = torch.is_grad_enabled()
        self._steps += self._counts and not self.accumulates

    def count(self, *, gathered: int = 0, reduced: int = 0) -> None:
        """Count bytes of weights that were gathered, or of gradients that were reduced."""
        if self._counts:
            self._gathered, self._reduced = self._gathered + gathered, self._reduced + reduced

    @property
    def gathered(self) -> int:
        """Bytes of weights that a step has gathered."""
        return round(self._gathered / max(1, self._steps))

    @property
    def reduced(self) -> int:
        """Bytes of gradients that a step has reduced."""
        return round(self._reduced / max(1, self._steps))


class _Sending:
    """Sends as fully_shard does by itself, and counts."""

    def __init__(self, traffic: _Traffic) -> None:
        self._traffic = traffic

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Sending):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: distributed.ProcessGroup,
        async_op: bool = False,
    ) -> Any:
        self._traffic.count(gathered=output_tensor.nbytes)
        return gather(output_tensor, input_tensor, group=group, async_op=async_op)


class _Scatter(_Sending):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: distributed.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        self._traffic.count(reduced=input_tensor.nbytes)
        return scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def _trained_in(module: nn.Module) -> list[str]:
    """List by name the parameters that a module itself keeps and that train."""
    return [name for name, each in module._parameters.items() if each is not None and each.requires_grad]
