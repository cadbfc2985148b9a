"""Evaluates a trained model on images, as its run did after each epoch."""

from __future__ import annotations

import base64
import heapq
import io
from contextlib import nullcontext
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fxsplit import resuming
from fxsplit.assembly.devices import choose_device, determinism
from fxsplit.assembly.steps import amp_dtype
from fxsplit.data import datasets
from fxsplit.data.datasets import NamedImages
from fxsplit.data.images import ImageSet
from fxsplit.data.loader import Loader
from fxsplit.errors import FxsplitError, UsageError
from fxsplit.pages.evaluation import evaluation_page
from fxsplit.paths import expanded
from fxsplit.report import ClassScore, Evaluation, Mistake, Observer, RunReport
from fxsplit.saving.model_config import ModelConfig
from fxsplit.spec import RunSpec, read_values
from fxsplit.trained.load import Saved, find, load
from fxsplit.trained.model import TrainedModel
from fxsplit.trained.writing import written
from fxsplit.training.accuracy import Accuracy, first_choices
from fxsplit.trust import is_code_of_data

# Mistakes that are shown, and the longest side of their pictures in pixels.
SHOWN, THUMBNAIL = 24, 128


def evaluate(
    run: str | Path,
    *,
    data: str | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    page: str | Path | None = None,
    trust_code: bool = False,
    observer: Observer | None = None,
) -> Evaluation:
    """Evaluate the model of a run on the images that the run was tested on, or on others.

    On the run's own images, and on its device, accuracy and loss are those of its last epoch. On a CPU they are the
    same bit for bit, unless the run had 1x1 convolutions run as products or was compiled.

    Args:
        run: as for `load`.
        data: other images, as `RunSpec.data`: those to test on, and of a folder without train/ all. Classes may be in
            another order, and fewer.
        batch_size: images at a time; that of the run if not given.
        device: as `RunSpec.device`.
        page: write a page for the browser to this file: the confusions, and the worst mistakes with their pictures.
        trust_code: as for `load`.
        observer: is given notices.

    Raises what `load` raises, UsageError when it is not known which images are meant or the page cannot be written, and
    DataError when they cannot be read or have classes that the model lacks.
    """
    observer = observer or Observer()
    given = {"data": data, "batch_size": batch_size, "device": device}
    asked = read_values({name: value for name, value in given.items() if value is not None})
    chosen = choose_device(asked["device"])
    saved = find(run)
    spec = _spec_of(saved)
    if spec is None and data is None:
        raise UsageError(
            f"{str(run)!r} is not in the folder of its run, so it is not known what it was tested on; give the images "
            "as --data"
        )
    if spec is not None and data is None and is_code_of_data(spec.data) and not trust_code:
        raise UsageError(
            f"the images of {str(run)!r} come from {spec.data!r}, which runs code; if you trust it, give it as --data, "
            "or add --trust-code"
        )
    settings = spec or RunSpec(model=saved.config.model, data=asked["data"], epochs=1)
    with (
        written(page) if page is not None else nullcontext() as page_file,
        determinism(settings.seed, settings.deterministic),
    ):
        model = load(run, chosen, trust_code=trust_code)
        if (status := _status(saved.folder)) != "finished":
            observer.notice(
                f"the run is {status}: its weights may be later ones than those that its report was written of"
            )
        images = _images(asked.get("data"), settings, saved.config, observer)
        counted = _Counts(model, images, keep=SHOWN)
        batches = Loader(
            images.images.to(chosen),
            batch_size=asked.get("batch_size", settings.batch_size),
            mean=saved.config.mean,
            std=saved.config.std,
            interpolation=saved.config.interpolation,
            channels_last=saved.config.channels_last,
        )
        precision = amp_dtype(settings)
        with torch.no_grad():
            for batch in batches.batches(0):
                with torch.autocast(chosen.type, dtype=precision, enabled=precision is not None):
                    scores = model(batch.images)
                    counted.add(scores, batch.labels, batch.ids)
        found = counted.evaluation(
            run=str(run), data=asked.get("data", settings.data), device=str(chosen), batch_size=batches.batch_size
        )
        if page_file is not None:
            page_file.write_text(evaluation_page(found, _pictures(images.images, found)), encoding="utf-8")
    return found


