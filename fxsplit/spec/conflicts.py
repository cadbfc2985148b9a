"""What contradicts in what a run is asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from fxsplit.errors import shown
from fxsplit.options import key
from fxsplit.paths import has_home
from fxsplit.plan.schedule import SETTLING
from fxsplit.spec.fields import DEFAULTS, PIPELINE, PIPELINED, PIPELINES, Fields

# Fields that may begin with the home folder.
HOMES = ("model", "initial_checkpoint", "data", "data_dir", "output")
# Fields that say when partitions settle.
MOMENTS = ("settle_from", "settle_until", "settle_share", "thaw_from")
# Fields that only fine-tuning has.
FINETUNING = ("settle_front", "shift")
# Fields that may not be given beside a plan file, because the file decides them.
PLANNED = ("schedule", "parts", "at", "by", "balance", "epochs_total", *MOMENTS, *FINETUNING)
# A field, those of its values that heed other fields, and these.
HEEDED = (
    ("schedule", SETTLING, MOMENTS),
    ("schedule", ("finetune",), FINETUNING),
    ("parallel", PIPELINED, ("pipeline_schedule",)),
    ("parallel", (PIPELINES,), ("pipeline_processes",)),
    ("augment", ("resized-crop",), ("scale", "ratio", "train_interpolation")),
)


def beside_plan(names: Collection[str]) -> str:
    """Write the error about fields that may not be given beside a plan file."""
    keys = ", ".join(map(key, names))
    return f"the plan file says itself where to cut and what trains when, so leave out {keys}, or the plan"


def conflicts(spec: Fields, *, wrong: Collection[str]) -> Iterator[str]:
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
    for name, values, others in HEEDED:
        unheeded = [key(each) for each in others if getattr(spec, each) != DEFAULTS[each] and each not in wrong]
        chosen = getattr(spec, name)
        if unheeded and chosen not in values and name not in wrong and (spec.plan is None or name not in PLANNED):
            yield (
                f"{', '.join(unheeded)} can be given only with {key(name)} {' or '.join(values)}, and {key(name)} is "
                f"{chosen!r}"
            )
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
    if spec.settled_offload and spec.torchcompile is not None and "torchcompile" not in wrong:
        yield (
            f"settled-offload is true and torchcompile is {spec.torchcompile!r}, but compiled stages keep the weights "
            "that they have; leave out one of them"
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


def _pipeline_conflicts(spec: Fields, *, wrong: Collection[str]) -> Iterator[str]:
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


def _augmentation_conflicts(spec: Fields, *, wrong: Collection[str]) -> Iterator[str]:
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
