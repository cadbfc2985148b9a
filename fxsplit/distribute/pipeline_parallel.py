"""Pipeline parallelism: each process trains some of the partitions, and micro-batches go through all of them.

    phase       process 0              process 1
    images ──►  ░░░░░░░░ ████████  ──► ████████████████ ──► loss        ░ settled: forward alone, without autograd
                         gradients ◄── gradients                        █ trains

    1F1B        0 1     0 2 1 3 2   3
                  0 0 1 1 2 2 3 3                                       numbers of micro-batches, forward and backward

The schedules are those of torch.distributed.pipelining. At each change of phase partitions are divided anew, so that
all processes take equally long for what still trains. All have the weights of the whole model, and test it, each on a
part of the images; gradients, optimizer state and activations are only where a partition trains.

Several pipelines may take a part of every batch each. Gradients of a partition are then the means over the processes
that train it, one of each pipeline.
"""

from __future__ import annotations

import gc
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from fxsplit.capture.tracing import Trace
from fxsplit.data.batch import Batch, micro_batch_sizes
from fxsplit.data.shares import sizes
from fxsplit.distribute.pipeline import SENDS_GRADIENTS_OF_SOME, Boundaries
from fxsplit.distribute.processes import Processes
from fxsplit.errors import PartitionError, UsageError
from fxsplit.execute.executor import Executor
from fxsplit.execute.forward import Engine
from fxsplit.execute.ownership import changing, refuse_divided
from fxsplit.objects.hooks import hooks_of
from fxsplit.objects.structure import HOST, META
from fxsplit.plan.division import balanced
from fxsplit.plan.forecast import CostModel

INTERLEAVED = "interleaved"


