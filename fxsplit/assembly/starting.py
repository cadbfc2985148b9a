"""Where a run begins: at its beginning, or where an earlier process of it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fxsplit import resuming
from fxsplit.assembly.images import micro_batches
from fxsplit.assembly.models import with_preprocessing
from fxsplit.capture.tracing import Trace
from fxsplit.data.batch import micro_batch_count
from fxsplit.data.identity import identity, refuse_others
from fxsplit.data.images import Data
from fxsplit.data.shares import sizes
from fxsplit.distribute.processes import Processes
from fxsplit.errors import UsageError
from fxsplit.measuring.environment import code_digest
from fxsplit.paths import expanded
from fxsplit.plan import planfile
from fxsplit.plan.planfile import PlanFile
from fxsplit.plan.schedule import counted
from fxsplit.report import Observer
from fxsplit.saving.checkpoints import Found, Place, find_checkpoint
from fxsplit.saving.recorder import Recorder
from fxsplit.saving.run_folder import RunFolder
from fxsplit.spec import PIPELINE, PIPELINED, PIPELINES, RunSpec
from fxsplit.trust import refuse_run


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Says where a run begins: at its beginning, or where an earlier process of it ended.

    Args:
        spec: what the run is asked for now.
        is_new: whether it begins in a folder of its own, which is made later.
        folder: of the run that goes on, in the process that writes it.
        found: its checkpoint; None where there is none yet, and the run begins anew.
        plan: that of the checkpoint, for as many epochs as are asked for now.
    """

    spec: RunSpec
    is_new: bool = True
    folder: RunFolder | None = None
    found: Found | None = None
    plan: PlanFile | None = None

    @property
    def goes_on(self) -> bool:
        """Whether weights and plan come from a checkpoint."""
        return self.found is not None


def start(
    spec: RunSpec | None,
    resume: str | Path | None,
    processes: Processes,
    observer: Observer,
    *,
    trust_code: bool = False,
) -> Start:
    """Complete what is asked for, find the checkpoint to go on from, and say what differs from what it was asked for.

    The first process does so for all. The folder of a run that goes on is locked from here on, and processes are
    arranged as pipelines, where these are asked for.

    Raises UsageError when there is no such run, when another process goes on with it, when it would run code that no
    `spec` names and that is not trusted, when something differs that cannot, when a new run could have no folder, when
    random weights are to be fine-tuned, when a batch has fewer images than there are processes to share it, or when
    these are no whole number of pipelines; DataError when there are checkpoints and none is whole; and what
    `with_preprocessing` raises.
    """
    asked = None if spec is None else spec.to_flat()
    processes.refuse_differing({"command line": (asked, resume)}, "give all of them the same")
    found: list[Start] = []

    def make() -> Start:
        found.append(_start(spec, resume, observer, trust_code=trust_code))
        return replace(found[0], folder=None)  # the lock cannot be sent

    made = processes.first(make)
    return _fitting(found[0] if found else made, processes, observer)


def _fitting(start: Start, processes: Processes, observer: Observer) -> Start:
    """Arrange the processes, and return what was found for them. Raises UsageError where so many cannot do it."""
    spec, count = start.spec, processes.count
    if count == 1:
        if spec.parallel != "ddp":
            observer.notice(f"there are no other processes for --parallel {spec.parallel}; start several with torchrun")
        return start
    if spec.ensemble:
        raise UsageError("a snapshot ensemble is tested by one process; leave out --ensemble")
    processes.arrange({PIPELINE: count, PIPELINES: spec.pipeline_processes}.get(spec.parallel, 1))
    _refuse_unshared(spec, processes)
    together, images = f"{count} processes train together", f"each batch of {spec.batch_size} images"
    replicas, pipeline = processes.replicas, processes.pipeline
    most, least = replicas.part(spec.batch_size), spec.batch_size // replicas.count
    size = f"{most} images" if most == least else f"{least} or {most} images"
    if spec.parallel not in PIPELINED:
        observer.notice(f"{together}; of {images} one takes {size}")
        return start
    start, divided = _in_micro_batches(start, processes)
    if replicas.count == 1:
        way = f"each some of the partitions; {images} goes through them"
    else:
        way = f"in {replicas.count} pipelines of {pipeline.count}; of {images} {size} go through one of them"
    observer.notice(f"{together}, {way} {divided}")
    return start


def _refuse_unshared(spec: RunSpec, processes: Processes) -> None:
    """Raise UsageError where processes, or pipelines, cannot each take a part of every batch."""
    count, name = processes.replicas.count, "pipelines" if processes.pipeline.count > 1 else "processes"
    if spec.batch_size < count:
        raise UsageError(
            f"batch-size is {spec.batch_size}, and {count} {name} divide each batch among them; give a larger one"
        )
    if count > 1 and (spec.mixup or spec.cutmix):
        mixing = "mixup" if spec.mixup else "cutmix"
        raise UsageError(
            f"--{mixing} mixes images of a batch, of which each of {count} {name} has only a part; leave it out"
        )


