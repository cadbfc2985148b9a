"""The fields of RunSpec. The command line makes its options from them, so the text of a field is its documentation."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from fxsplit.options import option
from fxsplit.plan.partition import BALANCES, CUT_KINDS
from fxsplit.plan.schedule import NO_SCHEDULE, SCHEDULES
from fxsplit.presets import PRESETS

# Values of `parallel` with which processes have partitions: one pipeline, or several that take a part of each batch.
PIPELINE, PIPELINES = "pipeline", "ddp,pipeline"
PIPELINED = (PIPELINE, PIPELINES)

# Larger numbers are mistakes: of pixels in a side, of epochs, of which each is a line in the records, of partitions.
MOST_SIDE, MOST_EPOCHS, MOST_PARTS = 1 << 14, 10**6, 10_000
# With a larger alpha every share is a half.
MOST_ALPHA = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """All that a run can be asked for. Every field is also a key of a recipe and an option of `fxsplit train`."""

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
        "With --schedule finetune: share of the multiply-adds, at the front, that trains after --thaw-from or never.",
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
    settled_offload: bool = option(
        "Settled partitions",
        "Keep the weights of settled partitions in memory of the host, and copy those of each to the device while it "
        "runs; what is read from a cache needs none.",
        False,
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
        "Run", "Folder in which each run gets a folder of its own.", "output/train", flags=("-o", "--output-dir")
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


DEFAULTS = {item.name: item.default for item in fields(Fields)}