def _spec_of(saved: Saved) -> RunSpec | None:
    """Read what the run was asked for; None where the weights lie alone."""
    return resuming.spec_of(saved.folder) if (saved.folder / resuming.RECIPE).is_file() else None


def _status(folder: Path) -> str:
    """Return how the run in a folder ended, as far as it says so."""
    try:
        return RunReport.read(folder).status
    except (OSError, ValueError, FxsplitError):
        return "finished"


def _images(data: str | None, spec: RunSpec, config: ModelConfig, observer: Observer) -> NamedImages:
    is_other = data is not None and _place(data) != _place(spec.data)
    return datasets.load_test(
        spec.data if data is None else data,
        config.classes,
        img_size=config.img_size,
        interpolation=config.interpolation,
        crop_pct=config.crop_pct,
        data_dir=spec.data_dir,
        seed=spec.seed,
        workers=spec.workers,
        all_of_folder=is_other,
        max_bad_samples=spec.max_bad_samples,
        notice=observer.notice,
    )


def _place(data: str) -> str:
    """Return the name of data, the same however a folder is written."""
    scheme, _, path = data.partition(":")
    return f"{scheme}:{expanded(path).resolve()}" if path else data


class _Counts:
    """Counts what a model takes images for, batch by batch, and keeps its worst mistakes.

    Args:
        model: names its outputs.
        images: names of the images.
        keep: how many mistakes.
    """

    def __init__(self, model: TrainedModel, images: NamedImages, *, keep: int) -> None:
        self._model, self._images, self._keep = model, images, keep
        self._accuracy = Accuracy(model.device)
        self._pairs: dict[tuple[int, int], int] = {}
        # The loss of each mistake, then what it is.
        self._worst: list[tuple[float, int, int, int, float]] = []

    def add(self, scores: Tensor, labels: Tensor, ids: Tensor) -> None:
        """Add a batch: class scores (B, classes), labels (B,) and ids (B,)."""
        self._accuracy.update(F.cross_entropy(scores, labels), scores, labels)
        self._accuracy.count(len(labels))
        predicted = first_choices(scores)
        shares = scores.float().softmax(1)
        columns = labels, predicted, ids, shares.gather(1, labels[:, None])[:, 0], shares.gather(1, predicted[:, None])
        rows = zip(*(column.flatten().tolist() for column in columns), strict=True)
        for label, taken_for, index, truth, other in rows:
            self._pairs[label, taken_for] = self._pairs.get((label, taken_for), 0) + 1
            if label != taken_for:
                heapq.heappush(self._worst, (-truth, -index, label, taken_for, other))
                if len(self._worst) > self._keep:
                    heapq.heappop(self._worst)

    def evaluation(self, *, run: str, data: str, device: str, batch_size: int) -> Evaluation:
        """Return what was found."""
        score = self._accuracy.read()
        known = len(self._model.classes)
        shown = [*range(known), *sorted({index for _, index in self._pairs if index >= known})]
        confusion = tuple(tuple(self._pairs.get((truth, taken), 0) for taken in shown) for truth in shown)
        classes = tuple(
            ClassScore(
                name=self._model.name_of(index),
                count=sum(confusion[place]),
                predicted=sum(row[place] for row in confusion),
                correct=confusion[place][place],
            )
            for place, index in enumerate(shown)
        )
        mistakes = tuple(
            Mistake(
                index=-index,
                image=self._images.names[-index],
                truth=self._model.name_of(label),
                predicted=self._model.name_of(taken_for),
                truth_probability=-truth,
                predicted_probability=other,
            )
            for truth, index, label, taken_for, other in sorted(self._worst, reverse=True)
        )
        return Evaluation(
            run=run,
            model=self._model.config.model,
            data=data,
            device=device,
            batch_size=batch_size,
            images=score.count,
            loss=score.loss,
            top1_pct=score.top1_pct,
            top5_pct=score.top5_pct,
            classes=classes,
            confusion=confusion,
            mistakes=mistakes,
        )


def _pictures(images: ImageSet, found: Evaluation) -> list[str]:
    """Return a small picture of each mistake, as a data URI."""
    order = torch.tensor([each.index for each in found.mistakes], dtype=torch.int64)
    return [_data_uri(pixels[0]) for pixels in images.read(order, 1)] if len(order) else []


def _data_uri(pixels: Tensor) -> str:
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
