"""Plans which partitions train when: phases, the plan of a whole run, and the schedules that make one.

settle      grow        window      finetune
####        #---        ######      .....#      # trains
.###        ##--        .####-      ..####      . settled: frozen, mostly for good, runs without autograd
..##        ###-        ..##--      ....##      - frozen: passes gradients on to what trains
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal

from fxsplit.arguments import require_share, require_whole
from fxsplit.errors import PartitionError, UsageError, nearest
from fxsplit.plan.partition import Partition, require_partitions

Role = Literal["settled", "training", "frozen"]

MOVES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Describes a phase: partitions [start, stop) train for `epochs`; those before are settled, those after frozen.

    Args:
        start: first partition that trains; `stop` is the first frozen one after it, or the number of partitions.
        epochs: length, at least 1.
        fresh_optimizer: the optimizer's moments start anew.
        recompute: partitions [start, recompute) keep no activations; their forward runs again in backward
            (checkpointing). 0 if none do.
        segmented: they recompute one segment at a time.
        micro_batches: into how many a batch is divided, at least 1; their gradients are summed. A process that takes
            too few images of it makes fewer.
        thaws: partitions train that were settled in the phase before.

    Raises UsageError when a value is out of its range: when nothing trains, when `recompute` is neither 0 nor between
    `start` and `stop`, and when a phase is segmented that recomputes nothing.
    """

    start: int
    stop: int
    epochs: int
    fresh_optimizer: bool = False
    recompute: int = 0
    segmented: bool = False
    micro_batches: int = 1
    thaws: bool = False

    def __post_init__(self) -> None:
        require_whole(0, start=self.start, stop=self.stop, recompute=self.recompute)
        require_whole(1, epochs=self.epochs, micro_batches=self.micro_batches)
        if self.recompute and not self.start < self.recompute < self.stop:
            raise UsageError(
                f"a phase that trains [{self.start}, {self.stop}) cannot recompute up to {self.recompute}; it must be "
                "a cut between"
            )
        if self.segmented and not self.recompute:
            raise UsageError("a phase can recompute in segments only where it recomputes")
        if not self.start < self.stop:
            raise UsageError(f"a phase must train partitions, and [{self.start}, {self.stop}) holds none")

    def role(self, index: int) -> Role:
        """Say what partition `index` does in this phase."""
        return "settled" if index < self.start else "training" if index < self.stop else "frozen"

    def cut(self, count: int) -> int | None:
        """Find the first partition of the teacher, at the border of what trains; None if all `count` train."""
        return self.start or (self.stop if self.stop < count else None)