class PipelineParallel(Engine):
    """Runs micro-batches forward and backward through partitions that several processes have.

    All processes must have entered the same phase, and those of a pipeline are given the same batches. Its first one
    takes their values, images or what lies at a settled cut, and the last one with partitions computes the loss; the
    others need labels alone. Until the home of a partition tells the others, its weights are new there alone: see
    `Concord`.

    Args:
        trace: the model of the executor.
        executor: is run; its partitions are divided.
        processes: those of the run, arranged as one pipeline or several.
        device: of this process.
        schedule: gpipe, 1f1b or interleaved, where each process has every so many-th of the stages.
        costs: by which partitions are divided.
        batch_size: images in a batch, of all pipelines together.
        dtype: of autocast; None without.
        channels_last: whether values of four dimensions lie in memory so, and are sent so.

    Raises UsageError where there are too few partitions that a stage can begin with, or where torch is too old;
    PartitionError where several partitions use one parameter, or where the model itself, which no process runs as a
    whole, has hooks.
    """

    homes: tuple[int, ...]

    def __init__(
        self,
        trace: Trace,
        executor: Executor,
        processes: Processes,
        device: torch.device,
        *,
        schedule: str,
        costs: CostModel,
        batch_size: int,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__(executor)
        self._trace, self._device, self._costs = trace, device, costs
        self._processes, self._pipeline, self._replicas = processes, processes.pipeline, processes.replicas
        self._name, self._dtype, self._channels_last = schedule, dtype, channels_last
        self._batch_size, self._image = batch_size, (trace.train.inputs[0].shape or ())[1:]
        partitions = executor.partitions
        if any(hooks_of(trace.model)):
            raise PartitionError(
                "the model itself has hooks, and no process of a pipeline calls all of it; move them to modules in it"
            )
        refuse_divided(trace, partitions, changing(trace, partitions), range(len(partitions)))
        # Those that stages can begin with, and why others cannot.
        self._starts, reasons = [0], [""]
        boundaries = self._boundaries(2)
        for partition in partitions[1:]:
            try:
                boundaries.at(partition)
                self._starts.append(partition.index)
            except PartitionError as error:
                reasons.append(f"; {error}")
        refuse_too_few(len(self._starts), self._pipeline.count, schedule, reasons[-1])
        # By their number, the first processes of the pipeline.
        self._first_ones: dict[int, Processes | None] = {}
        # By the number and the size of micro-batches; by their size, what each stage but the last sends.
        self._schedules: dict[tuple[int, int], Any] = {}
        self._sent: dict[int, list[tuple[Tensor, ...]]] = {}
        # Bytes of gradients that a step here has averaged over pipelines; 0 before the first.
        self._reduced = 0
        # Those that are in the pipeline, and what computes the loss of one.
        self._micro_batches: Sequence[Batch] = ()
        self._loss: Callable[[Batch], Tensor] | None = None
        self._divide(0)

    def _divide(self, cut: int) -> None:
        """Divide partitions from a cut on among stages, and these among processes, by costs that the first one knows.

        Where fewer stages can be made than there are processes, the first ones have one each, and the others none.
        """
        phase, starts = self.executor.phase, [cut, *(start for start in self._starts if start > cut)]
        self._count = stage_count(len(starts), self._pipeline.count, self._name)
        self._cuts = self._processes.first(lambda: balanced(self._costs, phase, self._count, starts=starts))
        working = min(self._count, self._pipeline.count)
        if working not in self._first_ones:
            self._first_ones[working] = self._pipeline.first_ones(working)
        self._working = self._first_ones[working]
        stages = [stage for stage, (start, stop) in enumerate(pairwise(self._cuts)) for _ in range(start, stop)]
        self.homes = (0,) * cut + tuple(stage % working for stage in stages)
        self.has_loss = self._pipeline.rank == (self._count - 1) % working

    def enter(self, *beside: nn.Module, cut: int = 0) -> None:
        assert not beside, "nothing can train beside a pipeline"
        self.leave()
        self._sent.clear()
        self._reduced = 0
        self._divide(self._latest(cut))

    def is_outdated(self, cut: int) -> bool:
        return self._latest(cut) != self._cuts[0]

    def _latest(self, cut: int) -> int:
        """Return the last of the cuts at which batches come in the first processes of all pipelines.

        Where they come earlier, the first process brings them there by itself.
        """
        return self._processes.most(cut if self._pipeline.is_first else 0)

    def leave(self, *, alone: bool = False) -> None:  # noqa: ARG002 - nothing is sent for it
        if self._schedules:
            self._schedules.clear()
            # Cycles keep the memory into which their stages receive.
            gc.collect()

    @property
    def sent_per_step(self) -> int:  # type: ignore[override]
        count, bytes_sent = self.executor.phase.micro_batches, 0
        for own in sizes(self._batch_size, self._replicas.count):
            for size in micro_batch_sizes(own, count, batch_size=own):
                values = [value for each in self._values_sent(size) for value in each]
                bytes_sent += sum(value.nbytes * (2 if value.requires_grad else 1) for value in values)
        return bytes_sent

    @property
    def bytes_per_step(self) -> int | None:  # type: ignore[override]
        if self._replicas.count == 1:
            return None
        # A run that goes on after the last step of an epoch has taken none yet.
        own = self._reduced or sum(each.nbytes for each in self._trained())
        return int(self._pipeline.sum(torch.tensor(own)))

    def _trained(self) -> list[nn.Parameter]:
        """List the parameters that this process trains."""
        return [each for name, each in self.executor.named_parameters() if each.requires_grad and self.keeps(name)]

    def backward(self, micro_batches: Sequence[Batch], loss: Callable[[Batch], Tensor]) -> None:
        if self._count == 1 and self._working:
            super().backward(micro_batches, loss)
        elif self._working:
            self._loss = loss
            for alike in self._runs(micro_batches):
                self._pass_through(alike, self._working)
            self._micro_batches, self._loss = (), None
        if self._replicas.count > 1:
            gradients = [each.grad for each in self._trained() if each.grad is not None]
            self._replicas.mean(gradients)
            self._reduced = sum(each.nbytes for each in gradients)

    def _pass_through(self, alike: Sequence[Batch], working: Processes) -> None:
        """Let micro-batches of one size go through the pipeline, forward and backward."""
        self._micro_batches = alike
        key = len(alike), len(alike[0])
        if key not in self._schedules:
            self._schedules[key] = self._schedule(*key, working)
        # Schedules deal out numbers of micro-batches: the first stage and the loss look up what they are.
        numbers = torch.arange(len(alike))
        given = (numbers,) if working.is_first else ()
        try:
            self._schedules[key].step(*given, target=numbers, return_outputs=False)
        except RuntimeError as error:
            # torch puts what a stage raises into an error with all its tensors.
            raise error.__cause__ or error from None

    @property
    def _is_interleaved(self) -> bool:
        return self._name == INTERLEAVED and self._count > self._pipeline.count

    def _runs(self, micro_batches: Sequence[Batch]) -> Iterator[list[Batch]]:
        """Divide micro-batches into runs that a schedule takes: of one size, since torch receives into fixed memory."""
        for _, group in groupby(micro_batches, len):
            alike = list(group)
            # Interleaved, processes take turns with as many micro-batches as there are processes.
            whole = len(alike) - (len(alike) % self._pipeline.count if self._is_interleaved else 0)
            yield from filter(None, (alike[:whole], alike[whole:]))

    def _schedule(self, count: int, size: int, working: Processes) -> Any:
        """Make the schedule of `count` micro-batches of `size` images in the present phase."""
        sent = self._values_sent(size)
        number = (torch.empty(1, dtype=torch.int64, device=META),)
        # The last stage hands on what it is given: its partitions run with the loss.
        ends = [number, *sent, sent[-1]]
        stages: list[Any] = [
            PipelineStage(
                _Called(partial(self._run, index, [value.dtype for value in ends[index + 1]])),
                index,
                self._count,
                self._device,
                input_args=ends[index],
                output_args=ends[index + 1],
                group=working.group,
            )
            for index in range(working.rank, self._count, working.count)
        ]
        options: dict[str, Any] = {"loss_fn": self._last, "scale_grads": False}
        if self._is_interleaved:
            return ScheduleInterleaved1F1B(stages, count, **options)
        if self._name != "gpipe" and count >= self._count:
            return Schedule1F1B(stages[0], count, **options)
        return ScheduleGPipe(stages[0], count, **options)

    def _run(self, stage: int, dtypes: Sequence[torch.dtype], *given: Tensor) -> tuple[Tensor, ...]:
        """Run a stage on what it is given: the number of a micro-batch in the first one, else values at its cut."""
        if stage == self._count - 1:
            return given
        with self._autocast():
            if stage:
                values = self._values(tuple(map(self._received, given)), stage, self._cuts[stage])
            else:
                micro_batch = self._micro_batches[int(given[0])]
                values = self._values(micro_batch.values, stage, micro_batch.cut)
        return tuple(self._sendable(value.to(dtype)) for value, dtype in zip(values, dtypes, strict=True))

    def _values(self, given: Sequence[Any], stage: int, cut: int) -> list[Any]:
        """Run the partitions of a stage on images, or on values at a cut; return the values at its end."""
        executor, stop = self.executor, self._cuts[stage + 1]
        values = executor.settle_on(given, cut, stop) if cut else executor.settle_to(stop, *given)
        if stop > executor.window[0]:
            values = executor.resume(values, stop, cut=cut)
        return values

    def _last(self, values: Sequence[Tensor], number: Tensor) -> Tensor:
        """Run the partitions of the last stage, and return the loss of a micro-batch."""
        assert self._loss is not None
        micro_batch = self._micro_batches[int(number)]
        return self._loss(replace(micro_batch, values=tuple(map(self._received, values)), cut=self._cuts[-2]))

    def _values_sent(self, size: int) -> list[tuple[Tensor, ...]]:
        """List what each stage but the last sends for a micro-batch of `size` images, on the meta device."""
        if size not in self._sent:
            boundaries = self._boundaries(size)
            found = [boundaries.at(self.executor.partitions[cut]) for cut in self._cuts[1:-1]]
            types = [[value.dtype for value in each] for each in found] if self._dtype is None else self._types(size)
            self._sent[size] = [
                tuple(
                    self._sendable(value.detach().to(dtype)).requires_grad_(value.requires_grad)
                    for value, dtype in zip(values, dtypes, strict=True)
                )
                for values, dtypes in zip(found, types, strict=True)
            ]
        return self._sent[size]

    def _boundaries(self, size: int) -> Boundaries:
        return Boundaries(self._trace, (torch.empty(size, *self._image, device=META),), {}, self._device)

    @torch.no_grad()
    def _types(self, size: int) -> list[list[torch.dtype]]:
        """Find out the types that values have in autocast, by a pass in evaluation: that changes nothing."""
        training = self.executor.training
        self.executor.eval()
        values: list[Any] = [torch.zeros(size, *self._image, device=self._device)]
        found = []
        with self._autocast():
            for stage in range(self._count - 1):
                values = self._values(values, stage, self._cuts[stage] if stage else 0)
                found.append([value.dtype for value in values])
        self.executor.train(training)
        return found

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype is not None)

    def _sendable(self, value: Tensor) -> Tensor:
        """Return a value in the order in which it lies in memory, since only such are sent."""
        return (value.permute(0, 2, 3, 1) if self._is_relaid(value) else value).contiguous()

    def _received(self, value: Tensor) -> Tensor:
        """Return a value as it was before it was made `_sendable`."""
        return value.permute(0, 3, 1, 2) if self._is_relaid(value) else value

    def _is_relaid(self, value: Tensor) -> bool:
        return self._channels_last and value.dim() == 4

    def gradient_norm(self, parameters: Sequence[Tensor]) -> Tensor:
        zero = torch.zeros((), device=self._device)
        norms = torch.stack([zero if each.grad is None else torch.linalg.vector_norm(each.grad) for each in parameters])
        norm: Tensor = torch.linalg.vector_norm(self._pipeline.sum(norms))
        return norm

    def keeps(self, name: str) -> bool:
        return self._home_of(name) == self._pipeline.rank

    def _home_of(self, name: str) -> int:
        """Return the process that trains a parameter; what no partition uses, and so never changes, is the first's."""
        return next((self.homes[each.index] for each in self.executor.partitions if name in each.state), 0)

    def gathered(self, state: Mapping[str, Any], wanted: Callable[[str], bool] | None = None) -> dict[str, Any]:
        if wanted is None and self._replicas.rank:
            return {}  # the first process is in another pipeline, which has the same
        # Through memory of the host, where what is to be written stays.
        device = HOST if wanted is None else self._device
        wanted = wanted or (lambda _: self._pipeline.is_first)
        return {
            name: state[name] if name in state else _unpacked(each, device)
            for packed in self._pipeline.all({name: _packed(each) for name, each in state.items()})
            for name, each in packed.items()
            if wanted(name)
        }


