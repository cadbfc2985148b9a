"""Partitions as a device map: which module goes to which device, for accelerate and Hugging Face models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from torch import nn

from fxsplit.arguments import listed
from fxsplit.capture.tracing import Trace
from fxsplit.errors import UsageError
from fxsplit.execute.ownership import first_names, ops_of, refuse_divided, users_of
from fxsplit.execute.stages import refuse_foreign
from fxsplit.graph import prefixes
from fxsplit.plan.partition import Partition


def device_map(
    trace: Trace, partitions: Sequence[Partition], devices: str | int | Sequence[str | int]
) -> dict[str, str | int]:
    """Say which device each module goes to, for `accelerate.dispatch_model` and Hugging Face's `device_map`.

    Partition `i` goes to `devices[i]`, such as `"cpu"` or `0` for the first GPU. What no op uses goes to the first
    device. Returns the device by path, of the shortest paths that lie on one device as a whole, `""` for the model
    itself. In a module that is divided, parameters and buffers have keys of their own; a module that has none and runs
    on several devices has no key.

    The model's own forward runs, so cut where no function takes values of two devices: between blocks.

    Raises UsageError when there is not one device a partition, PartitionError when the partitions are not those of the
    trace, or when a parameter or buffer is used on two devices.
    """
    devices = listed(devices)
    refuse_foreign(trace, partitions)
    if len(devices) != len(partitions):
        raise UsageError(f"there are {len(partitions)} partitions and {len(devices)} devices; give one device for each")
    first = first_names(trace.model)
    refuse_divided(trace, partitions, first.values(), devices)
    users = users_of(trace, partitions)
    homes = {name: devices[min(users[first[name]])] for name in first if users[first[name]]}
    found: dict[str, set[str | int]] = defaultdict(set)
    for path, device in (*homes.items(), *((op.path, devices[index]) for index, op, _ in ops_of(trace, partitions))):
        for prefix in prefixes(path):
            found[prefix].add(device)

    def keys_below(path: str, module: nn.Module) -> Iterator[tuple[str, str | int]]:
        held = [name for name in first if path in prefixes(name)]
        within = found.get(path, set(devices[:1]) if held else set())
        if len(within) == 1:
            yield path, next(iter(within))
            return
        yield from ((name, homes.get(name, devices[0])) for name in held if name.rpartition(".")[0] == path)
        for name, child in module._modules.items():
            if child is not None:
                yield from keys_below(f"{path}.{name}".removeprefix("."), child)

    return dict(keys_below("", trace.model))