# Phases that an error shows before the first wrong one, and after it.
MOST_BESIDE = 6


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Lists the partitions of a model and the phases of a run over them. Printed, it draws one line a phase.

    `preset` names the preset that the plan was made by, or is "none". A run by the plan takes the preset's other
    settings too.

    Raises PartitionError, showing the plan with every wrong phase marked, when a phase ends after the last partition or
    trains no parameter, when it would train a settled partition again without saying that it thaws, and when there is
    no phase.
    """

    schedule: str
    preset: str = "none"
    partitions: tuple[Partition, ...]
    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        faults = self._faults()
        if faults:
            raise PartitionError(f"the marked phases of the plan cannot run\n{self._drawing(faults)}")
        if not self.phases:
            raise PartitionError(f"the {self.schedule} plan has no phase, so nothing would train")

    def _faults(self) -> dict[int, str]:
        faults = {}
        settled = 0
        for index, phase in enumerate(self.phases):
            wrong = []
            if phase.stop > len(self.partitions):
                wrong.append(f"the range [{phase.start}, {phase.stop}) ends after the last partition")
            elif not trainable(self.partitions, phase.start, phase.stop):
                wrong.append(f"the range [{phase.start}, {phase.stop}) holds no parameter that could train")
            if phase.thaws and phase.start >= settled:
                wrong.append("it thaws nothing: none of the partitions that it trains was settled before")
            if phase.start < settled and not phase.thaws:
                wrong.append(f"partition {phase.start} is settled by an earlier phase, and the phase does not thaw it")
            if wrong:
                faults[index] = "; ".join(wrong)
            settled = phase.start if phase.thaws else max(settled, phase.start)
        return faults

    def __str__(self) -> str:
        return self._drawing({})

    def _drawing(self, faults: Mapping[int, str]) -> str:
        partitions, epochs = counted(len(self.partitions), "partition"), counted(self.epochs, "epoch")
        lengths = [counted(phase.epochs, "epoch") for phase in self.phases]
        width = max(map(len, lengths), default=0)
        lines = []
        for index, (phase, length) in enumerate(zip(self.phases, lengths, strict=True)):
            words = ", ".join(filter(None, (self._ends(phase), self.saving(phase))))
            line = f"{self._row(phase)}  {length:{width}}  {words}".rstrip()
            lines.append(f"> {line}  <- {faults[index]}" if index in faults else f"  {line}")
        if faults:
            first = max(0, min(faults) - MOST_BESIDE)
            last = min(faults) + MOST_BESIDE + 1
            lines = ["  ..."] * (first > 0) + lines[first:last] + ["  ..."] * (last < len(lines))
        return "\n".join([f"{self.title}: {partitions}, {epochs}", *lines])

    def _row(self, phase: Phase) -> str:
        symbols = {"settled": ".", "training": "#", "frozen": "-"}
        return "".join(symbols[phase.role(index)] for index in range(len(self.partitions)))

    def _ends(self, phase: Phase) -> str:
        """Name the cuts between which a phase trains, leaving out the model's own ends."""
        ends = (("from", phase.start), ("up to", phase.stop))
        return " ".join(f"{word} {self.partitions[cut].name}" for word, cut in ends if 0 < cut < len(self.partitions))

    def saving(self, phase: Phase) -> str:
        """Say in words how a phase saves memory; empty if it does not."""
        is_cut = 0 < phase.recompute < len(self.partitions)
        recompute = self.partitions[phase.recompute].name if is_cut else None
        return saving_in_words(recompute, segmented=phase.segmented, micro_batches=phase.micro_batches)

    @property
    def title(self) -> str:
        """Name its preset, if it was made by one, and its schedule."""
        return self.schedule if self.preset == "none" else f"{self.preset} ({self.schedule})"

    @property
    def epochs(self) -> int:
        """Sum the epochs of all phases."""
        return sum(phase.epochs for phase in self.phases)

    def first_epoch(self, phase_index: int) -> int:
        """Find the epoch, counted from 0, with which a phase begins. Raises IndexError when there is no such phase."""
        if not 0 <= phase_index < len(self.phases):
            raise IndexError(f"phase {phase_index} is outside 0..{len(self.phases) - 1}")
        return sum(phase.epochs for phase in self.phases[:phase_index])

    def phase_index_at(self, epoch: int) -> int:
        """Find the index of the phase of an epoch, counted from 0. Raises IndexError outside of the run."""
        if not 0 <= epoch < self.epochs:
            raise IndexError(f"epoch {epoch} is outside 0..{self.epochs - 1}")
        return bisect_right(list(accumulate(phase.epochs for phase in self.phases)), epoch)

    def phase_at(self, epoch: int) -> Phase:
        """Find the phase of an epoch, counted from 0. Raises IndexError outside of the run."""
        return self.phases[self.phase_index_at(epoch)]

    def lasting(self, epochs: int) -> Plan:
        """Stretch or shrink the phases to a run of `epochs`.

        Each phase ends after the same fraction of the run as before, to the nearest epoch, and lasts at least one.
        Raises UsageError when there are fewer epochs than phases.
        """
        if epochs < len(self.phases):
            raise UsageError(
                f"the plan has {counted(len(self.phases), 'phase')} and cannot be run in {counted(epochs, 'epoch')}; "
                f"ask for at least {len(self.phases)}"
            )
        phases: list[Phase] = []
        begin = 0
        for index, old_end in enumerate(accumulate(phase.epochs for phase in self.phases), start=1):
            nearest_end = (2 * old_end * epochs + self.epochs) // (2 * self.epochs)
            # One epoch at least is left to this phase and to each one after it.
            end = min(max(nearest_end, begin + 1), epochs - (len(self.phases) - index))
            phases.append(replace(self.phases[index - 1], epochs=end - begin))
            begin = end
        return replace(self, phases=tuple(phases))


