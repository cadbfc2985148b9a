"""One step of the plain model against one of the executor: the same numbers in, the same numbers out, or an error.

    model     ──► output, loss, gradients, buffers, random state ┐
                                                                 ├── equal bit for bit, then all is put back
    executor  ──► output, loss, gradients, buffers, random state ┘

The two share their modules, so the model runs first and is put back before the executor runs. Only if they differ, more
runs follow: of the model once more, since kernels of a GPU may add up in another order each time, and then of both with
ears on every module, to say where the difference begins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from fxsplit.errors import ProofError, UsageError
from fxsplit.execute.executor import Executor
from fxsplit.execute.pointwise import held_to_convolutions
from fxsplit.objects.structure import map_tensors, tensors_in
from fxsplit.proving.equality import Difference, Outcome, Step, bytes_of, differences, leaves, loss_of, outcome
from fxsplit.proving.untouched import untouched

# Further runs of the plain model, at most, until what it varies by itself covers a difference.
REPEATS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What was compared, and how long it took.

    `compared` counts the values. `varying` are those in which two runs of the plain model differ by themselves, with by
    how much: no more was allowed to the executor. All others are equal bit for bit.
    """

    compared: int
    seconds: float
    varying: Mapping[str, float] = field(default_factory=dict)


def prove(model: nn.Module, net: Executor, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Proof:
    """Run `model` and the executor `net` of it once on `args`, forward and backward, and compare all that they leave.

    That is the output with its structure and types, which parameters get gradients, the gradients, buffers, and the
    random state of torch, Python and numpy. Each begins from the same random state, in the mode in which `net` is;
    in the end everything is as it was. The backward is that of a weighted sum of the outputs.

    Raises ProofError when they differ, and UsageError when `net` is in a phase, or there are no numbers to run on.
    """
    given = kwargs or {}
    tensors = (*tensors_in((args, given)), *model.parameters(), *model.buffers())
    if any(tensor.is_meta for tensor in tensors):
        raise UsageError("there is nothing to prove on the meta device, where tensors have no numbers")

    def step(module: nn.Module) -> Iterator[tuple[str, Any]]:
        # The model may write into them.
        own_args, own_kwargs = map_tensors(_copied, (tuple(args), dict(given)))
        output = module(*own_args, **own_kwargs)
        yield "output", output
        own_tensors = tensors_in((own_args, own_kwargs))
        yield "input", own_tensors
        if torch.is_grad_enabled() and (loss := loss_of(output)) is not None:
            yield "loss", loss
            loss.backward()  # type: ignore[no-untyped-call]
            yield "gradient of the input", [tensor.grad for tensor in own_tensors]

    return prove_step(model, net, step)


def prove_step(model: nn.Module, net: Executor, step: Step) -> Proof:
    """The same for any step, such as one of a training loop. See `prove`."""
    if net.window != (0, len(net.partitions)):
        raise UsageError(
            "the executor is in a phase, in which settled partitions are folded and equal within rounding alone; "
            "prove it before it enters one, or after `release()`"
        )
    began = perf_counter()

    def run(module: nn.Module) -> Outcome:
        with untouched(model, net), held_to_convolutions():
            return outcome(module, step)

    expected, found = run(model), run(net)
    wrong = differences(expected, found)
    varying: dict[str, float] = {}
    for _ in range(REPEATS if wrong else 0):
        spread = {each.name: each.size for each in differences(expected, run(model))}
        if not spread:
            break
        varying = {name: max(varying.get(name, 0.0), spread.get(name, 0.0)) for name in {**varying, **spread}}
        wrong = [each for each in wrong if not _covers(varying, each)]
        if not wrong:
            break
    if wrong:
        raise ProofError(_sentence(wrong, _place(model, net, run, wrong)))
    return Proof(compared=len(expected), seconds=perf_counter() - began, varying=varying)


def prove_batch(
    model: nn.Module,
    net: Executor,
    images: Tensor,
    labels: Tensor,
    *,
    parts: int,
    loss: Callable[[Any, Tensor], Tensor],
    autocast: Callable[[], AbstractContextManager[Any]],
    notice: Callable[[str], None],
) -> Proof | None:
    """The same for a batch of training: images (N, ...) and labels (N,), in `parts` micro-batches, each in `autocast`.

    `loss` is that of an output and its labels. Where memory does not hold it, half of the images are taken, and half of
    these; a `notice` says so. None, if not even two of them can be proved.
    """
    count = len(images)
    while True:
        try:
            return prove_step(model, net, _step(images[:count], labels[:count], parts, loss, autocast))
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
        # Only here, where the error no longer holds all that it went by.
        if images.is_cuda:
            torch.cuda.empty_cache()
        if count < 4:
            notice("memory does not hold the proof of the first batch, not even of two images: it is left out")
            return None
        count = -(-count // 2)
        notice(f"memory does not hold the proof of the first batch: {count} of its {len(images)} images are taken")


def _step(
    images: Tensor,
    labels: Tensor,
    parts: int,
    loss: Callable[[Any, Tensor], Tensor],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Step:
    def step(module: nn.Module) -> Iterator[tuple[str, Any]]:
        pairs = list(zip(images.chunk(parts), labels.chunk(parts), strict=True))
        for number, (part, own_labels) in enumerate(pairs, start=1):
            which = f" of micro-batch {number}" if len(pairs) > 1 else ""
            with autocast():
                # The model may write into them.
                output = module(part.clone())
                mean = loss(output, own_labels)
            yield f"output{which}", output
            yield f"loss{which}", mean
            if mean.requires_grad:
                (mean * (len(own_labels) / len(labels))).backward()  # type: ignore[no-untyped-call]

    return step


def _is_out_of_memory(error: Exception) -> bool:
    """Of a GPU, of Python, or of torch on the CPU, which has no class of its own for it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _covers(varying: Mapping[str, float], difference: Difference) -> bool:
    """Whether it is no more than by what runs of the model itself were seen to lie on either side of the first."""
    return difference.name in varying and difference.size <= 2 * varying[difference.name]


def _sentence(wrong: Sequence[Difference], place: str) -> str:
    shown = ", ".join(map(str, wrong[:3])) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    where = f", which begins {place}" if place else ""
    return (
        f"the partitions do not compute what the model computes, on the same batch: {shown} differ{where}; keep a "
        "module around it whole, by its path in fxsplit.trace(..., leaves=[PATH]), or go on without this proof, by "
        "--no-prove"
    )


# A call of a module: its path, the how-many-th of that path, and digests of what went in and came out.
Call = tuple[str, int]
Heard = dict[Call, tuple[bytes, bytes]]


def _place(model: nn.Module, net: Executor, run: Callable[[nn.Module], Outcome], wrong: Sequence[Difference]) -> str:
    """Where the first difference appears: in or before a module of forward, else in a module's backward or buffers."""
    once, again, theirs = (_heard(model, partial(run, each)) for each in (model, model, net))
    last = ""
    for call, (given, made) in theirs.items():
        # What varies by itself says nothing.
        if call not in once or once[call] != again.get(call):
            continue
        if once[call][1] != made:
            path = call[0]
            return f"in module {path!r}" if once[call][0] == given else f"before module {path!r}{last}"
        last = f", after {call[0]!r}"
    owners = [each.name.split(" ")[-1].rpartition(".")[0] for each in wrong if each.name.startswith("gradient of ")]
    order = {path: index for index, (path, _) in enumerate(once)}
    if owners:
        # Backward comes from the end.
        return f"in the backward of {max(owners, key=lambda path: order.get(path, -1))!r}, or of what follows it"
    owners = [each.name.split(" ")[-1].rpartition(".")[0] for each in wrong if each.name.startswith("buffer ")]
    return f"in the buffers of {owners[0]!r}" if owners else ""


def _heard(model: nn.Module, run: Callable[[], object]) -> Heard:
    """What each module is given and gives in a run, in the order in which they end."""
    paths = {module: path for path, module in model.named_modules() if path}
    calls: Heard = {}
    counts: Counter[str] = Counter()

    def hear(module: nn.Module, given: Any, made: Any) -> None:
        if (path := paths.get(module)) is not None:
            calls[path, counts[path]] = _digest(given), _digest(made)
            counts[path] += 1

    # Of all modules, so that none has a hook of its own, which it would be noticed by.
    handle = register_module_forward_hook(hear)
    try:
        run()
    finally:
        handle.remove()
    return calls


def _digest(value: Any) -> bytes:
    digest = blake2b()
    for name, leaf in leaves(value, "", copied=False).items():
        if isinstance(leaf.value, Tensor):
            digest.update(f"{name} {leaf.value.dtype} {tuple(leaf.value.shape)}".encode())
            digest.update(bytes_of(leaf.value).cpu().numpy().tobytes())
    return digest.digest()
