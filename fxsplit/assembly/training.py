"""The executor and the trainer of a run, with all that its spec switches on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer

from fxsplit.assembly.images import loaders, micro_batches, own_batch_size, views
from fxsplit.assembly.plans import forecast, slots
from fxsplit.assembly.steps import amp_dtype, optimizer, optimizer_of, scheduler
from fxsplit.caching.cache import CachePolicy
from fxsplit.caching.feed import Feed
from fxsplit.caching.media import GIB
from fxsplit.capture.tracing import Trace
from fxsplit.cuda.recorder import CudaRecorder
from fxsplit.cuda.replay import Recordings
from fxsplit.cuda.trial import why_not_replayed
from fxsplit.data.images import Data
from fxsplit.data.shares import WHOLE
from fxsplit.distribute.data_parallel import DataParallel
from fxsplit.distribute.pipeline_parallel import PipelineParallel
from fxsplit.distribute.processes import ALONE, Processes
from fxsplit.distribute.sync_norms import SyncNorms
from fxsplit.errors import UsageError
from fxsplit.execute.executor import Executor
from fxsplit.execute.forward import Engine, Forward
from fxsplit.execute.passes import Pass, passes_for
from fxsplit.paths import expanded
from fxsplit.plan.forecast import CostModel, step_work
from fxsplit.plan.schedule import Plan
from fxsplit.report import Observer
from fxsplit.spec import RunSpec
from fxsplit.training.accuracy import Snapshots
from fxsplit.training.guard import Guard
from fxsplit.training.objective import Objective
from fxsplit.training.phase_optimizer import PhaseOptimizer
from fxsplit.training.plasticity import QUIET_INTERVALS, Plasticity
from fxsplit.training.regularisers.endings import Endings, WeightEma, named_parameters
from fxsplit.training.regularisers.exits import Exits
from fxsplit.training.regularisers.soft_targets import LastTargets, MeanTargets, SoftTargets
from fxsplit.training.step import Step
from fxsplit.training.telemetry import Work
from fxsplit.training.trainer import Trainer


def passes(spec: RunSpec, device: torch.device, processes: Processes = ALONE) -> tuple[Pass, ...]:
    """Choose the graph passes that a run on this device asks for."""
    chosen = passes_for(device, channels_last=spec.channels_last)
    return (*chosen, SyncNorms()) if spec.sync_bn and processes.count > 1 else chosen


def executor(spec: RunSpec, trace: Trace, plan: Plan, passes: Sequence[Pass]) -> Executor:
    """Make the executor of a run, with its precision, its passes and its compiler."""
    return Executor(
        trace,
        plan.partitions,
        passes=passes,
        settled_dtype=None if spec.settled_dtype == "same" else getattr(torch, spec.settled_dtype),
        backend=spec.torchcompile or None,
        settled_offload=spec.settled_offload,
    )


def recordings(
    spec: RunSpec, trace: Trace, device: torch.device, processes: Processes, observer: Observer
) -> Recordings | None:
    """Make what records the steps of a run and replays them; None where they run eagerly."""
    if spec.cuda_graphs != "on":
        return None
    if device.type != "cuda":
        observer.notice("CUDA graphs are recorded on a GPU alone; steps run eagerly")
        return None
    if processes.count > 1:
        observer.notice("steps of several processes are not recorded as CUDA graphs")
        return None
    if spec.settled_offload:
        observer.notice("copies of settled weights from the host are not recorded as CUDA graphs; steps run eagerly")
        return None
    if spec.torchcompile:
        observer.notice("compiled stages are not recorded as CUDA graphs")
        return None
    return Recordings(CudaRecorder(device), device, held=(trace.model,), notice=observer.notice)


def _update_is_recorded(spec: RunSpec, recordings: Recordings, observer: Observer) -> bool:
    """Tell whether the optimizer's part of a step can be replayed; if not, say so."""
    if spec.amp and spec.amp_dtype == "float16":
        reason: str | None = "the scale of the loss follows from its gradients"
    else:

        def make(parameters: Sequence[nn.Parameter], capturable: bool) -> Optimizer:
            return optimizer(spec)(nn.ParameterList(parameters), layer_decay=None, capturable=capturable)

        reason = why_not_replayed(make, recordings.recorder, recordings.device)
    if reason is not None:
        observer.notice(f"{spec.opt} steps eagerly, after a forward and backward from a CUDA graph: {reason}")
    return reason is None


