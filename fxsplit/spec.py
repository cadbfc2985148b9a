"""Everything a run is asked to do, as plain values, and the strict reading of it.

Order of precedence: defaults < recipe file < `FXSPLIT_*` environment < command line. The field `batch_size`
is the key `batch-size` of a recipe, the variable `FXSPLIT_BATCH_SIZE` and the option `--batch-size`; the
options of the command line are made from the fields below, so a field's metadata is its documentation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml

from fxsplit.errors import UsageError, nearest

ENVIRONMENT_PREFIX = "FXSPLIT_"

# What only these schedules heed.
SETTLING = ("settle_from", "settle_until", "settle_share")
SETTLING_SCHEDULES = ("settle", "l2l")
# What a plan file says itself.
PLANNED = ("schedule", "parts", "at", "by", "balance", "epochs", "epochs_total", *SETTLING)


def _option(
    group: str,
    text: str,
    default: Any,
    *,
    flags: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    pattern: str | None = None,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
    l2l: Any = None,
    long_l2l: tuple[int, Any] | None = None,
) -> Any:
    """A field of RunSpec. The help of one with a `pattern` lists what is allowed.

    The schedule l2l may have a default of its own, `l2l`, and another one from so many epochs on, `long_l2l`: the
    field is then None until RunSpec knows which.
    """
    own = ([] if l2l is None else [(1, l2l)]) + ([] if long_l2l is None else [long_l2l])
    metadata: dict[str, Any] = {"group": group, "help": text, "flags": flags, "choices": choices, "pattern": pattern}
    metadata |= {"least": least, "above": above, "below": below, "most": most, "default": default, "l2l": own}
    return field(default=None if own else default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """One training run. Every field is also a key of a recipe and an option of `fxsplit train`.

    Raises UsageError, which tells all that is wrong at once, when a value has another type than its field, is
    not one that the field allows, or contradicts another one.
    """

    model: str = _option(
        "Model",
        "timm:NAME, torchvision:NAME, hf:NAME, paper:NAME, file.py:FACTORY or pkg.module:FACTORY.",
        "",
        pattern=r"(?s).+",
    )
    pretrained: bool = _option("Model", "Load pretrained weights (downloaded).", False)
    stem: str = _option(
        "Model",
        "cifar, for small images: first convolution 3x3 at stride 1, no first pooling, patches of 4 pixels.",
        "original",
        choices=("original", "cifar"),
    )

    data: str = _option("Data", "digits, cifar10, cifar100, folder:PATH or synthetic.", "digits")
    data_dir: str = _option("Data", "Where downloaded data sets are kept.", "~/.cache/fxsplit/data")
    img_size: int | None = _option(
        "Data", "Side of the square images in pixels; the data's own if not given.", None, least=1
    )
    batch_size: int = _option("Data", "Images in one optimizer step.", 64, flags=("-b",), least=1)
    workers: int = _option("Data", "Processes that read images which do not fit in memory.", 2, flags=("-j",), least=0)
    train_limit: int | None = _option("Data", "Train on this many images, drawn with the seed.", None, least=1)
    train_batches_per_epoch: int | None = _option("Data", "Stop each epoch after this many steps.", None, least=1)
    augment: str = _option(
        "Data",
        "crop-flip: random crop with padding, and horizontal flip.",
        "none",
        choices=("none", "crop-flip"),
    )
    mean: tuple[float, ...] = _option("Data", "Channel means, subtracted after pixels / 255.", ())
    std: tuple[float, ...] = _option("Data", "Channel standard deviations, divided by.", (), above=0)

    epochs: int = _option("Training", "Epochs of the run; of each phase with --schedule window.", 10, least=1)
    epochs_total: int | None = _option(
        "Training", "Epochs of the whole run, shared out over the phases.", None, least=1
    )
    opt: str = _option("Training", "Optimizer, by timm's name.", "adamw")
    lr: float = _option("Training", "Learning rate.", 1e-3, above=0)
    momentum: float = _option("Training", "Momentum, for optimizers that have one.", 0.9, least=0, below=1)
    weight_decay: float = _option("Training", "Weight decay.", 0.0, flags=("--wd",), least=0)
    clip_grad: float | None = _option("Training", "Clip the gradient's norm to this.", None, above=0)
    sched: str = _option("Training", "Learning-rate schedule, by timm's name.", "constant")
    warmup_epochs: int = _option("Training", "Epochs of linear warm-up.", 0, least=0)
    decay_epochs: float | None = _option(
        "Training", "Epochs between decays with --sched step; a third of the run if not given.", None, above=0
    )
    decay_milestones: tuple[float, ...] = _option(
        "Training", "Epochs of the decays with --sched multistep.", (), above=0
    )
    decay_rate: float = _option(
        "Training", "What remains of the rate after a decay; power of --sched poly.", 0.1, above=0
    )
    min_lr: float = _option("Training", "Lowest learning rate of the schedule.", 0.0, least=0)

    schedule: str = _option(
        "Layer-to-layer",
        "Which partitions train when: all (standard), fewer at both ends (window), "
        "the student (grow), the teacher (settle, l2l).",
        "standard",
        choices=("standard", "window", "grow", "settle", "l2l"),
    )
    settle_from: float | None = _option(
        "Layer-to-layer",
        "Share of the run after which partitions begin to settle, with settle and l2l.",
        None,
        least=0,
        below=1,
    )
    settle_until: float | None = _option(
        "Layer-to-layer", "Share of the run after which no more partitions settle.", None, above=0, below=1
    )
    settle_share: float | None = _option(
        "Layer-to-layer", "Share of the multiply-adds that settles at most.", None, least=0, below=1
    )
    parts: int | None = _option("Layer-to-layer", "Number of partitions.", None, least=1)
    at: tuple[str, ...] = _option("Layer-to-layer", "Cut before these modules instead, by dotted path.", ())
    by: str = _option(
        "Layer-to-layer",
        "Where --parts may cut: anywhere (op), where the blocks of the graph meet (natural), "
        "where the units meet that timm or Hugging Face names (block).",
        "op",
        choices=("op", "natural", "block"),
        l2l="natural",
    )
    balance: str = _option(
        "Layer-to-layer",
        "What --parts makes equal.",
        "macs",
        choices=("macs", "params", "activations", "seconds"),
    )
    plan: str | None = _option(
        "Layer-to-layer", "Take partitions and phases from a plan file, as inspect --save-plan writes it.", None
    )

    smoothing: float = _option("Regularisation", "Label smoothing.", 0.0, least=0, below=1, l2l=0.1)
    soft_targets: float = _option(
        "Regularisation",
        "Share of the loss that compares with the network's own earlier output for the image.",
        0.0,
        least=0,
        below=1,
        # In 20 epochs they cost accuracy; in 60 the network knows all its images by the middle, and they give some.
        long_l2l=(40, 0.8),
    )
    soft_from: str = _option(
        "Regularisation",
        "Which output: when it last saw the image, with a share that grows till the end of the run (last), or in the "
        "second half of the run what the mean of its weights said in the middle (mean).",
        "last",
        choices=("last", "mean"),
        l2l="mean",
    )
    soft_temperature: float = _option("Regularisation", "Temperature of this comparison.", 1.0, above=0, l2l=2.0)
    average: float = _option(
        "Regularisation",
        "Each partition ends its training with the mean of its weights over this last share of its steps.",
        0.0,
        least=0,
        below=1,
        l2l=0.1,
        # In 10 epochs the weights still move fast, and a longer mean lags behind; in 20 it no longer does.
        long_l2l=(15, 0.25),
    )
    anneal: float = _option(
        "Regularisation",
        "Share of the run over which the learning rate of each partition falls to zero before it stops training.",
        0.0,
        least=0,
        most=1,
    )
    recalibrate: bool = _option(
        "Regularisation", "Take BatchNorm statistics anew before partitions settle.", False, l2l=True
    )
    veto: bool = _option("Regularisation", "Settle partitions later while their weights still move.", False)
    drop_path: float = _option(
        "Regularisation",
        "Stochastic depth: the rate at which the last residual branch is left out in training, earlier ones less "
        "often; 0 leaves it to the model.",
        0.0,
        least=0,
        below=1,
    )
    exits: int = _option(
        "Regularisation",
        "Auxiliary exits: pooling and a linear layer at the ends of this many of the first partitions that train.",
        0,
        least=0,
    )
    exit_weight: float = _option("Regularisation", "Weight of the loss of each exit.", 0.3, least=0)

    amp: bool = _option("Precision and speed", "Automatic mixed precision.", False)
    amp_dtype: str = _option("Precision and speed", "Type used by --amp.", "bfloat16", choices=("bfloat16", "float16"))
    channels_last: bool = _option("Precision and speed", "Keep images in channels-last order.", False)
    torchcompile: str | None = _option("Precision and speed", "Compile each stage with this backend.", None)
    grad_accum_steps: int = _option(
        "Precision and speed", "Split each batch into this many backward passes.", 1, least=1
    )

    settled_dtype: str = _option(
        "Settled partitions",
        "Precision in which they run while others train: that of the others (same), or lower.",
        "same",
        choices=("same", "bfloat16", "float16"),
    )
    memory_budget: float | None = _option(
        "Memory",
        "Let partitions recompute in backward, or take batches in parts, where a phase would need more memory than "
        "this: up to 1, of the activations of standard training; above 1, bytes of everything. Without it --l2l keeps "
        "within 0.6 where it can.",
        None,
        above=0,
    )
    cache: str = _option(
        "Settled partitions",
        "Keep what the settled partitions deliver for each image: ram, disk (a file in --output, gone after the run), "
        "auto (disk, if reading costs less than computing).",
        "auto",
        choices=("off", "ram", "disk", "auto"),
    )
    cache_limit: float | None = _option(
        "Settled partitions", "GiB that the cache may take; half of what is free if not given.", None, above=0
    )
    cache_views: int | None = _option(
        "Settled partitions",
        "With --augment: once partitions are settled, augment each image in this many ways and keep them all.",
        None,
        least=1,
    )
    cache_dtype: str = _option(
        "Settled partitions",
        "Type of the numbers kept; exact keeps them bit for bit.",
        "exact",
        choices=("exact", "float16", "bfloat16"),
    )

    device: str = _option("Run", "auto, cpu, cuda or cuda:N.", "auto", pattern=r"auto|cpu|cuda(:\d+)?")
    seed: int = _option("Run", "Seed of weights, order and augmentation.", 42, least=0, below=2**32)
    deterministic: bool = _option("Run", "Only deterministic kernels.", False)
    prove: bool = _option(
        "Run",
        "Hold the first batch through the partitions against the plain model before the first step.",
        True,
    )
    output: str = _option("Run", "Folder that gets one folder a run.", "output/train", flags=("--output-dir",))
    experiment: str | None = _option("Run", "Name of the run's folder, instead of one from the time.", None)
    log_interval: int = _option("Run", "Steps between two progress reports.", 10, least=1)
    dry_run: bool = _option("Run", "Plan, train one step, test one batch, write nothing.", False)

    def __post_init__(self) -> None:
        for item in fields(self):
            if getattr(self, item.name) is item.default is None:
                object.__setattr__(self, item.name, self._default(item))
        values, problems = _read_fields({item.name: getattr(self, item.name) for item in fields(self)})
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if sentences := [*problems.values(), *_conflicts(self, wrong=problems.keys())]:
            raise UsageError("; ".join(sentences))

    def _default(self, item: Field[Any]) -> Any:
        """What a field is in such a run, unless given."""
        default, epochs = item.metadata["default"], self.epochs_total or self.epochs
        if self.schedule != "l2l" or not isinstance(epochs, int):
            return default
        return [default, *(own for least, own in item.metadata["l2l"] if epochs >= least)][-1]

    def differing(self, group: str) -> dict[str, Any]:
        """The fields of a group that are not as in a run of the schedule `standard` without any option, by key."""
        return {
            _key(item.name): getattr(self, item.name)
            for item in fields(self)
            if item.metadata["group"] == group and getattr(self, item.name) != item.metadata["default"]
        }

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        """The keys of a recipe, hyphenated, in the order of the fields."""
        return tuple(_key(item.name) for item in fields(cls))

    def to_flat(self) -> dict[str, Any]:
        """The recipe of this run: every key, with plain YAML values."""
        values = {_key(item.name): getattr(self, item.name) for item in fields(self)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def to_yaml(self) -> str:
        """The recipe as text. Reading it back gives an equal RunSpec."""
        return yaml.safe_dump(self.to_flat(), sort_keys=False)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The values in a recipe file, by field name.

    Raises UsageError when the file cannot be read, is not a YAML mapping, or holds an unknown key or a wrong
    value.
    """
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"the recipe {str(path)!r} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" near line {mark.line + 1}" if mark else ""
        raise UsageError(f"the recipe {str(path)!r} is not valid YAML{where}") from error
    if not isinstance(recipe, dict):
        raise UsageError(f"the recipe {str(path)!r} must be a mapping, with one 'key: value' a line")
    return read_values(recipe, source=f"the recipe {str(path)!r}")