class _Called(nn.Module):
    """Calls a function. It has no parameters: those are the model's, which the executor runs."""

    _run: Callable[..., tuple[Tensor, ...]]

    def __init__(self, run: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        vars(self)["_run"] = run

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        return self._run(*given)


def stage_count(starts: int, processes: int, schedule: str) -> int:
    """Return how many stages a pipeline has: one for each process or, interleaved, as many as there can be.

    There are fewer where fewer partitions are left that a stage can begin with: `starts`.
    """
    each = starts // processes if schedule == INTERLEAVED else 1
    return min(starts, max(1, each) * processes)


def refuse_too_few(starts: int, processes: int, schedule: str, reason: str = "") -> None:
    """Refuse a pipeline in which some process would have nothing to do while everything trains.

    Args:
        starts: partitions that a stage can begin with.
        processes: of the pipeline.
        schedule: its name.
        reason: why other partitions are none of these, as the end of a sentence.

    Raises UsageError where they are too few, or where torch is too old.
    """
    if not SENDS_GRADIENTS_OF_SOME:
        raise UsageError(
            f"torch {torch.__version__} sends back a gradient of every value, also of settled partitions, which have "
            "none; take a newer one for --parallel pipeline"
        )
    least = processes * (2 if schedule == INTERLEAVED else 1)
    if starts < least:
        raise UsageError(
            f"the schedule {schedule} needs {least} partitions that stages can begin with for {processes} processes, "
            f"and there {'is' if starts == 1 else 'are'} {starts}; give more --parts, or start fewer processes{reason}"
        )


def _packed(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _unpacked(data: bytes, device: torch.device) -> Any:
    """Read what was packed; tensors that were on the device of their process are put on this one."""

    def placed(storage: Any, location: str) -> Any:
        return storage if location == "cpu" else storage.to(device=device)

    return torch.load(io.BytesIO(data), map_location=placed, weights_only=True)