def trainer(
    spec: RunSpec,
    trace: Trace,
    executor: Executor,
    plan: Plan,
    data: Data,
    processes: Processes,
    passes: Sequence[Pass],
    observer: Observer,
    recordings: Recordings | None = None,
) -> Trainer:
    """Make the trainer of a run, with all that its spec switches on; `passes` are those of the executor.

    Raises UsageError for names that timm lacks, and for an optimizer that cannot be divided.
    """
    train_loader, test_loader = loaders(spec, data, processes)
    held_out = None if data.held_out is None else data.held_out.cropped(spec.crop_pct)
    held_out_loader = None if held_out is None else replace(test_loader, images=held_out, share=WHOLE)
    leads = processes.pipeline.is_first
    update_is_recorded = recordings is not None and _update_is_recorded(spec, recordings, observer)
    if spec.torchcompile:
        observer.notice(
            f"torch.compile with {spec.torchcompile}: each phase is compiled in its first step and its first test, "
            "which can take minutes"
        )
    steps_per_epoch = train_loader.steps_per_epoch
    engine = _engine(spec, trace, executor, processes, passes, train_loader.device)
    forward = Forward(executor, train_loader.device, amp_dtype=amp_dtype(spec), engine=engine)
    objective = Objective(
        smoothing=spec.smoothing, soft_targets=_soft_targets(spec, data), exits=_exits(spec, trace, plan, data)
    )
    return Trainer(
        plan=plan,
        forward=forward,
        feed=Feed(
            forward,
            train_loader,
            test_loader,
            policy=cache_policy(spec, trace, plan, data, processes),
            held_out_loader=held_out_loader if leads else None,
            leads=leads,
        ),
        objective=objective,
        step=Step(
            forward,
            objective,
            batch_size=train_loader.own_batch_size,
            clip_grad=spec.clip_grad,
        ),
        optimizer=PhaseOptimizer(
            executor,
            plan,
            make_optimizer=partial(optimizer(spec), trace.model, capturable=update_is_recorded),
            make_scheduler=scheduler(spec, plan.epochs),
            steps_per_epoch=steps_per_epoch,
            exits=objective.exits,
            annealing=spec.anneal,
            device=train_loader.device if update_is_recorded else None,
            engine=engine,
        ),
        endings=Endings(
            forward,
            plan,
            steps_per_epoch=steps_per_epoch,
            average=spec.average,
            recalibrate=spec.recalibrate,
            midpoint=objective.has_midpoint,
            recorded=update_is_recorded,
        ),
        ema=WeightEma(
            executor,
            decay=spec.model_ema_decay,
            warmup=spec.model_ema_warmup,
            device=train_loader.device if update_is_recorded else None,
        )
        if spec.model_ema
        else None,
        plasticity=_plasticity(forward.engine, steps_per_epoch) if spec.veto else None,
        guard=Guard(plan) if data.held_out is not None else None,
        snapshots=Snapshots() if spec.ensemble and len(plan.phases) > 1 else None,
        work=Work(partial(step_work, modes=trace), plan) if leads else None,
        recordings=recordings,
        update_is_recorded=update_is_recorded,
        processes=processes,
        log_interval=spec.log_interval,
        observer=observer,
    )


def _engine(
    spec: RunSpec,
    trace: Trace,
    executor: Executor,
    processes: Processes,
    passes: Sequence[Pass],
    device: torch.device,
) -> Engine | None:
    """Make what runs forward and backward together with other processes; None for this one alone."""
    if processes.count == 1:
        return None
    if processes.pipeline.count > 1:
        return _pipeline(spec, trace, executor, processes, device)
    norms = next((each for each in passes if isinstance(each, SyncNorms)), None)
    if spec.parallel != "fsdp":
        return DataParallel(executor, processes, norms=norms)
    # Few runs need what this imports, which takes a second.
    from fxsplit.distribute.sharded_data import ShardedData, why_not_divided

    if reason := why_not_divided(partial(optimizer_of, spec), processes, device):
        raise UsageError(f"the optimizer {spec.opt!r} cannot be divided among processes: {reason}; take --parallel ddp")
    return ShardedData(executor, processes, device, dtype=amp_dtype(spec), norms=norms)