def saving_in_words(recompute: str | None, *, segmented: bool, micro_batches: int) -> str:
    """Say up to which cut a phase recomputes, and in how many micro-batches it takes a batch."""
    recomputes = f"recomputes up to {recompute}{' in segments' * segmented}" if recompute else ""
    return ", ".join(filter(None, (recomputes, f"{micro_batches} micro-batches" if micro_batches > 1 else "")))


def counted(number: int, noun: str) -> str:
    """Write a number with its noun in singular or plural."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# Schedules. In each phase of theirs some parameter trains, if the partitions have any.


def trainable(partitions: Sequence[Partition], start: int, stop: int) -> bool:
    """Whether partitions [start, stop) hold any parameter."""
    return any(partition.parameters for partition in partitions[start:stop])


def standard(partitions: Sequence[Partition], epochs: int) -> tuple[Phase, ...]:
    """Train everything, in one phase."""
    return (Phase(start=0, stop=len(partitions), epochs=epochs),)


def window(partitions: Sequence[Partition], epochs: int, epochs_total: int | None = None) -> tuple[Phase, ...]:
    """Train fewer partitions in each phase, from both ends, [i, N - i), with a fresh optimizer.

    So does the code released with the layer-to-layer paper (Bhyravabhottla and Lee). Each phase lasts `epochs`, as
    there, or all together last `epochs_total`. Raises UsageError when that is fewer than the phases.
    """
    count = max(1, len(partitions) // 2)
    while count > 1 and not trainable(partitions, count - 1, len(partitions) - count + 1):
        count -= 1
    if epochs_total is not None and epochs_total < count:
        raise UsageError(
            f"the window schedule over {len(partitions)} partitions has {count} phases and cannot divide "
            f"{epochs_total} epochs among them; ask for at least {count}, or for fewer partitions"
        )
    lengths = [epochs] * count if epochs_total is None else _divided_evenly(epochs_total, count)
    return tuple(
        Phase(start=index, stop=len(partitions) - index, epochs=length, fresh_optimizer=True)
        for index, length in enumerate(lengths)
    )


def grow(partitions: Sequence[Partition], epochs: int) -> tuple[Phase, ...]:
    """Train a growing student, [0, c) for c = 1 .. N, under a frozen teacher; in larger steps if epochs are few.

    The first c is the smallest with which the student has a parameter.
    """
    last = len(partitions)
    first = next((c for c in range(1, last) if trainable(partitions, 0, c)), last)
    count = min(last - first + 1, epochs)
    return tuple(
        Phase(start=0, stop=first - 1 + (index + 1) * (last - first + 1) // count, epochs=length)
        for index, length in enumerate(_divided_evenly(epochs, count))
    )


def _divided_evenly(epochs: int, count: int) -> list[int]:
    """Divide epochs as evenly as possible, the longer lengths first."""
    return [epochs // count + (index < epochs % count) for index in range(count)]


def settle(
    partitions: Sequence[Partition],
    epochs: int,
    *,
    start: float = 0.35,
    stop: float = 0.80,
    share: float = 0.60,
) -> tuple[Phase, ...]:
    """Settle a growing student, while the teacher, [c, N) for growing c, goes on training.

    The first phase trains everything. The cut c then moves at 4 evenly spaced moments, the k-th of them at
    `start + (stop - start) * k / 4` of the run, to the last partition before which lies at most `share * k / 4` of all
    multiply-adds (of the number of partitions, where no multiply-adds are known). At least the last partition trains.

    Args:
        start: fraction of the run from which the moments count, 0 to `stop`.
        stop: fraction of the run at which the last move is made, at most 1.
        share: fraction of the multiply-adds that is settled in the end, 0 to 1.

    Raises UsageError when one of them is out of its range.
    """
    _check_moments(start, stop, share)
    return _moving(partitions, epochs, {0: 0} | _moves(partitions, epochs, start, stop, share))


def _check_moments(start: float, stop: float, share: float) -> None:
    require_share(start=start, stop=stop, share=share)
    if start > stop:
        raise UsageError(
            f"the cut would begin to move at {start} of the run and stop at {stop}; let it begin earlier, or stop later"
        )


def _moves(
    partitions: Sequence[Partition], epochs: int, start: float, stop: float, share: float, front: float = 0.0
) -> dict[int, int]:
    """Return the cuts to which `settle` moves, by epoch; the shares that settle grow from `front` to `share`."""
    moves = {}
    for move in range(1, MOVES + 1):
        epoch = max(1, round(epochs * (start + (stop - start) * move / MOVES)))
        if epoch < epochs:
            moves[epoch] = _cut_at(partitions, front + (share - front) * (move / MOVES))
    return moves


def _cut_at(partitions: Sequence[Partition], share: float) -> int:
    """Find the last cut before which lies at most this share of the work, and behind which something can train."""
    macs = [partition.macs for partition in partitions]
    weights = macs if any(macs) else [1] * len(macs)
    before = list(accumulate(weights[: last_trainable(partitions)], initial=0))
    # In binary 0.6 * 0.75 is less than 0.45; the tolerance lets it reach a partition at 0.45.
    return bisect_right(before, (share + 1e-9) * sum(weights)) - 1


def last_trainable(partitions: Sequence[Partition]) -> int:
    """Find the last partition with parameters: where the cut can move at most. 0 if there is none."""
    return max((index for index, partition in enumerate(partitions) if partition.parameters), default=0)


def _moving(partitions: Sequence[Partition], epochs: int, moves: Mapping[int, int]) -> tuple[Phase, ...]:
    """Make a phase of each cut in `moves`, which are by the epoch before which they are made; the first is 0."""
    begins: dict[int, int] = {}
    for epoch, cut in moves.items():
        begins.setdefault(cut, epoch)
    return tuple(
        Phase(start=cut, stop=len(partitions), epochs=end - begin)
        for cut, (begin, end) in zip(begins, pairwise([*begins.values(), epochs]), strict=True)
    )


def settle_far(
    partitions: Sequence[Partition],
    epochs: int,
    *,
    start: float | None = None,
    stop: float | None = None,
    share: float = 0.95,
) -> tuple[Phase, ...]:
    """Settle as `settle` does, up to nearly all of the work, and the earlier the longer the run is.

    Unless given, `start` and `stop` are 0.3 and 0.83 of a run of 10 epochs, 0.05 and 0.497 of one of 60 or more; other
    lengths follow by the logarithm of the epochs. The experiments of docs/results led to these numbers: a short run has
    to learn first, a long one overfits.
    """
    length = min(1.0, math.log(epochs / 10) / math.log(60 / 10))
    start = min(1.0, 0.3 - 0.25 * length) if start is None else start
    stop = max(start, min(1.0, 0.83 - 0.333 * length)) if stop is None else stop
    return settle(partitions, epochs, start=start, stop=stop, share=share)


def finetune(
    partitions: Sequence[Partition],
    epochs: int,
    *,
    start: float = 0.125,
    stop: float = 0.625,
    share: float = 0.90,
    front: float = 0.50,
) -> tuple[Phase, ...]:
    """Train the head of a pretrained network alone, then all but its front, which settles further and further.

    Until `start` of the run, one epoch at least, the last partition that has parameters trains alone, so that its
    random weights send no large gradients into the others (linear probing before fine-tuning, Kumar et al. 2022). Then
    the partitions after `front` of all multiply-adds train, and the cut moves as in `settle`, to `share` at `stop`.
    With a share below that of the front it stays.

    Args:
        start: fraction of the run for which the head trains alone, 0 to `stop`.
        stop: fraction of the run at which the last move is made, at most 1.
        share: fraction of the multiply-adds that is settled in the end, 0 to 1.
        front: fraction of the multiply-adds that never trains, 0 to 1.

    Raises UsageError when one of them is out of its range. Source of the numbers: docs/results.
    """
    _check_moments(start, stop, share)
    require_share(front=front)
    alone = max(1, round(epochs * start))
    if epochs <= alone:
        return (Phase(start=_cut_at(partitions, front), stop=len(partitions), epochs=epochs),)
    moves = _moves(partitions, epochs, start, stop, max(share, front), front)
    later = {epoch - alone: cut for epoch, cut in moves.items() if epoch > alone}
    head = Phase(start=last_trainable(partitions), stop=len(partitions), epochs=alone)
    first, *others = _moving(partitions, epochs - alone, {0: _cut_at(partitions, front)} | later)
    if first.start == head.start:
        return (replace(head, epochs=epochs),)
    return head, replace(first, thaws=True), *others


def _thawed(phases: Sequence[Phase], epochs: int, thaw: float) -> tuple[Phase, ...]:
    """Let everything train again from this fraction of the run on, for an epoch at least.

    Later moves of the cut are left out, all of them where nothing is settled by then.
    """
    if epochs == 1:
        return tuple(phases)
    begin = max(1, min(round(epochs * thaw), epochs - 1))
    ends = accumulate(phase.epochs for phase in phases)
    before = [
        replace(phase, epochs=min(end, begin) - (end - phase.epochs))
        for phase, end in zip(phases, ends, strict=True)
        if end - phase.epochs < begin
    ]
    if not before[-1].start:
        return (*before[:-1], replace(before[-1], epochs=before[-1].epochs + epochs - begin))
    return (*before, Phase(start=0, stop=before[-1].stop, epochs=epochs - begin, thaws=True))


SCHEDULES: Mapping[str, Callable[..., tuple[Phase, ...]]] = {
    "standard": standard,
    "window": window,
    "grow": grow,
    "settle": settle,
    "settle-far": settle_far,
    "finetune": finetune,
}
# Those which take start, stop and share.
SETTLING = ("settle", "settle-far", "finetune")
# Names that may be taken for a schedule, and what to ask for instead.
NO_SCHEDULE = {"l2l": "l2l is a preset: ask for it as such, by --l2l or preset=l2l; its phases alone are settle-far"}


def schedule(
    name: str,
    *,
    partitions: Sequence[Partition],
    epochs: int,
    epochs_total: int | None = None,
    start: float | None = None,
    stop: float | None = None,
    share: float | None = None,
    front: float | None = None,
    thaw: float | None = None,
) -> Plan:
    """Make the plan of a schedule.

    Args:
        name: one of "standard", "window", "grow", "settle", "settle-far" and "finetune".
        partitions: as `fxsplit.partition` makes them.
        epochs: length of the run; for "window" of each phase.
        epochs_total: length of the run for every schedule, if given.
        start, stop, share: for "settle", "settle-far" and "finetune", where and how far the cut moves; the schedule's
            own if None.
        front: for "finetune", the share of the model that never trains; its own if None.
        thaw: for "settle", "settle-far" and "finetune", the fraction of the run from which everything trains again, for
            an epoch at least; never if None.

    Raises UsageError for an unknown name, for too few epochs, and for a fraction that the schedule does not take or
    that is not between 0 and 1.
    """
    if name in NO_SCHEDULE:
        raise UsageError(f"there is no schedule {name!r}: {NO_SCHEDULE[name]}")
    if name not in SCHEDULES:
        raise UsageError(f"there is no schedule {name!r}{nearest(name, SCHEDULES)} (have: {', '.join(SCHEDULES)})")
    require_partitions(partitions)
    wanted = epochs if epochs_total is None else epochs_total
    require_whole(1, **{"epochs" if epochs_total is None else "epochs_total": wanted})
    every = {"start": start, "stop": stop, "share": share, "front": front, "thaw": thaw}
    given = {key: value for key, value in every.items() if value is not None}
    for key in given:
        heeding = ("finetune",) if key == "front" else SETTLING
        if name not in heeding:
            raise UsageError(
                f"{key} can be given only to the schedule {' or '.join(heeding)}, and the schedule is {name!r}"
            )
    require_share(**given)
    if name == "window":
        phases = window(partitions, epochs, epochs_total)
    elif name in SETTLING:
        fractions = {key: value for key, value in given.items() if key != "thaw"}
        phases = SCHEDULES[name](partitions, wanted, **fractions)
        phases = phases if thaw is None else _thawed(phases, wanted, thaw)
    else:
        phases = SCHEDULES[name](partitions, wanted)
    return Plan(schedule=name, partitions=tuple(partitions), phases=phases)
