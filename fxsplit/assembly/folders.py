"""The recorder of a run, and its folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from fxsplit.assembly.images import interpolation
from fxsplit.assembly.starting import Start
from fxsplit.data.identity import identity
from fxsplit.data.images import Data
from fxsplit.distribute.processes import Processes
from fxsplit.execute.passes import Pass, names_of
from fxsplit.measuring.environment import environment
from fxsplit.objects.factories import is_file
from fxsplit.paths import expanded
from fxsplit.report import Inspection, Observer
from fxsplit.saving.checkpoints import Checkpoints
from fxsplit.saving.model_config import ModelConfig
from fxsplit.saving.recorder import Interval, Recorder
from fxsplit.saving.run_folder import RunFolder
from fxsplit.saving.run_state import RunState
from fxsplit.spec import RunSpec
from fxsplit.training.trainer import Trainer


def recorder(
    start: Start,
    inspection: Inspection,
    model: nn.Module,
    passes: Sequence[Pass],
    data: Data,
    trainer: Trainer,
    processes: Processes,
    observer: Observer,
    *,
    elapsed: Callable[[], tuple[float, float]],
) -> Recorder:
    """Make the recorder of a run and, unless it is a dry run, its folder, which the first process writes.

    `elapsed` is as `Recorder` takes it. Raises UsageError when the folder cannot be made.
    """
    spec, folder = start.spec, start.folder
    if start.is_new and not spec.dry_run:

        def make() -> None:
            nonlocal folder
            folder = RunFolder.new(
                spec.output,
                model=spec.model,
                schedule=inspection.plan.title,
                seed=spec.seed,
                experiment=spec.experiment,
            )

        processes.first(make)
    return Recorder(
        folder,
        inspection,
        model,
        state=RunState(model, trainer, processes),
        checkpoints=None if folder is None else Checkpoints(folder.path, keep=spec.checkpoint_keep),
        interval=Interval.read(spec.checkpoint_every),
        spec=spec.to_flat(),
        args_yaml=spec.to_yaml(),
        config=_config(spec, data),
        identity=identity(data),
        environment=environment(data.train.device),
        passes=names_of(passes),
        elapsed=elapsed,
        notice=observer.notice,
        processes=processes,
        is_apart=trainer.forward.engine.homes is not None,
    )


def _config(spec: RunSpec, data: Data) -> ModelConfig:
    source, _, _ = spec.model.partition(":")
    return ModelConfig(
        model=spec.model,
        file=str(expanded(source).resolve()) if is_file(source) else "",
        pretrained=spec.pretrained,
        stem=spec.stem,
        drop_path=spec.drop_path,
        classes=data.classes,
        channels=data.channels,
        img_size=data.img_size,
        crop_pct=spec.crop_pct,
        interpolation=interpolation(spec),
        mean=spec.mean,
        std=spec.std,
        channels_last=spec.channels_last,
    )
