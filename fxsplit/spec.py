"""RunSpec: everything that a run can be asked for, as plain values, and the strict reading of it.

Later ones win: defaults < preset < recipe file < `FXSPLIT_*` environment < command line. The field `batch_size` is the
key `batch-size` of a recipe, the variable `FXSPLIT_BATCH_SIZE` and the option `--batch-size`. The command line makes
its options from the fields below, so the text of a field is its documentation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

import yaml

from fxsplit.errors import MOST_SHOWN, UsageError, joined, nearest, printable, shortened, shown, shown_path
from fxsplit.options import key, kind_of, option, read_value
from fxsplit.paths import has_home
from fxsplit.plain_data import read_yaml
from fxsplit.plan.partition import BALANCES, CUT_KINDS
from fxsplit.plan.planfile import read_options
from fxsplit.plan.schedule import NO_SCHEDULE, SCHEDULES, SETTLING
from fxsplit.presets import PRESETS, preset

ENVIRONMENT_PREFIX = "FXSPLIT_"
# The value of `parallel` with which processes have partitions, and not parts of batches.
# A single pipeline, or several that take a part of every batch each.
PIPELINE, PIPELINES = "pipeline", "ddp,pipeline"
PIPELINED = (PIPELINE, PIPELINES)

# Larger numbers are mistakes: of pixels in a side, of epochs, of which each is a line in the records, of partitions.
MOST_SIDE, MOST_EPOCHS, MOST_PARTS = 1 << 14, 10**6, 10_000
# With a larger alpha every share is a half.
MOST_ALPHA = 1e6

# Fields that may begin with the home folder.
HOMES = ("model", "initial_checkpoint", "data", "data_dir", "output")
# Fields that say when partitions settle. Only schedules that settle partitions use them.
MOMENTS = ("settle_from", "settle_until", "settle_share", "settle_front", "thaw_from")
# Fields that may not be given beside a plan file, because the file decides them.
PLANNED = ("schedule", "parts", "at", "by", "balance", "epochs_total", "shift", *MOMENTS)
# By field, those whose values from earlier layers are dropped when a later layer gives it: they decide the same thing.
WITHDRAWN = {
    "parts": ("at",),
    "at": ("parts",),
    "plan": (*PLANNED, "epochs", "memory_aim"),
    "preset": ("schedule",),
    "model_ema": ("average",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """Describes a training run. Every field is also a key of a recipe and an option of `fxsplit train`.

    A field that is not given has the value of the `preset` for this number of epochs, or else the default below;
    `preset="l2l"` is what `--l2l` means. With a `plan`, preset and epochs are those of the file unless they are given.

    Raises UsageError, which names all faults at once, when a value has another type than its field, is not one that the
    field allows, or contradicts another one.
    """

    model: str = option(
        "Model",
        "timm:NAME, torchvision:NAME, hf:NAME, paper:NAME, file.py:FACTORY or pkg.module:FACTORY.",
        "",
        pattern=r"(?s).+",
    )
    pretrained: bool = option(
        "Model",
        "Start from pretrained weights (downloaded), with the --img-size, --interpolation, --mean and --std that they "
        "were trained with, where these are not given.",
        False,
    )
    initial_checkpoint: str | None = option(
        "Model",
        "Start from the weights in a file (safetensors or torch.save) or a run's folder; a classifier of another size "
        "starts at zero.",
        None,
    )
    force: bool = option("Model", "Take --preset finetune for a model without pretrained weights, too.", False)
    stem: str = option(
        "Model",
        "cifar, for small images: first convolution 3x3 at stride 1, no first pooling, patches of 4 pixels.",
        "original",
        choices=("original", "cifar"),
    )

    data: str = option("Data", "digits, cifar10, cifar100, folder:PATH, synthetic or file.py:FACTORY.", "digits")
    data_dir: str = option("Data", "Where downloaded data sets are kept.", "~/.cache/fxsplit/data")
    img_size: int | None = option(
        "Data", "Side of the square images in pixels; the data's own if not given.", None, least=2, most=MOST_SIDE
    )
    interpolation: str | None = option(
        "Data", "How images are resized; bilinear if not given.", None, choices=("bilinear", "bicubic")
    )
    batch_size: int = option("Data", "Images in one optimizer step.", 64, flags=("-b",), least=1, most=10**6)
    workers: int = option(
        "Data", "Processes that read images which do not fit in memory.", 2, flags=("-j",), least=0, most=1024
    )
    max_bad_samples: int = option(
        "Data",
        "Go on with up to so many images of a folder that cannot be decoded; others of their class take their places.",
        0,
        least=0,
    )
    train_limit: int | None = option("Data", "Train on this many images, drawn with the seed.", None, least=1)
    train_batches_per_epoch: int | None = option("Data", "End each epoch after this many steps.", None, least=1)
    crop_pct: float = option(
        "Data", "Share of the short side of test images that is left, in the middle.", 1.0, least=0.1, most=1
    )
    mean: tuple[float, ...] = option("Data", "Means of the channels, subtracted from pixels / 255.", ())
    std: tuple[float, ...] = option(
        "Data", "Standard deviations of the channels, by which images are then divided.", (), above=0
    )

    augment: str = option(
        "Augmentation",
        "How images are cropped and mirrored: crop-flip (after padding, at random), flip-alternate (mirrored in every "
        "other epoch), resized-crop (a part of random size and shape).",
        "none",
        choices=("none", "crop-flip", "flip-alternate", "resized-crop"),
    )
    scale: tuple[float, ...] = option(
        "Augmentation",
        "Least and largest share of the area with --augment resized-crop; 0.08,1 if not given.",
        (),
        above=0,
        most=1,
    )
    ratio: tuple[float, ...] = option(
        "Augmentation",
        "Least and largest width, in heights, with --augment resized-crop; 3/4 and 4/3 if not given.",
        (),
        least=1e-4,
        most=1e4,
    )
    train_interpolation: str | None = option(
        "Augmentation",
        "How resized crops are resized; as --interpolation if not given.",
        None,
        choices=("bilinear", "bicubic", "random"),
    )
    hflip: float | None = option(
        "Augmentation",
        "Chance that an image is mirrored; with crop-flip and resized-crop 0.5 if not given.",
        None,
        least=0,
        most=1,
    )
    aa: str | None = option(
        "Augmentation",
        "Policy that changes colours and shapes: trivial, or by timm's names, as rand-m9-mstd0.5, original, v0, 3a, "
        "augmix-m5-w4.",
        None,
        pattern=r"trivial|(rand|augmix|original|originalr|v0|v0r|3a)(-[a-z]+\d+(\.\d+)?)*",
    )
    color_jitter: float = option(
        "Augmentation",
        "By how much brightness, contrast and saturation change at most; not beside --aa.",
        0.0,
        least=0,
        most=1,
    )
    reprob: float = option("Augmentation", "Chance that a part of an image is erased.", 0.0, least=0, most=1)
    mixup: float = option(
        "Augmentation",
        "Mix images and labels of a batch, with this alpha of the beta distribution.",
        0.0,
        least=0,
        most=MOST_ALPHA,
    )
    cutmix: float = option(
        "Augmentation",
        "Replace a part of each image by that of another one in the batch, with this alpha; with --mixup too, each "
        "batch is mixed in one of the two ways.",
        0.0,
        least=0,
        most=MOST_ALPHA,
    )

    epochs: int = option(
        "Training", "Epochs of the run; of each phase with --schedule window.", 10, least=1, most=MOST_EPOCHS
    )
    epochs_total: int | None = option(
        "Training", "Epochs of the whole run, divided among the phases.", None, least=1, most=MOST_EPOCHS
    )
    opt: str = option("Training", "Optimizer, by timm's name.", "adamw")
    lr: float = option("Training", "Learning rate.", 1e-3, above=0)
    momentum: float = option("Training", "Momentum, for optimizers that have one.", 0.9, least=0, below=1)
    weight_decay: float = option("Training", "Weight decay.", 0.0, flags=("--wd",), least=0)
    layer_decay: float | None = option(
        "Training",
        "Learning rate of each layer, as a share of that of the layer after it; layers are timm's groups.",
        None,
        above=0,
        most=1,
    )
    clip_grad: float | None = option(
        "Training", "Largest norm of the gradient; a larger one is scaled down.", None, above=0
    )
    sched: str = option("Training", "Learning-rate schedule, by timm's name.", "constant")
    warmup_epochs: int = option("Training", "Epochs of linear warm-up.", 0, least=0, most=MOST_EPOCHS)
    decay_epochs: float | None = option(
        "Training", "Epochs between decays with --sched step; a third of the run if not given.", None, above=0
    )
    decay_milestones: tuple[float, ...] = option(
        "Training", "Epochs of the decays with --sched multistep.", (), above=0
    )
    decay_rate: float = option(
        "Training", "Factor of the learning rate at each decay; the power of --sched poly.", 0.1, above=0
    )
    min_lr: float = option("Training", "Lowest learning rate of the schedule.", 0.0, least=0)

    preset: str = option(
        "Layer-to-layer",
        "Options that go together: layer-to-layer training from random weights (l2l) or from pretrained ones "
        "(finetune). An option that is given itself wins.",
        "none",
        choices=tuple(PRESETS),
    )
    schedule: str = option(
        "Layer-to-layer",
        "Which partitions train when: all (standard), fewer at both ends (window), the student (grow), the teacher "
        "(settle; settle-far: as settle, but nearly everything; sooner in longer runs), the head alone and then a "
        "teacher behind a front that never trains (finetune).",
        "standard",
        choices=tuple(SCHEDULES),
        instead=NO_SCHEDULE,
    )
    settle_from: float | None = option(
        "Layer-to-layer",
        "Share of the run after which partitions begin to settle.",
        None,
        least=0,
        below=1,
    )
    settle_until: float | None = option(
        "Layer-to-layer", "Share of the run after which no more partitions settle.", None, above=0, below=1
    )
    settle_share: float | None = option(
        "Layer-to-layer", "Largest share of the multiply-adds that may settle.", None, least=0, below=1
    )
    shift: str = option(
        "Layer-to-layer",
        "With --schedule finetune: how the images differ from those of the pretraining. Where the input does (noise, "
        "another kind of camera) and images are many, the first layers may have to change: nothing settles then once "
        "the head has trained alone.",
        "none",
        choices=("none", "input"),
    )
    settle_front: float | None = option(
        "Layer-to-layer",
        "With --schedule finetune: share of the multiply-adds, at the front, that never trains.",
        None,
        least=0,
        most=1,
    )
    thaw_from: float | None = option(
        "Layer-to-layer",
        "Share of the run after which everything trains again, to its end.",
        None,
        above=0,
        below=1,
    )
    parts: int | None = option("Layer-to-layer", "Number of partitions.", None, least=1, most=MOST_PARTS)
    at: tuple[str, ...] = option(
        "Layer-to-layer", "Cut before these modules instead of into --parts, by dotted path.", ()
    )
    by: str = option(
        "Layer-to-layer",
        "Where --parts may cut: anywhere (op), where the blocks of the graph meet (natural), "
        "where the units meet that timm or Hugging Face names (block).",
        "op",
        choices=CUT_KINDS,
    )
    balance: str = option(
        "Layer-to-layer",
        "What is about equal in all --parts.",
        "macs",
        choices=BALANCES,
    )
    plan: str | None = option(
        "Layer-to-layer",
        "Take partitions and phases from a plan file, as inspect --save-plan writes it; --epochs stretches the phases.",
        None,
    )

    smoothing: float = option("Regularisation", "Label smoothing.", 0.0, least=0, below=1)
    soft_targets: float = option(
        "Regularisation",
        "Share of the loss that compares the output with the network's own earlier output for the image.",
        0.0,
        least=0,
        below=1,
    )
    soft_from: str = option(
        "Regularisation",
        "Which earlier output: that of the last step on the image, with a share that grows over the run (last), or "
        "that of the averaged weights in the middle of the run, used in its second half (mean).",
        "last",
        choices=("last", "mean"),
    )
    soft_temperature: float = option(
        "Regularisation", "Temperature at which the two outputs are compared.", 1.0, above=0
    )
    soft_fade: float = option(
        "Regularisation",
        "Last share of the run over which the share of --soft-targets falls to nothing.",
        0.0,
        least=0,
        most=1,
    )
    average: float = option(
        "Regularisation",
        "Average the weights of each partition over this last share of its training.",
        0.0,
        least=0,
        below=1,
    )
    model_ema: bool = option(
        "Regularisation",
        "Test and keep an exponential moving average of the weights, as timm does; partitions settle with theirs.",
        False,
    )
    model_ema_decay: float = option(
        "Regularisation", "What of the average is left after a step.", 0.9998, least=0, below=1
    )
    model_ema_warmup: bool = option("Regularisation", "Let that share grow from 0 at the beginning.", False)
    anneal: float = option(
        "Regularisation",
        "Share of the run over which the learning rate of each partition falls to zero before it stops training.",
        0.0,
        least=0,
        most=1,
    )
    recalibrate: bool = option("Regularisation", "Estimate BatchNorm statistics again before partitions settle.", False)
    veto: bool = option("Regularisation", "Let partitions whose weights still move settle later than planned.", False)
    guard: float = option(
        "Regularisation",
        "Share of the training images to hold out: if the accuracy on them falls by more than two standard errors when "
        "partitions settle, these train again.",
        0.0,
        least=0,
        below=1,
    )
    drop_path: float = option(
        "Regularisation",
        "Stochastic depth: the rate at which the last residual branch is left out in training, earlier ones less "
        "often; 0 keeps the model's own.",
        0.0,
        least=0,
        below=1,
    )
    exits: int = option(
        "Regularisation",
        "Auxiliary classifiers (pooling and a linear layer) at the ends of so many of the first partitions that train.",
        0,
        least=0,
    )
    exit_weight: float = option("Regularisation", "Weight of the loss of each of the --exits.", 0.3, least=0)

    amp: bool = option("Precision and speed", "Automatic mixed precision.", False)
    amp_dtype: str = option("Precision and speed", "Type used by --amp.", "bfloat16", choices=("bfloat16", "float16"))
    channels_last: bool = option("Precision and speed", "Keep images in channels-last order.", False)
    torchcompile: str | None = option("Precision and speed", "Compile each stage with this backend.", None)
    cuda_graphs: str = option(
        "Precision and speed",
        "Record training steps as CUDA graphs and replay them, which spares the time of launching their kernels: "
        "on, off, or auto, which is off as long as this is new.",
        "auto",
        choices=("auto", "on", "off"),
    )
    grad_accum_steps: int = option(
        "Precision and speed",
        "Divide each batch into this many micro-batches, or into more where the plan of a phase says so.",
        1,
        least=1,
    )

    settled_dtype: str = option(
        "Settled partitions",
        "Precision in which settled partitions run while others train: that of the others (same), or lower.",
        "same",
        choices=("same", "bfloat16", "float16"),
    )
    memory_budget: float | Literal["auto"] | None = option(
        "Memory",
        "Recompute activations in backward, or divide batches into micro-batches, where a phase would need more memory "
        "than this. Up to 1: a share of the activations of standard training; above 1: bytes of everything. auto: only "
        "where memory has run out, and the phase goes on from its last whole state then.",
        None,
        above=0,
    )
    memory_aim: float | None = option(
        "Memory",
        "Like --memory-budget, where that is not given; but a phase that cannot keep within it takes the least it can, "
        "and a GPU comes as near as 3 % of the run's time can bring it.",
        None,
        above=0,
    )
    cache: str = option(
        "Settled partitions",
        "Where to keep what the settled partitions compute for each image: device (memory of the GPU), ram, disk (a "
        "file in --output, gone after the run), auto (the first of these that has room, if reading takes less time "
        "than computing; beside a CPU disk).",
        "auto",
        choices=("off", "device", "ram", "disk", "auto"),
    )
    cache_limit: float | None = option(
        "Settled partitions", "GiB that the cache may take; half of what is free if not given.", None, above=0
    )
    cache_views: int | None = option(
        "Settled partitions",
        "With --augment: once partitions are settled, augment each image in this many ways, so that all can be kept.",
        None,
        least=1,
    )
    cache_dtype: str = option(
        "Settled partitions",
        "Type in which the cache keeps numbers; exact keeps them bit for bit.",
        "exact",
        choices=("exact", "float16", "bfloat16"),
    )

    parallel: str = option(
        "Several processes",
        "What each of several processes has: a part of every batch, with all of weights, gradients and optimizer (ddp) "
        "or its part of what trains (fsdp); or some of the partitions, through which micro-batches go "
        "(pipeline; their number is --grad-accum-steps); or both, in several pipelines (ddp,pipeline).",
        "ddp",
        choices=("ddp", "fsdp", PIPELINE, PIPELINES),
    )
    pipeline_processes: int = option(
        "Several processes",
        "With --parallel ddp,pipeline, the processes of each pipeline, which are neighbours.",
        2,
        least=2,
    )
    pipeline_schedule: str = option(
        "Several processes",
        "In a pipeline, in which order micro-batches run: all forward, then all backward (gpipe), backward "
        "as soon as can be (1f1b), or that with several groups of partitions for each process (interleaved).",
        "1f1b",
        choices=("gpipe", "1f1b", "interleaved"),
    )
    sync_bn: bool = option(
        "Several processes",
        "In training, BatchNorm takes its statistics from the images of all processes, as one process would.",
        False,
    )

    device: str = option("Run", "auto, cpu, cuda or cuda:N.", "auto", pattern=r"auto|cpu|cuda(:\d{1,3})?")
    seed: int = option("Run", "Seed of weights, order and augmentation.", 42, least=0, below=2**32)
    deterministic: bool = option(
        "Run", "Use only deterministic kernels, without cuDNN's search for the fastest and without TF32.", False
    )
    on_nan: str = option(
        "Run",
        "When the loss or the weights are not finite: stop, with the last good weights and the cause, or skip the step "
        "that is the cause. Skipping keeps a copy of the run's state in memory.",
        "stop",
        choices=("stop", "skip"),
    )
    prove: bool = option(
        "Run",
        "Before the first step, prove on the first batch that the partitions compute what the model computes.",
        True,
    )
    ensemble: bool = option(
        "Run",
        "Also test a snapshot ensemble: the mean of what the network says at the end of each phase.",
        False,
    )
    output: str = option(
        "Run", "Folder in which each run gets a folder of its own.", "output/train", flags=("--output-dir",)
    )
    experiment: str | None = option(
        "Run",
        "Name of the run's folder, instead of one made from the time.",
        None,
        # A name and no path: a recipe is not to say where else files are made.
        pattern=r"(?!\.{1,2}$)[^/\\\x00-\x1f]{1,100}",
        words="a name of up to 100 letters, without / and \\",
    )
    checkpoint_every: str = option(
        "Run",
        "N (epochs), Ns (steps) or off (only interruptions): when to save the run, for --resume.",
        "1",
        pattern=r"[1-9]\d{0,8}s?|off",
    )
    checkpoint_keep: int = option(
        "Run", "Keep this many of the newest checkpoints, and the one with the best test accuracy.", 2, least=1
    )
    log_interval: int = option("Run", "Steps between two progress reports.", 10, least=1)
    dry_run: bool = option("Run", "Plan, train one step, test one batch, and write nothing.", False)

    if not TYPE_CHECKING:  # type checkers see the constructor that dataclass makes, which takes the same arguments

        def __init__(self, **given: Any) -> None:
            """Fill the fields from what is `given`, then plan file, preset and defaults, and check them."""
            if unknown := [name for name in given if name not in _KINDS]:
                raise TypeError(f"RunSpec has no field {unknown[0]!r}{nearest(unknown[0], _KINDS)}")
            merged = DEFAULTS | _under(given)
            values, problems = _read_fields(merged)
            for name, value in (merged | values).items():
                object.__setattr__(self, name, value)
            if sentences := [*problems.values(), *_conflicts(self, wrong=problems.keys())]:
                raise UsageError(joined(sentences))

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        """List the keys of a recipe, hyphenated, in the order of the fields."""
        return tuple(key(item.name) for item in fields(cls))

    def to_flat(self) -> dict[str, Any]:
        """Return the recipe of this run: every key, with plain YAML values."""
        values = {key(item.name): getattr(self, item.name) for item in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def to_yaml(self) -> str:
        """Write the recipe as text. Reading it back gives an equal RunSpec."""
        return yaml.safe_dump(self.to_flat(), sort_keys=False)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read the values in a recipe file, by field name.

    Raises UsageError when the file cannot be read, is not a YAML mapping, or holds an unknown key or a wrong
    value.
    """
    recipe = read_yaml(path, "recipe")
    if not isinstance(recipe, dict):
        raise UsageError(f"the recipe {shown_path(path)} must be a mapping, with one 'key: value' a line")
    return read_values(recipe, source=f"the recipe {shown_path(path)}")