def read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The values in `FXSPLIT_*` variables, by field name.

    Raises UsageError when such a variable is unknown or has a wrong value.
    """
    given = {name: text for name, text in environ.items() if name.startswith(ENVIRONMENT_PREFIX)}
    known = {f"{ENVIRONMENT_PREFIX}{name.upper()}": name for name in _KINDS}
    if unknown := [name for name in given if name not in known]:
        sentences = (f"the variable {name} is not known{nearest(name, known)}" for name in unknown)
        raise UsageError("; ".join(sentences))
    values = {known[name]: from_text(known[name], text) for name, text in given.items()}
    return read_values(values, source="the environment")


def from_text(name: str, text: str) -> object:
    """What text means to a field; text that means nothing to it is left for the error to show."""
    kind, _ = _KINDS[name]
    if kind is bool:
        return {"1": True, "true": True, "0": False, "false": False}.get(text.lower(), text)
    if kind is int:
        try:
            return int(text)
        except ValueError:
            return text
    return text


def read_values(values: Mapping[Any, object], *, source: str = "") -> dict[str, Any]:
    """Values by field name, from a mapping whose keys may have hyphens or underscores.

    Raises UsageError, which begins with `source`, when a key is unknown or given twice, or when a value is
    wrong.
    """
    named: dict[str, object] = {}
    sentences = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in _KINDS:
            sentences.append(f"the key {str(key)!r} is not known{nearest(_key(name), RunSpec.keys())}")
        elif name in named:
            sentences.append(f"{_key(name)} is given twice")
        else:
            named[name] = value
    read, problems = _read_fields(named)
    if sentences := [*sentences, *problems.values()]:
        raise UsageError(f"{source}: " * bool(source) + "; ".join(sentences))
    return read


def resolve(*layers: Mapping[str, Any]) -> RunSpec:
    """One RunSpec from values by field name; a later layer wins over an earlier one.

    A layer that gives `parts` also withdraws an earlier layer's `at`, and the other way round; one that gives a
    `plan` withdraws all that earlier layers say about what the plan says itself, and one that gives a schedule that
    settles nothing, what they say about settling.

    Raises UsageError as RunSpec does.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for given, withdrawn in (("parts", ("at",)), ("at", ("parts",)), ("plan", PLANNED)):
            if layer.get(given):
                merged = {name: value for name, value in merged.items() if name not in withdrawn}
        if layer.get("schedule", "l2l") not in SETTLING_SCHEDULES:
            merged = {name: value for name, value in merged.items() if name not in SETTLING}
        merged.update(layer)
    return RunSpec(**merged)