def _in_micro_batches(start: Start, processes: Processes) -> tuple[Start, str]:
    """Divide batches for pipelines, into a micro-batch for each of their processes if none are asked for; say so."""
    spec, count = start.spec, processes.pipeline.count
    own_sizes = sizes(spec.batch_size, processes.replicas.count)

    def in_words(planned: Sequence[int]) -> str:
        numbers = sorted({micro_batch_count(own, most) for own in own_sizes for most in planned})
        return f"{' or '.join(map(str, numbers))} micro-batch{'es' * (numbers != [1])}"

    if start.plan is not None:
        planned = [micro_batches(spec, processes, planned=phase.micro_batches) for phase in start.plan.phases]
        return start, f"in {in_words(planned)}"
    # Phases of a plan file, and those that are to save memory, may take more.
    least = "at least " * any((spec.plan, spec.memory_budget, spec.memory_aim))
    if spec.grad_accum_steps > 1:
        return start, f"in {least}{in_words([micro_batches(spec, processes)])}"
    if spec.batch_size % count:
        raise UsageError(
            f"batch-size is {spec.batch_size}, which {count} micro-batches, one for each process of the pipeline, do "
            "not divide; give another one, or --grad-accum-steps"
        )
    spec = replace(spec, grad_accum_steps=count)
    if min(micro_batch_count(own, count) for own in own_sizes) == count:
        why = "one for each process; more --grad-accum-steps leave them less to wait"
    else:
        why = "since none has a single image; with a larger --batch-size processes wait less"
    return replace(start, spec=spec), f"in {least}{in_words([micro_batches(spec, processes)])}, {why}"


def _start(spec: RunSpec | None, resume: str | Path | None, observer: Observer, *, trust_code: bool) -> Start:
    if spec is not None:
        spec = with_preprocessing(spec, observer)
    if resume is None:
        if spec is None:
            raise UsageError("nothing says what to train: give a spec, or a run to resume")
        if spec.preset == "finetune" and not (spec.pretrained or spec.initial_checkpoint or spec.force):
            raise UsageError(
                "the preset is 'finetune', but the weights are random, and a front of random weights learns nothing; "
                "give --pretrained or --initial-checkpoint, or --force"
            )
        if not spec.dry_run:
            RunFolder.check(spec.output, experiment=spec.experiment)
        return Start(spec=spec)
    path = resuming.run_folder_of(resume)
    if spec is None:
        refuse_run(resuming.spec_of(path).to_flat(), path, trust_code=trust_code)
    folder = RunFolder.reopened(path)
    given = expanded(resume)
    found = find_checkpoint(given if given.is_file() else path, notice=observer.notice)
    before = resuming.spec_of(path) if found is None else resuming.spec_from(found.data["spec"])
    now = replace(resuming.spec_of(path) if spec is None else spec, output=str(path.parent))
    plan = None if found is None else _plan_to_go_on(found, before, now, observer)
    for sentence in resuming.differing(before, now):
        observer.notice(sentence)
    if found is None:
        observer.notice(f"the run in {str(path)!r} has no checkpoint yet, and begins anew")
    return Start(spec=now, is_new=False, folder=folder, found=found, plan=plan)


def _plan_to_go_on(found: Found, before: RunSpec, now: RunSpec, observer: Observer) -> PlanFile:
    """Return the plan of a checkpoint, as long as is asked for now. Raises UsageError as `lengthened` does."""
    saved = planfile.from_dict(found.data["plan"], origin=found.path.name)
    plan = resuming.lengthened(saved, before, now)
    if before.model_ema and Place(*found.data["place"]).epoch >= saved.epochs < plan.epochs:
        observer.notice(
            "the run has ended, and averages took the place of its weights (model-ema): it goes on from these, which "
            "after few steps are near the weights that it began with"
        )
    return plan


def check_alike(trace: Trace, data: Data, processes: Processes) -> None:
    """Give all processes the weights of the first one, and hold their code and data against its own.

    Raises UsageError where they differ, or where there are fewer images than processes can share.
    """
    if processes.count == 1:
        return
    facts = {
        "version of torch": torch.__version__,
        "code of fxsplit": code_digest(),
        "model": trace.train.digest(),
        "set of images": identity(data),
    }
    processes.refuse_differing(facts, "give all of them the same code and data")
    if len(data.train) < 2 * processes.count:
        raise UsageError(f"{processes.count} processes cannot share {len(data.train)} images; start fewer of them")
    processes.broadcast([*trace.model.parameters(), *trace.model.buffers()])


def check_data(start: Start, data: Data, observer: Observer) -> None:
    """Hold the data against those of the run that goes on. Raises UsageError when they are others."""
    if start.found is None:
        return
    before, now = start.found.data["identity"], identity(data)
    refuse_others(before, now)
    if before["pixels"] != now["pixels"]:
        observer.notice("some images have other pixels than when the run began, and it goes on with those of now")


def restore(run: Recorder, start: Start, processes: Processes, observer: Observer) -> None:
    """Restore the state of the run that goes on, if one does. Raises UsageError when it is of another model."""
    if start.found is None:
        return
    place = Place(*start.found.data["place"])
    done = start.plan is not None and place.epoch >= start.plan.epochs
    observer.notice(f"all {place.epoch} epochs are done; more --epochs go on" if done else f"goes on after {place}")
    before, now = start.found.data["state"]["training"]["feed"].get("ranks", 1), processes.replicas.count
    if before != now:
        parts = f"a batch was divided in {counted(before, 'part')} and is now in {counted(now, 'part')}"
        observer.notice(f"{parts}: {resuming.ROUNDING}")
    if later := run.later_than(start.found):
        observer.notice(f"later checkpoints are removed: {', '.join(later)}")
    run.go_on(start.found)
