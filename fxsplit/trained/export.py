"""Exports a trained model to formats that other programs run, and holds what is written against the model.

the run's model ──► a file ──► loaded again, from the file ──┬──► scores
      │                                                      compared, on batches of several sizes
      └──────────────────────────────────────────────────────┴──► scores
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fxsplit.errors import FxsplitError, ProofError, UsageError, nearest, printable
from fxsplit.paths import expanded
from fxsplit.report import ExportRecord
from fxsplit.saving.model_config import MODEL_CONFIG
from fxsplit.saving.run_folder import write_weights
from fxsplit.trained.load import find, load
from fxsplit.trained.model import TrainedModel
from fxsplit.trained.writing import written

# The images of each batch on which exports are compared, of the three that there are. The first is their example.
BATCHES = ([0, 1], [2], [0, 1, 2])
# Other kernels round otherwise. So much, relative to the largest score, is rounding.
ROUNDING = 1e-4
INPUT, OUTPUT = "images", "scores"
# Calls the model that was read from a file.
Call = Callable[[Tensor], Tensor]


class Format(NamedTuple):
    """A format to export to.

    Args:
        suffix: of its files.
        write: writes the model, which takes images like an example, into a file.
        read: reads the file; whether code of the user's is trusted is said, too.
        rounding: how far scores may be from the model's, relative to the largest; 0 for none.
        needs: modules that must be installed.
    """

    suffix: str
    write: Callable[[nn.Module, Tensor, TrainedModel, Path], None]
    read: Callable[[Path, bool], Call]
    rounding: float = 0.0
    needs: tuple[str, ...] = ()


class FromPixels(nn.Module):
    """A trained model that takes pixels, uint8 (B, 3, H, W), and normalizes them itself."""

    def __init__(self, model: TrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores (B, classes)."""
        scores: Tensor = self.model(self.model.normalize(images))
        return scores


def export(
    run: str | Path,
    output: str | Path | None = None,
    *,
    format: str = "onnx",  # noqa: A002 - the option's name
    pixels: bool = False,
    trust_code: bool = False,
) -> ExportRecord:
    """Export the model of a run, in evaluation mode and for any number of images at a time.

    What is written is loaded again, and must give the model's scores on random images: bit for bit, and from ONNX
    within 1e-4 of the largest score. How images are prepared stands in the file, as the entry `model.json` of its
    metadata.

    Args:
        run: as for `load`.
        output: the file to write; by default `model` with the suffix of the format, in the folder of the run.
        format: onnx, torchscript, torch-export, or safetensors (the weights alone).
        pixels: the exported model takes pixels, uint8 from 0 to 255, and scales and normalizes them itself; otherwise
            it takes images that are normalized.
        trust_code: as for `load`.

    Raises what `load` raises, UsageError when the format is unknown, something for it is not installed or the file
    cannot be written, FxsplitError when the model cannot be exported to it, and ProofError when what was written gives
    other scores; there is no file then.
    """
    if format not in FORMATS:
        raise UsageError(f"there is no format {format!r}{nearest(format, FORMATS)} (have: {', '.join(FORMATS)})")
    chosen = FORMATS[format]
    if pixels and format == "safetensors":
        raise UsageError("safetensors holds weights alone, which take no pixels: choose another format")
    if missing := [name for name in chosen.needs if importlib.util.find_spec(name) is None]:
        raise UsageError(
            f"{format} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; run "
            "pip install 'fxsplit[export]'"
        )
    saved = find(run)
    target = saved.folder / f"model{chosen.suffix}" if output is None else expanded(output)
    if os.path.realpath(target) == os.path.realpath(saved.weights):  # a loop of links is left to the writing
        raise UsageError(f"{str(target)!r} is what would be exported; name another file by --output")
    with written(target) as part:
        trained = load(run, trust_code=trust_code)
        size = trained.config.img_size
        images = _images(size)
        model: nn.Module = FromPixels(trained).eval() if pixels else trained
        given = images if pixels else trained.normalize(images)
        with torch.no_grad(), _without_chatter():
            with _refused(trained.config.model, format):
                chosen.write(model, given[BATCHES[0]], trained, part)
            difference = _proven(model, chosen.read(part, trust_code), given, chosen.rounding, format)
        size_bytes = part.stat().st_size
    kind = "pixels, uint8" if pixels else "normalized images, float32"
    return ExportRecord(
        path=str(target),
        format=format,
        bytes=size_bytes,
        takes=f"{kind} (batch, 3, {size}, {size})",
        batch_sizes=tuple(sorted(map(len, BATCHES))),
        difference=difference,
    )


