"""The processes that train one model together, as `torchrun` starts them; most runs have one, for which all is free."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.rendezvous import rendezvous

from fxsplit.data.shares import Share
from fxsplit.errors import FxsplitError, UsageError
from fxsplit.objects.structure import HOST

Value = TypeVar("Value")
# The dimensions of the mesh that processes are arranged in.
MESH = ("ddp", "pipeline")


class Processes:
    """This process among those of a run, or among some of them. Every method is called by all, in the same order.

    Args:
        rank: the number of this process, from 0.
        count: of all processes.
        local_rank: its number among those on this machine.
        local_count: of the processes on this machine.
        group: torch's, where they are not all that there are.
    """

    replicas: Processes
    pipeline: Processes

    def __init__(
        self,
        rank: int = 0,
        count: int = 1,
        *,
        local_rank: int = 0,
        local_count: int = 1,
        group: distributed.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.count, self.group = rank, count, group
        self.local_rank, self.local_count = local_rank, local_count
        # Those that train the same partitions as this one, each on a part of every batch; and those through which a
        # part of a batch goes. Without pipelines each process trains all partitions.
        self.replicas, self.pipeline = self, self if count == 1 else Processes()
        # Those of torch's that `first_ones` has made.
        self._groups: list[distributed.ProcessGroup] = []
        # The vote that goes on: a tensor that all add to, and the work that does it.
        self._vote: tuple[Tensor, Any] | None = None

    def arrange(self, pipeline: int) -> None:
        """Arrange the processes as pipelines of so many neighbours each; torch's name for that is a device mesh.

                     pipeline
            0 ──► 1 ──► 2
            3 ──► 4 ──► 5        replicas, "ddp": 0 and 3 train the same partitions, as do 1 and 4, 2 and 5

        Raises UsageError where the number of processes is no multiple of `pipeline`.
        """
        if self.count % pipeline:
            raise UsageError(
                f"{self.count} processes cannot be divided into pipelines of {pipeline}; start a multiple of "
                f"{pipeline}, or give another --pipeline-processes"
            )
        if pipeline in (1, self.count):
            self.replicas, self.pipeline = (self, Processes()) if pipeline == 1 else (Processes(), self)
            return
        mesh = init_device_mesh(HOST.type, (self.count // pipeline, pipeline), mesh_dim_names=MESH)
        self.replicas, self.pipeline = (
            Processes(mesh.get_local_rank(name), mesh.size(dim), group=mesh.get_group(name))
            for dim, name in enumerate(MESH)
        )

    def first_ones(self, count: int) -> Processes | None:
        """Return the first `count` of these; None in the others, which need not call it.

        Each call makes a group of torch's, which stays until the end of the run.
        """
        if self.rank >= count:
            return None
        if count in (1, self.count):
            return self if count == self.count else Processes()
        ranks = [self._global(rank) for rank in range(count)]
        group = distributed.new_group(ranks, use_local_synchronization=True)
        assert isinstance(group, distributed.ProcessGroup)  # else this process would be none of them
        self._groups.append(group)
        return Processes(self.rank, count, group=group)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and draws."""
        return self.rank == 0

    def part(self, samples: int) -> int:
        """Return the most of so many samples that one process takes."""
        return -(-samples // self.count)

    @property
    def share(self) -> Share:
        """The part of every batch that this process takes."""
        return Share(self.rank, self.count)

    def first(self, make: Callable[[], Value]) -> Value:
        """Return what the first process makes, in all; the others make nothing. Its error is raised in all, too."""
        if self.count == 1:
            return make()
        made: list[Any] = [None, None]
        if self.is_first:
            try:
                made[0] = make()
            except Exception as failed:
                made[1] = failed
        distributed.broadcast_object_list(made, self._global(0), group=self.group, device=HOST)
        value, error = made
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]

    def all(self, value: Value) -> list[Value]:
        """Return the values of all processes, by rank."""
        found = []
        for rank in range(self.count):
            # Not all_gather_object, which takes a GPU for it where there is one.
            held = [value if rank == self.rank else None]
            if self.count > 1:
                distributed.broadcast_object_list(held, self._global(rank), group=self.group, device=HOST)
            found += held
        return found  # type: ignore[return-value]

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place."""
        if self.count > 1:
            distributed.all_reduce(tensor, group=self.group)
        return tensor

    def _global(self, rank: int) -> int:
        """Return the number that a process of these has among all."""
        return rank if self.group is None else distributed.get_global_rank(self.group, rank)

    def most(self, number: int) -> int:
        """Return the largest number that any process gives."""
        given = torch.tensor(number)
        if self.count > 1:
            distributed.all_reduce(given, distributed.ReduceOp.MAX, group=self.group)
        return int(given)

    def mean(self, tensors: Sequence[Tensor]) -> None:
        """Set tensors, in place, to their means over all processes; those without fractions to the first one's."""
        if self.count == 1:
            return
        for (dtype, _), group in _alike(tensors).items():
            packed = torch.cat([tensor.reshape(-1) for tensor in group])
            if dtype.is_floating_point or dtype.is_complex:
                self.sum(packed).div_(self.count)
            else:
                distributed.broadcast(packed, self._global(0), group=self.group)
            _unpack(packed, group)

    def broadcast(self, tensors: Sequence[Tensor], *, source: int = 0) -> None:
        """Set tensors, in place, to those of one process."""
        for group in _alike(tensors).values() if self.count > 1 else ():
            packed = torch.cat([tensor.detach().reshape(-1) for tensor in group])
            distributed.broadcast(packed, self._global(source), group=self.group)
            _unpack(packed, group)

    def vote(self, number: int) -> int:
        """Vote with a number, 0 for nothing; return the largest of the vote before this one, or without others of this.

        So nobody waits: the votes of a step are counted while the next one is computed.
        """
        if self.count == 1:
            return number
        before = self._counted()
        given = torch.tensor(number)
        self._vote = given, distributed.all_reduce(given, distributed.ReduceOp.MAX, group=self.group, async_op=True)
        return before

    def _counted(self) -> int:
        if self._vote is None:
            return 0
        (given, work), self._vote = self._vote, None
        work.wait()
        return int(given)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Inside, the first process of each machine is ahead of the others there, which find what it has downloaded.

        Raises FxsplitError in these where one that is ahead has failed.
        """
        failed = torch.zeros(1)
        if self.local_rank and self.sum(failed):
            raise FxsplitError("the first process of a machine has failed, and the others end with it")
        try:
            yield
        except Exception:
            failed += 1
            raise
        finally:
            if not self.local_rank:
                self.sum(failed)

    def refuse_differing(self, facts: Mapping[str, Any], why: str) -> None:
        """Raise UsageError in all processes, with what differs, where the facts of one are not those of the first.

        Args:
            facts: plain data by its name in words.
            why: the end of the sentence.
        """
        first, *others = self.all(dict(facts))
        for rank, other in enumerate(others, 1):
            if different := [name for name in facts if other[name] != first[name]]:
                name = different[0]
                raise UsageError(
                    f"process {rank} has another {name} than process 0: {other[name]} and {first[name]}; {why}"
                )

    def refuse_drifted(self, state: Mapping[str, Tensor]) -> None:
        """Raise FxsplitError in all processes where a tensor of one is not that of the first; the first one is named.

        Checksums are compared: each is the sum of the tensor's bits.
        """
        if self.count == 1:
            return
        own = torch.tensor([checksum(tensor) for tensor in state.values()])
        first = own.clone()
        distributed.broadcast(first, self._global(0), group=self.group)
        # By rank, the number of the first tensor that differs.
        wrong = torch.full((self.count,), len(own))
        if len(different := (own != first).nonzero()):
            wrong[self.rank] = different[0, 0]
        distributed.all_reduce(wrong, distributed.ReduceOp.MIN, group=self.group)
        if int(wrong.min()) < len(own):
            name = list(state)[int(wrong.min())]
            raise FxsplitError(
                f"{name!r} of process {int(wrong.argmin())} is no longer that of process 0, so they train different "
                "models: something in a step depends on the process"
            )

    def close(self) -> None:
        """Count the last vote, so that nothing is on its way any more."""
        self._counted()

    def groups(self) -> list[distributed.ProcessGroup]:
        """List the groups of torch's that were made for some of the processes."""
        parts = [each.group for each in (self.replicas, self.pipeline) if each.group is not None]
        return [*self.pipeline._groups, *parts]