def read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Read the values in `FXSPLIT_*` variables, by field name.

    Raises UsageError when such a variable is unknown or has a wrong value.
    """
    given = {name: text for name, text in environ.items() if name.startswith(ENVIRONMENT_PREFIX)}
    known = {f"{ENVIRONMENT_PREFIX}{name.upper()}": name for name in _KINDS}
    if unknown := [name for name in given if name not in known]:
        raise UsageError(
            joined(
                [
                    f"the variable {printable(shortened(name, MOST_SHOWN))} is not known{nearest(name, known)}"
                    for name in unknown
                ]
            )
        )
    values = {known[name]: from_text(known[name], text) for name, text in given.items()}
    return read_values(values, source="the environment")


def from_text(name: str, text: str) -> object:
    """Convert text to the type of a field. Text that has no such meaning is returned, for the error to show."""
    kind = _KINDS[name].type
    if kind is bool:
        return {"1": True, "true": True, "0": False, "false": False}.get(text.lower(), text)
    if kind is int:
        try:
            return int(text)
        except ValueError:
            return text
    return text


def read_values(values: Mapping[Any, object], *, source: str = "") -> dict[str, Any]:
    """Read values by field name, from a mapping whose keys may have hyphens or underscores.

    Raises UsageError when a key is unknown or given twice, or when a value is wrong; its message begins with `source`,
    which says where the values come from.
    """
    named: dict[str, object] = {}
    sentences = []
    for given, value in values.items():
        name = given.replace("-", "_") if isinstance(given, str) else ""
        if name not in _KINDS:
            sentences.append(f"the key {shown(given)} is not known{nearest(key(name), RunSpec.keys())}")
        elif name in named:
            sentences.append(f"{key(name)} is given twice")
        else:
            named[name] = value
    read, problems = _read_fields(named)
    if sentences := [*sentences, *problems.values()]:
        raise UsageError(joined(sentences, f"{source}: " * bool(source)))
    return read


def resolve(*layers: Mapping[str, Any]) -> RunSpec:
    """Make a RunSpec from layers of values by field name, of which later ones win.

    A layer also drops values of earlier layers that its own make obsolete: `parts` drops `at`, and `at` drops `parts`;
    `plan` drops all that a plan file decides; `preset` drops `schedule`; `model_ema` drops `average`; and a schedule
    that settles nothing drops the fields that say when partitions settle.

    Raises UsageError as RunSpec does.
    """
    return RunSpec(**_layered(*layers))


def _layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for layer in layers:
        given = [name for name in WITHDRAWN if layer.get(name, DEFAULTS[name]) != DEFAULTS[name]]
        gone = [name for each in given for name in WITHDRAWN[each]]
        if layer.get("schedule", "settle") not in SETTLING:
            gone += MOMENTS
        merged = {name: value for name, value in merged.items() if name not in gone} | dict(layer)
    return merged


def _under(given: Mapping[str, Any]) -> dict[str, Any]:
    """Complete what is given with the options of the preset; preset and epochs may come from a plan file."""
    path = given.get("plan")
    of_file = {}
    if path and isinstance(path, str) and not {"preset", "epochs"} <= given.keys():
        of_file = read_options(path)
    known = {**DEFAULTS, **of_file, **given}
    name, epochs = known["preset"], known["epochs_total"] or known["epochs"]
    # A wrong preset or number of epochs is refused later, when the fields are read.
    of_preset = preset(name, epochs) if name in list(PRESETS) and isinstance(epochs, int) else {}
    options = {name: value for name, value in given.items() if name != "preset"}
    return of_file | _layered(of_preset, options) | dict(given)


def beside_plan(names: Collection[str]) -> str:
    """Write the error about fields that may not be given beside a plan file."""
    keys = ", ".join(map(key, names))
    return f"the plan file says itself where to cut and what trains when, so leave out {keys}, or the plan"


def _conflicts(spec: RunSpec, *, wrong: Collection[str]) -> Iterator[str]:
    """Give a sentence about each contradiction between fields, apart from fields that are `wrong` by themselves."""
    yield from (
        f"{key(name)} is {shown(path)}, but there is no such user"
        for name in HOMES
        if name not in wrong and (path := getattr(spec, name)) is not None and not has_home(path)
    )
    if spec.parts is not None and spec.at and not {"parts", "at"} & set(wrong):
        yield f"parts is {spec.parts} and at is {shown(','.join(spec.at))}, but only one can say where to cut"
    doubled = [name for name in PLANNED if getattr(spec, name) != DEFAULTS[name] and name not in wrong]
    if doubled and spec.plan is not None and "plan" not in wrong:
        yield beside_plan(doubled)
    unheeded = [key(name) for name in MOMENTS if getattr(spec, name) is not None and name not in wrong]
    if unheeded and spec.plan is None and spec.schedule not in SETTLING and "schedule" not in wrong:
        yield (
            f"{', '.join(unheeded)} can be given only where partitions settle, and the schedule is {spec.schedule!r}; "
            "use --schedule settle or --l2l"
        )
    if spec.shift != "none" and spec.plan is None and spec.schedule != "finetune" and "schedule" not in wrong:
        yield f"shift is {spec.shift!r}, but the schedule is {spec.schedule!r}; only --schedule finetune asks for it"
    if (
        spec.settle_front is not None
        and spec.plan is None
        and spec.schedule in SETTLING
        and spec.schedule != "finetune"
    ):
        yield f"settle-front is given, but the schedule is {spec.schedule!r}; only --schedule finetune leaves one out"
    if not {"batch_size", "grad_accum_steps"} & set(wrong) and spec.batch_size % spec.grad_accum_steps:
        yield f"grad-accum-steps is {spec.grad_accum_steps}, but must divide batch-size {spec.batch_size}"
    if spec.parallel == "fsdp" and "parallel" not in wrong:
        if spec.torchcompile is not None and "torchcompile" not in wrong:
            yield (
                f"parallel is 'fsdp' and torchcompile is {spec.torchcompile!r}, but compiled stages cannot wait for "
                "the weights of other processes; leave out one of them"
            )
        if spec.amp and spec.amp_dtype == "float16" and not {"amp", "amp_dtype"} & set(wrong):
            yield (
                "parallel is 'fsdp' and amp-dtype is 'float16', where each process would scale the loss by itself; "
                "take bfloat16"
            )
    if spec.parallel in PIPELINED and "parallel" not in wrong:
        yield from _pipeline_conflicts(spec, wrong=wrong)
    if spec.sync_bn and spec.torchcompile is not None and "torchcompile" not in wrong:
        yield (
            f"sync-bn is true and torchcompile is {spec.torchcompile!r}, but compiled stages cannot wait for other "
            "processes; leave out one of them"
        )
    if spec.veto and spec.anneal and "anneal" not in wrong:
        yield (
            f"anneal is {spec.anneal} and veto is true, but a partition that settles later than planned would stand "
            "still at a learning rate of 0; leave out one of them"
        )
    if spec.model_ema and spec.average and "average" not in wrong:
        yield f"average is {spec.average} and model-ema is true, but a partition ends with one mean; leave out one"
    yield from _augmentation_conflicts(spec, wrong=wrong)
    starts = {"pretrained", "initial_checkpoint"}
    if spec.pretrained and spec.initial_checkpoint is not None and not starts & set(wrong):
        yield "pretrained is true and initial-checkpoint is given, but a run starts from one of the two"
    if not {"mean", "std"} & set(wrong) and (len(spec.mean) != len(spec.std) or len(spec.mean) not in (0, 1, 3)):
        yield (
            f"mean has length {len(spec.mean)} and std has length {len(spec.std)}, "
            "but both must have 1, 3 or no numbers"
        )


def _pipeline_conflicts(spec: RunSpec, *, wrong: Collection[str]) -> Iterator[str]:
    reasons = {
        "exits": "exits lie behind partitions of other processes than the last, which computes the loss",
        "sync_bn": "each process sees all images of a micro-batch anyway"
        if spec.parallel == PIPELINE
        else "pipelines run their micro-batches at other times, and cannot wait for each other",
        "torchcompile": "compiled stages have not been tried in a pipeline",
    }
    for name, why in reasons.items():
        if getattr(spec, name) and name not in wrong:
            yield f"parallel is {spec.parallel!r}, which takes no {key(name)}: {why}; leave out one of them"
    if spec.amp and spec.amp_dtype == "float16" and not {"amp", "amp_dtype"} & set(wrong):
        yield (
            f"parallel is {spec.parallel!r} and amp-dtype is 'float16', whose loss scale would depend on the gradients "
            "of all processes; take bfloat16"
        )


def _augmentation_conflicts(spec: RunSpec, *, wrong: Collection[str]) -> Iterator[str]:
    names = ("scale", "ratio", "train_interpolation")
    unheeded = [key(name) for name in names if getattr(spec, name) != DEFAULTS[name] and name not in wrong]
    if unheeded and spec.augment != "resized-crop" and "augment" not in wrong:
        yield f"{', '.join(unheeded)} can be given only with augment resized-crop, and augment is {spec.augment!r}"
    for name in ("scale", "ratio"):
        pair = getattr(spec, name)
        if name not in wrong and pair and (len(pair) != 2 or pair[0] > pair[1]):
            yield f"{name} is {','.join(map(str, pair))}, but must be two numbers, the smaller first"
    if {"augment", "hflip", "aa", "color_jitter", "reprob", "mixup", "cutmix", "cache_views"} & set(wrong):
        return
    alternates = spec.augment == "flip-alternate"
    if alternates and spec.hflip is not None:
        yield f"hflip is {spec.hflip} and augment is 'flip-alternate', which mirrors by turns; leave out one of them"
    if spec.aa is not None and spec.color_jitter:
        yield f"aa is {spec.aa!r} and color-jitter is {spec.color_jitter}, but only one can change colours"
    if alternates and spec.cache_views is not None and spec.cache_views % 2:
        yield f"cache-views is {spec.cache_views}, but must be even where images are mirrored by turns"
    changed = [name for name in ("hflip", "aa", "color_jitter", "reprob") if getattr(spec, name)]
    named = [name for name in ("augment",) if spec.augment not in ("none", "flip-alternate")]
    random, mixed = [*named, *changed], [name for name in ("mixup", "cutmix") if getattr(spec, name)]
    if spec.cache in ("device", "ram", "disk") and random and spec.cache_views is None:
        yield (
            f"cache is {spec.cache!r} and {key(random[0])} is {getattr(spec, random[0])!r}, but of images that are "
            "changed at random only a fixed number of views can be kept; give cache-views, or leave out the cache"
        )
    if mixed and (spec.cache in ("device", "ram", "disk") or spec.cache_views is not None):
        yield (
            f"{mixed[0]} is {getattr(spec, mixed[0])} and cache or cache-views are given, but rows are kept of single "
            f"images, and to mix them would not be to mix images; leave out {mixed[0]}, or the cache"
        )
    if mixed and spec.soft_targets and "soft_targets" not in wrong:
        yield (
            f"{mixed[0]} is {getattr(spec, mixed[0])} and soft-targets is {spec.soft_targets}, but earlier outputs for "
            "an image are no targets for its mix with another one; leave out one of them"
        )


def _read_fields(values: Mapping[str, object]) -> tuple[dict[str, Any], dict[str, str]]:
    """Read the values that suit their fields, and write a sentence, by name, about each that does not."""
    read: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for name, value in values.items():
        try:
            read[name] = read_value(name, value, _KINDS[name], _METADATA[name])
        except ValueError as error:
            problems[name] = str(error)
    return read, problems


_KINDS = {name: kind_of(hint) for name, hint in get_type_hints(RunSpec).items()}
_METADATA = {item.name: item.metadata for item in fields(RunSpec)}
DEFAULTS = {item.name: item.default for item in fields(RunSpec)}