def _images(size: int) -> Tensor:
    """Make the pixels of three images, uint8 (3, 3, size, size): two of noise, and a black one.

    A model that takes another way for an image of another kind would be exported with the first one's alone.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (2, 3, size, size), generator=generator, dtype=torch.uint8)
    return torch.cat([noise, torch.zeros_like(noise[:1])])


def _proven(model: nn.Module, exported: Call, images: Tensor, rounding: float, name: str) -> float:
    """Compare an exported model with the model, and return the largest difference. Raises ProofError if it is large."""
    worst = 0.0
    for batch in BATCHES:
        given, count = images[batch], len(batch)
        ours = model(given)
        try:
            theirs = exported(given)
        except Exception as error:
            raise ProofError(
                f"the exported {name} cannot be run on {count} images, and is not kept: {_words(error)}"
            ) from error
        if theirs.shape != ours.shape or theirs.isnan().any() != ours.isnan().any():
            raise ProofError(
                f"the exported {name} gives {tuple(theirs.shape)} scores for {count} images, the model "
                f"{tuple(ours.shape)}; it is not kept"
            )
        if torch.equal(theirs, ours):
            continue
        difference = float((theirs - ours).abs().max() / ours.abs().max())
        if not difference <= rounding:
            raise ProofError(
                f"the exported {name} gives other scores than the model: they differ by {difference:.2g} of the "
                f"largest, on {count} images, and {rounding:.2g} is allowed; it is not kept"
            )
        worst = max(worst, difference)
    return worst


def _write_safetensors(_: nn.Module, __: Tensor, trained: TrainedModel, path: Path) -> None:
    write_weights(trained.model, path, trained.config)


def _read_safetensors(path: Path, trust_code: bool) -> Call:
    return load(path, trust_code=trust_code)


def _write_torchscript(model: nn.Module, example: Tensor, trained: TrainedModel, path: Path) -> None:
    traced = torch.jit.trace(model, (example,), check_trace=False)  # type: ignore[no-untyped-call]
    torch.jit.save(traced, path, _extra_files={MODEL_CONFIG: _config_text(trained)})


def _read_torchscript(path: Path, _: bool) -> Call:
    found: Call = torch.jit.load(path)  # type: ignore[no-untyped-call]
    return found


def _exported(model: nn.Module, example: Tensor) -> Any:
    return torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))


def _write_torch_export(model: nn.Module, example: Tensor, trained: TrainedModel, path: Path) -> None:
    with path.open("wb") as file:
        torch.export.save(_exported(model, example), file, extra_files={MODEL_CONFIG: _config_text(trained)})


def _read_torch_export(path: Path, _: bool) -> Call:
    with path.open("rb") as file:
        found: Call = torch.export.load(file).module()
    return found


def _write_onnx(model: nn.Module, example: Tensor, trained: TrainedModel, path: Path) -> None:
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        dynamic_shapes=({0: "batch"},),
        input_names=[INPUT],
        output_names=[OUTPUT],
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props[MODEL_CONFIG] = _config_text(trained)
    program.save(path, external_data=False)


def _read_onnx(path: Path, _: bool) -> Call:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def call(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    return call


def _config_text(trained: TrainedModel) -> str:
    return json.dumps(trained.config.to_dict())


FORMATS = {
    "onnx": Format(".onnx", _write_onnx, _read_onnx, ROUNDING, ("onnx", "onnxscript", "onnxruntime")),
    "torchscript": Format(".pt", _write_torchscript, _read_torchscript),
    "torch-export": Format(".pt2", _write_torch_export, _read_torch_export),
    "safetensors": Format(".safetensors", _write_safetensors, _read_safetensors),
}


@contextmanager
def _refused(model: str, name: str) -> Iterator[None]:
    """Turn whatever an exporter raises into a FxsplitError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if isinstance(error, SafetensorError):
            raise OSError(None, _words(error)) from error
        raise FxsplitError(f"{model!r} cannot be exported to {name}: {_words(error)}") from error


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Inside, exporters say nothing of what they leave out or will do otherwise in later versions."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _words(error: Exception) -> str:
    said = printable(" ".join(str(error).split()))
    return said[:300] or type(error).__name__