def _key(name: str) -> str:
    return name.replace("_", "-")


def beside_plan(names: Collection[str]) -> str:
    """The sentence about fields that say what the plan file says itself."""
    keys = ", ".join(map(_key, names))
    return f"the plan file says itself where to cut and what trains when, so leave out {keys}, or the plan"


def _conflicts(spec: RunSpec, *, wrong: Collection[str]) -> Iterator[str]:
    """Fields that contradict each other; those that are `wrong` by themselves are left out."""
    if spec.parts is not None and spec.at and not {"parts", "at"} & set(wrong):
        yield f"parts is {spec.parts} and at is {','.join(spec.at)!r}, but only one can say where to cut"
    if spec.plan is not None and "plan" not in wrong:
        defaults = {item.name: spec._default(item) for item in fields(spec)}
        if given := [name for name in PLANNED if getattr(spec, name) != defaults[name] and name not in wrong]:
            yield beside_plan(given)
    unheeded = [_key(name) for name in SETTLING if getattr(spec, name) is not None and name not in wrong]
    if unheeded and spec.plan is None and spec.schedule not in SETTLING_SCHEDULES and "schedule" not in wrong:
        yield (
            f"{', '.join(unheeded)} can be given only where partitions settle, and the schedule is {spec.schedule!r}; "
            "use --schedule settle or --l2l"
        )
    if not {"batch_size", "grad_accum_steps"} & set(wrong) and spec.batch_size % spec.grad_accum_steps:
        yield f"grad-accum-steps is {spec.grad_accum_steps}, but must divide batch-size {spec.batch_size}"
    if spec.cache in ("ram", "disk") and spec.augment != "none" and spec.cache_views is None:
        yield (
            f"cache is {spec.cache!r} and augment is {spec.augment!r}, but images that are changed at random can be "
            "kept only in a number of views; give cache-views, or leave out the cache"
        )
    if not {"mean", "std"} & set(wrong) and (len(spec.mean) != len(spec.std) or len(spec.mean) not in (0, 1, 3)):
        yield (
            f"mean has length {len(spec.mean)} and std has length {len(spec.std)}, "
            "but both must have 1, 3 or no numbers"
        )