def _pipeline(
    spec: RunSpec, trace: Trace, executor: Executor, processes: Processes, device: torch.device
) -> PipelineParallel:
    micro_batch = -(-own_batch_size(spec, processes) // micro_batches(spec, processes))
    return PipelineParallel(
        trace,
        executor,
        processes,
        device,
        schedule=spec.pipeline_schedule,
        costs=CostModel(executor.partitions, trace, micro_batch, slots(spec)),
        batch_size=spec.batch_size,
        dtype=amp_dtype(spec),
        channels_last=spec.channels_last,
    )


def _exits(spec: RunSpec, trace: Trace, plan: Plan, data: Data) -> Exits | None:
    if not spec.exits:
        return None
    return Exits(
        trace.train,
        plan.partitions,
        count=spec.exits,
        num_classes=len(data.classes),
        weight=spec.exit_weight,
        seed=spec.seed,
        device=data.train.device,
    )


def _soft_targets(spec: RunSpec, data: Data) -> SoftTargets | None:
    if not spec.soft_targets:
        return None
    kind = MeanTargets if spec.soft_from == "mean" else LastTargets
    return kind(
        len(data.train),
        weight=spec.soft_targets,
        temperature=spec.soft_temperature,
        fade=spec.soft_fade,
        device=data.train.device,
    )


def _plasticity(engine: Engine, steps_per_epoch: int) -> Plasticity:
    # Partitions count as quiet after QUIET_INTERVALS intervals, which together last an epoch.
    interval = max(1, steps_per_epoch // QUIET_INTERVALS)
    return Plasticity(named_parameters(engine.executor), interval=interval, keeps=engine.keeps)


def cache_policy(
    spec: RunSpec, trace: Trace, plan: Plan, data: Data, processes: Processes = ALONE
) -> CachePolicy | None:
    """Say what a run keeps of settled partitions, and where; None for nothing."""
    if spec.cache == "off" or spec.dry_run:
        return None
    return CachePolicy(
        medium=spec.cache,
        limit_bytes=None if spec.cache_limit is None else int(spec.cache_limit * GIB),
        dtype=None if spec.cache_dtype == "exact" else getattr(torch, spec.cache_dtype),
        folder=str(expanded(spec.output)),
        peak_bytes=_peak_bytes(spec, trace, plan, data, processes) if data.train.device.type == "cuda" else 0,
        measured=not spec.deterministic,
        share=_share_of_rows(spec, data, processes),
    )


def _share_of_rows(spec: RunSpec, data: Data, processes: Processes) -> float:
    """Return which share of the rows that the processes of this machine keep is this one's."""
    if processes.local_count == 1:
        return 1.0
    trained = len(data.train) * (views(spec) or 1) / processes.replicas.count
    held_out = 0 if data.held_out is None else len(data.held_out)
    first = processes.rank - processes.local_rank
    # In a pipeline the first process alone has rows of images to train on.
    rows = [
        len(data.test) / processes.count + (0 if rank % processes.pipeline.count else trained + held_out)
        for rank in range(first, first + processes.local_count)
    ]
    return rows[processes.local_rank] / sum(rows)


def _peak_bytes(spec: RunSpec, trace: Trace, plan: Plan, data: Data, processes: Processes) -> int:
    """Forecast what a run will take of the memory of its device: the largest of its phases, and the pixels there."""
    ahead = forecast(spec, plan, trace, measured=False, processes=processes)
    pixels = sum(images.resident.nbytes for images in (data.train, data.test) if images.resident is not None)
    return max(phase.peak_bytes for phase in ahead.phases) + pixels
