"""Faults put into fxsplit, one at a time: how many cases of the fuzz until each is found.

python -m tests.fuzz.mutations --count 500
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

from torch import fx

from fxsplit.capture import tracing
from fxsplit.execute import recompute, source
from fxsplit.execute.executor import Executor
from fxsplit.execute.freezing import Freezing
from fxsplit.execute.settled.prefix import Prefix
from fxsplit.objects.structure import map_tensors
from fxsplit.plan import cuts
from tests.fuzz.draw import SOUND
from tests.fuzz.harness import Result, drawn, run

Mutation = Callable[[], AbstractContextManager[Any]]


def stale_folds() -> AbstractContextManager[Any]:
    """What was folded once is not folded again for weights that were written past autograd."""
    forget = Prefix._forget
    return patch.object(Prefix, "_forget", lambda prefix: None if "_stamp" in vars(prefix) else forget(prefix))


def overwritten_boundaries() -> AbstractContextManager[Any]:
    """A cut is legal although a later op writes into what passes there."""
    return patch.object(cuts, "_overwritten", lambda *_: None)


def kept_gradients() -> AbstractContextManager[Any]:
    """A parameter that a phase freezes keeps its gradient, so that an optimizer moves it."""
    enter = Freezing.enter

    def mutated(freezing: Freezing, start: int, stop: int) -> None:
        before = [(parameter, parameter.grad) for parameter in freezing._model.parameters()]
        enter(freezing, start, stop)
        for parameter, gradient in before:
            parameter.grad = gradient

    return patch.object(Freezing, "enter", mutated)


def lost_contexts() -> AbstractContextManager[Any]:
    """Ops run outside of the contexts that forward opens."""
    return patch.object(source, "contexts_of", lambda _: ())


def moved_twice() -> AbstractContextManager[Any]:
    """A recomputation starts from what the first forward left behind."""
    return patch.object(recompute, "_put_back", lambda *_: nullcontext())


def lost_counters() -> AbstractContextManager[Any]:
    """An op that only counts is taken for dead."""
    alive = tracing._alive

    def mutated(recordings: Any, names: Any) -> dict[bool, list[fx.Node]]:
        def counts(node: fx.Node) -> bool:
            return node.op == "call_method" and node.target == "add_" and not node.users

        return {mode: [node for node in each if not counts(node)] for mode, each in alive(recordings, names).items()}

    return patch.object(tracing, "_alive", mutated)


def stopped_gradients() -> AbstractContextManager[Any]:
    """Settled partitions pass no gradient to an input that wants one."""
    settle = Executor.settle

    def mutated(executor: Executor, *args: Any, **kwargs: Any) -> Any:
        values = settle(executor, *args, **kwargs)
        return map_tensors(lambda tensor: tensor.detach(), values) if executor.window[0] else values

    return patch.object(Executor, "settle", mutated)


def forced_modes() -> AbstractContextManager[Any]:
    """What a phase trains is put into training, also what the user has put into evaluation."""
    refresh = Freezing.refresh

    def mutated(freezing: Freezing) -> bool:
        if freezing._model.training:
            frozen = set(map(id, freezing._frozen_list))
            for module in freezing._model.modules():
                module.training = module.training or id(module) not in frozen
        return refresh(freezing)

    return patch.object(Freezing, "refresh", mutated)


def unfrozen_modes() -> AbstractContextManager[Any]:
    """What a phase freezes stays in training."""
    return patch.object(Freezing, "_freeze", lambda *_: None)


MUTATIONS: Mapping[str, Mutation] = {
    mutation.__name__: mutation
    for mutation in (
        stale_folds, overwritten_boundaries, kept_gradients, lost_contexts, moved_twice, lost_counters,
        stopped_gradients, forced_modes, unfrozen_modes,
    )
}  # fmt: skip


# Faults that show themselves only where several things meet: cases are drawn of these alone.
NEEDED: Mapping[str, frozenset[str]] = {
    "stale_folds": frozenset({"settled", "window", "data written"}),
    "overwritten_boundaries": frozenset({"in place", "in-place activation", "add in place", "recompute"}),
}


def found(name: str, count: int) -> tuple[int, Result] | None:
    """The first of the seeds whose case fails with the fault and not without it, if there is one."""
    for seed in range(count):
        case = drawn(seed, NEEDED.get(name, frozenset(SOUND)))
        with MUTATIONS[name]():
            result = run(case)
        if result.status == "failed" and run(case).status != "failed":
            return seed, result
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each fault; exit code 1 where one is not found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500, help="seeds to try for each")
    parser.add_argument("names", nargs="*", help=f"of these: {', '.join(MUTATIONS)}")
    options = parser.parse_args(arguments)
    missing = 0
    for name in options.names or MUTATIONS:
        first = found(name, options.count)
        missing += first is None
        words = f"seed {first[0]}: {first[1].why[:100]}" if first else f"not found in {options.count} cases"
        print(f"{name}: {words}", flush=True)
    sys.exit(int(missing > 0))


if __name__ == "__main__":
    main()
