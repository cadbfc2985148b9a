"""Compares one step of the plain model with one of the executor: the same results, bit for bit, or an error.

    model     ──► output, loss, gradients, buffers, random state ┐
                                                                 ├── equal bit for bit, then all is put back
    executor  ──► output, loss, gradients, buffers, random state ┘

The two share their modules, so the model runs first, and its state is restored before the executor runs. Only if they
differ do more runs follow: the model again, since kernels of a GPU may add up in another order each time, and then both
with a hook on every module, to find the first module whose output differs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from fxsplit.arguments import require, require_call
from fxsplit.data.batch import micro_batch_sizes
from fxsplit.errors import ProofError, UsageError
from fxsplit.execute.executor import Executor
from fxsplit.execute.pointwise import held_to_convolutions
from fxsplit.measuring.meter import is_out_of_memory
from fxsplit.objects.structure import map_tensors, tensors_in
from fxsplit.proving.checkpoints import looked_through
from fxsplit.proving.equality import Difference, Outcome, Step, bytes_of, differences, leaves, loss_of, outcome
from fxsplit.proving.untouched import untouched

# The plain model runs again at most so many times, until its own variation explains a difference.
REPEATS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """Says how many values were compared, how many seconds it took, and which values vary.

    `varying` has the values in which two runs of the plain model itself differ, each with the largest difference seen:
    the executor may differ by twice that, since its own run lies on either side. All others are equal bit for bit.
    """

    compared: int
    seconds: float
    varying: Mapping[str, float] = field(default_factory=dict)


def prove(model: nn.Module, net: Executor, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Proof:
    """Run a model and its executor once, forward and backward, and compare all that they leave behind.

    That is the output with its structure and types, which parameters get gradients, the gradients, buffers, and the
    random state of torch, Python and numpy. Both begin with the same random state, in the mode in which `net` is; at
    the end everything is as it was. The backward is that of a weighted sum of the outputs. The model's own gradient
    checkpoints are looked through, and a model that takes another way where autograd records is evaluated without it.

    Args:
        model: the plain model.
        net: its executor, before it enters a phase.
        args: the inputs of the call.
        kwargs: likewise.

    Raises ProofError when the two differ, and UsageError when `net` is in a phase, when tensors are on the meta device,
    and when an argument is of another type.
    """
    require("net", net, Executor, "an Executor", "make one by fxsplit.Executor(trace, partitions)")
    require_call(args, kwargs)
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

    with torch.no_grad() if net.evaluates_without_autograd and not net.training else nullcontext():
        return prove_step(model, net, step)


def prove_step(model: nn.Module, net: Executor, step: Step) -> Proof:
    """Compare any step, such as one of a training loop, of model and executor, as `prove` does for a call."""
    if net.window != (0, len(net.partitions)):
        raise UsageError(
            "the executor is in a phase, in which settled partitions are folded and equal within rounding alone; "
            "prove it before it enters one, or call its `release()` first"
        )
    began = perf_counter()

    def run(module: nn.Module) -> Outcome:
        with untouched(model, net), held_to_convolutions(), looked_through():
            return outcome(module, step)

    expected, found = run(model), run(net)
    wrong, varying = unexplained(expected, found, lambda: run(model))
    if wrong:
        raise ProofError(_sentence(wrong, _origin(model, net, run, wrong)))
    return Proof(compared=len(expected), seconds=perf_counter() - began, varying=varying)


def unexplained(
    expected: Outcome, found: Outcome, again: Callable[[], Outcome]
) -> tuple[list[Difference], dict[str, float]]:
    """List in what `found` differs by more than further runs differ from what was `expected`, and what these vary by.

    `again` makes such a run; it is called only where something differs.
    """
    wrong = differences(expected, found)
    varying: dict[str, float] = {}
    for _ in range(REPEATS if wrong else 0):
        spread = {each.name: each.size for each in differences(expected, again())}
        if not spread:
            break
        varying = {name: max(varying.get(name, 0.0), spread.get(name, 0.0)) for name in {**varying, **spread}}
        wrong = [each for each in wrong if not _covers(varying, each)]
        if not wrong:
            break
    return wrong, varying


def prove_batch(
    model: nn.Module,
    net: Executor,
    images: Tensor,
    labels: Tensor,
    *,
    micro_batches: int,
    batch_size: int,
    loss: Callable[[Any, Tensor], Tensor],
    autocast: Callable[[], AbstractContextManager[Any]],
    notice: Callable[[str], None],
) -> Proof | None:
    """Compare a training step of model and executor, as `prove` does for a call.

    Where memory does not hold it, half of the images are taken, then half of these. Returns None if it does not hold
    even two.

    Args:
        model: the plain model.
        net: its executor, before it enters a phase.
        images: (N, ...).
        labels: (N,).
        micro_batches: into how many a full batch, of `batch_size` images, is divided.
        loss: of an output and its labels.
        autocast: makes the context of each forward.
        notice: is called with a sentence when images are left out.

    Raises ProofError when the two differ, and UsageError when `net` is in a phase.
    """
    count = len(images)
    while True:
        try:
            sizes = micro_batch_sizes(count, micro_batches, batch_size=batch_size)
            return prove_step(model, net, _step(images[:count], labels[:count], sizes, loss, autocast))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Not inside `except`: there the traceback still holds the tensors of the failed step.
        if images.is_cuda:
            torch.cuda.empty_cache()
        if count <= 2:
            notice("memory does not hold the proof of the first batch, not even of two images: it is left out")
            return None
        count = -(-count // 2)
        notice(f"memory does not hold the proof of the first batch: {count} of its {len(images)} images are taken")


def _step(
    images: Tensor,
    labels: Tensor,
    sizes: list[int],
    loss: Callable[[Any, Tensor], Tensor],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Step:
    def step(module: nn.Module) -> Iterator[tuple[str, Any]]:
        pairs = list(zip(torch.split(images, sizes), torch.split(labels, sizes), strict=True))
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


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _covers(varying: Mapping[str, float], difference: Difference) -> bool:
    """Tell whether runs of the model itself vary enough to explain a difference.

    They were each compared with the first run. Two runs may lie on either side of it, hence the factor of 2.
    """
    return difference.name in varying and difference.size <= 2 * varying[difference.name]


def _sentence(wrong: Sequence[Difference], origin: str) -> str:
    shown = ", ".join(map(str, wrong[:3])) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    where = f", which begins {origin}" if origin else ""
    return (
        f"the partitions do not compute what the model computes, on the same batch: {shown} differ{where}; keep a "
        "module around it whole, by its path in fxsplit.trace(..., leaves=[PATH]), or train without this proof, by "
        "--no-prove or RunSpec(prove=False)"
    )


# A call of a module: its path, and how many calls of it came before.
Call = tuple[str, int]
# Digests of what went into each call and of what came out.
Calls = dict[Call, tuple[bytes, bytes]]


def _origin(model: nn.Module, net: Executor, run: Callable[[nn.Module], Outcome], wrong: Sequence[Difference]) -> str:
    """Say where the first difference appears: in or before a module in forward, else in its backward or its buffers."""
    plain, plain_again, executed = (_calls(model, partial(run, each)) for each in (model, model, net))
    last_equal = ""
    for call, (inputs, output) in executed.items():
        # A call that differs between two runs of the plain model says nothing about the executor.
        if call not in plain or plain[call] != plain_again.get(call):
            continue
        if plain[call][1] != output:
            path = call[0]
            return f"in module {path!r}" if plain[call][0] == inputs else f"before module {path!r}{last_equal}"
        last_equal = f", after {call[0]!r}"
    owners = [each.name.split(" ")[-1].rpartition(".")[0] for each in wrong if each.name.startswith("gradient of ")]
    order = {path: index for index, (path, _) in enumerate(plain)}
    if owners:
        # Backward runs from the end, so the last of these modules is the first to differ.
        return f"in the backward of {max(owners, key=lambda path: order.get(path, -1))!r}, or of what follows it"
    owners = [each.name.split(" ")[-1].rpartition(".")[0] for each in wrong if each.name.startswith("buffer ")]
    return f"in the buffers of {owners[0]!r}" if owners else ""


def _calls(model: nn.Module, run: Callable[[], object]) -> Calls:
    """Record the calls of all modules in a run, in the order in which they end."""
    paths = {module: path for path, module in model.named_modules() if path}
    calls: Calls = {}
    counts: Counter[str] = Counter()

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        if (path := paths.get(module)) is not None:
            calls[path, counts[path]] = _digest(inputs), _digest(output)
            counts[path] += 1

    # A global hook: where a module has a hook of its own, the executor runs other code.
    handle = register_module_forward_hook(record)
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
