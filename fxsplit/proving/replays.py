"""Compares steps that are recorded and replayed with eager ones: the same results, bit for bit.

    eager       ──► losses, gradients, buffers, random state ┐
                                                             ├── equal bit for bit, then all is put back
    replayed    ──► losses, gradients, buffers, random state ┘

A number that was burnt into the recording, such as one that Python drew, shows as a difference from the second replay
on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fxsplit.cuda.recorder import Recorder
from fxsplit.cuda.replay import WARM_UP, Replayed
from fxsplit.data.batch import micro_batch_sizes
from fxsplit.execute.executor import Executor
from fxsplit.proving.equality import Difference, Outcome, outcome
from fxsplit.proving.first_batch import unexplained
from fxsplit.proving.untouched import untouched

REPLAYS = 2


def differing_replays(
    model: nn.Module,
    net: Executor,
    images: Tensor,
    labels: Tensor,
    *,
    micro_batches: int,
    batch_size: int,
    loss: Callable[[Any, Tensor], Tensor],
    autocast: Callable[[], AbstractContextManager[Any]],
    recorder: Recorder,
) -> list[Difference]:
    """Take a few training steps without an optimizer, eagerly and from a recording, and list what differs.

    At the end everything is as it was. Where a step cannot be recorded, nothing differs.

    Args:
        model: the plain model.
        net: its executor.
        images: (N, ...); each step has them in another order.
        labels: (N,).
        micro_batches: into how many a full batch, of `batch_size` images, is divided.
        loss: of an output and its labels.
        autocast: makes the context of each forward.
        recorder: of the device.
    """

    refusals: list[str] = []
    sizes = micro_batch_sizes(len(images), micro_batches, batch_size=batch_size)

    def run(*, replayed: bool) -> Outcome:
        own_images, own_labels = images.clone(), labels.clone()

        def step() -> list[Tensor]:
            net.zero_grad(set_to_none=True)
            losses = []
            for part, truth in zip(torch.split(own_images, sizes), torch.split(own_labels, sizes), strict=True):
                with autocast():
                    mean = loss(net(part.clone()), truth)  # the model may write into its input
                if mean.requires_grad:
                    mean.backward()  # type: ignore[no-untyped-call]
                losses.append(mean.detach())
            return losses

        def steps(_: nn.Module) -> Iterator[tuple[str, Any]]:
            call = Replayed(step, recorder, images.device, held=[model], refused=refusals.append) if replayed else step
            for number in range(WARM_UP + REPLAYS):
                own_images.copy_(images.roll(number, 0))
                own_labels.copy_(labels.roll(number, 0))
                yield f"loss of step {number + 1}", call()

        with untouched(model, net):
            return outcome(net, steps)

    wrong, _ = unexplained(run(replayed=False), run(replayed=True), lambda: run(replayed=False))
    return wrong