# The single process of most runs.
ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that `torchrun` has started, or those that torch.distributed knows already, and leave them.

    Without either this is the only process. Inside, FxsplitError is raised where another process has ended.
    """
    rank, count = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    was_initialized = distributed.is_initialized()
    if was_initialized:
        rank, count = distributed.get_rank(), distributed.get_world_size()
    if count == 1:
        yield Processes()
        return
    if not was_initialized:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, store=_store(), rank=rank, world_size=count)
    processes = Processes(rank, count, local_rank=local_rank(), local_count=local_count())
    try:
        with lost_process_named():
            yield processes
            processes.close()
    finally:
        for group in processes.groups():
            distributed.destroy_process_group(group)
        if not was_initialized:
            distributed.destroy_process_group()


@contextmanager
def lost_process_named() -> Iterator[None]:
    """Inside, an error of torch about a process that is gone becomes a FxsplitError."""
    try:
        yield
    except RuntimeError as error:
        # NCCL has types of its own; gloo names a file of its source.
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise FxsplitError(
            "another process of the run has ended, or cannot be reached, so this one ends, too; see what that one says "
            "and go on with --resume"
        ) from error


def _store() -> PrefixStore:
    """Connect to where the processes find each other.

    `torchrun` keeps it when it starts them anew: without a part of their own they may find the addresses of the dead.
    """
    store, _, count = next(rendezvous("env://"))
    return PrefixStore(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{count}", store)


def local_rank() -> int:
    """Return the number of this process among those that train on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_count() -> int:
    """Return how many processes train on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def checksum(tensor: Tensor) -> int:
    """Add up the bits of a tensor, as 32-bit numbers or as bytes."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.dtype is torch.bool or flat.dtype.itemsize % 4:
        return int(flat.view(torch.uint8).sum(dtype=torch.int64))
    return int(flat.view(torch.int32).sum(dtype=torch.int64))


def _alike(tensors: Sequence[Tensor]) -> dict[tuple[torch.dtype, torch.device], list[Tensor]]:
    """Group tensors by type and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return groups


@torch.no_grad()
def _unpack(packed: Tensor, tensors: Sequence[Tensor]) -> None:
    parts = torch.split(packed, [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view(tensor.shape))