def _read_fields(values: Mapping[str, object]) -> tuple[dict[str, Any], dict[str, str]]:
    """Values that suit their fields, and by name a sentence about each that does not."""
    read: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for name, value in values.items():
        kind, optional = _KINDS[name]
        try:
            read[name] = None if value is None and optional else _READERS[kind][0](value)
            suits = read[name] is None or _is_allowed(name, read[name])
        except (TypeError, ValueError, OverflowError):
            suits = False
        if not suits:
            read.pop(name, None)
            hint = nearest(value, _METADATA[name]["choices"]) if isinstance(value, str) else ""
            problems[name] = f"{_key(name)} is {value!r}, but must be {_allowed(name)}{hint}"
    return read, problems


def _is_allowed(name: str, value: Any) -> bool:
    rule = _METADATA[name]
    numbers = value if isinstance(value, tuple) else (value,)
    return (
        (not rule["choices"] or value in rule["choices"])
        and (rule["pattern"] is None or re.fullmatch(rule["pattern"], value) is not None)
        and (rule["least"] is None or all(number >= rule["least"] for number in numbers))
        and (rule["above"] is None or all(number > rule["above"] for number in numbers))
        and (rule["below"] is None or all(number < rule["below"] for number in numbers))
        and (rule["most"] is None or all(number <= rule["most"] for number in numbers))
    )


def _allowed(name: str) -> str:
    rule = _METADATA[name]
    if rule["choices"]:
        return f"one of {', '.join(rule['choices'])}"
    if rule["pattern"] is not None:
        return str(rule["help"]).rstrip(".")
    words = (("least", "at least"), ("above", "above"), ("below", "below"), ("most", "at most"))
    limits = [f"{word} {rule[limit]}" for limit, word in words if rule[limit] is not None]
    return f"{_READERS[_KINDS[name][0]][1]} {' and '.join(limits)}".rstrip()


def _read_flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _read_whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError
    return value


def _read_number(value: object) -> float:
    """Text counts as a number because YAML reads 1e-3, without a point, as text."""
    if not isinstance(value, int | float | str) or isinstance(value, bool) or not math.isfinite(float(value)):
        raise TypeError
    return float(value)


def _read_text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError
    return value


def _read_path(value: object) -> str:
    """A number counts as a path because layers of an nn.Sequential are called 0, 1, 2."""
    return str(_read_whole(value)) if isinstance(value, int) else _read_text(value)


def _read_list(value: object, read_item: Callable[[object], Any]) -> tuple[Any, ...]:
    """A list, a single item, or text with commas."""
    if isinstance(value, str):
        value = [item.strip() for item in value.split(",") if item.strip()]
    return tuple(read_item(item) for item in (value if isinstance(value, list | tuple) else [value]))


_READERS: dict[Any, tuple[Callable[[object], Any], str]] = {
    bool: (_read_flag, "true or false"),
    int: (_read_whole, "a whole number"),
    float: (_read_number, "a number"),
    str: (_read_text, "text"),
    tuple[float, ...]: (lambda value: _read_list(value, _read_number), "numbers"),
    tuple[str, ...]: (lambda value: _read_list(value, _read_path), "module paths"),
}


def _kind(hint: Any) -> tuple[Any, bool]:
    """The type without None, and whether None is allowed."""
    members = get_args(hint)
    return (members[0], True) if NoneType in members else (hint, False)


_KINDS = {name: _kind(hint) for name, hint in get_type_hints(RunSpec).items()}
_METADATA = {item.name: item.metadata for item in fields(RunSpec)}
