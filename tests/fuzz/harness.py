"""One case, run: the executor and the reference side by side, and all that they leave behind compared."""

from __future__ import annotations

import builtins
import random
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fxsplit
from fxsplit import Executor, FxsplitError, Partition, Phase, Trace
from fxsplit.plan.cuts import cuts
from tests.fuzz.case import Case, Stretch
from tests.fuzz.draw import draw
from tests.fuzz.events import EVENTS
from tests.fuzz.frozen import Calls, Frozen
from tests.fuzz.source import build, names_of, source_of
from tests.fuzz.units import CHANNELS, CONTAINERS, SIZE, WIDTH

# What fxsplit may refuse, in words, rather than compute.
REFUSABLE = frozenset(
    {
        "block evaluation by hand",
        "block hook set",
        "counter",
        "forward replaced",
        "hook set",
        "input:object",
        "kind replaced",
        "module replaced",
        "norm momentum",
        "norm option",
        "numpy number",
        "output:object",
        "own container",
        "parametrization set",
        "python number",
        "random branch",
    }
)
UNTYING = ("state assigned", "module replaced", "new parameter", "parametrization set")
BY_HAND = ("evaluation by hand", "block evaluation by hand")
# Of the largest value, in double precision: norms in the weights before them, and what follows from that.
TOLERANCE = 1e-8
PATCHED = (
    (builtins, "isinstance"),
    *((torch, name) for name in ("zeros", "ones", "rand", "arange", "tensor", "no_grad", "enable_grad", "autocast")),
    *((nn.Module, name) for name in ("__call__", "__getattr__")),
    *((random, name) for name in ("random", "choice")),
    *((np.random, name) for name in ("rand", "random")),
)
ORIGINALS = tuple((owner, name, getattr(owner, name)) for owner, name in PATCHED)


class DifferenceError(Exception):
    """The executor left another thing behind than the reference."""


class VoidError(Exception):
    """The plain model itself does not run."""


class IncomparableError(Exception):
    """The plain model cannot be brought by hand into the state to compare with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of a case: "same", "refused", "incomparable", "failed" or "void", and why."""

    case: Case
    status: str
    why: str = ""
    detail: str = ""


def drawn(seed: int, features: frozenset[str]) -> Case:
    """The first case of the seed whose plain model runs; the others would tell nothing."""
    for attempt in range(100):
        case = draw(seed * 100 + attempt, features)
        if runs(case):
            return case
    raise ValueError(f"seed {seed} gives no case")


def runs(case: Case) -> bool:
    """Whether the plain model runs, in both modes, and its numbers stay small enough to compare."""
    with _quiet():
        try:
            names = names_of(case)
            model = build(case, names)
            for training in (True, False):
                _seed(case.seed)
                output = model.train(training)(_wrapped(case, names, _input(case, 0)))
                if not all(bool(each.isfinite().all()) for each in leaves(output)):
                    return False
                if training and (loss := loss_of(output)) is not None:
                    loss.backward()  # type: ignore[no-untyped-call]
        except Exception:
            return False
    return True


def run(case: Case) -> Result:
    """Run a case."""
    with _quiet():
        try:
            _Run(case).all()
        except VoidError as error:
            return Result(case=case, status="void", why=str(error))
        except IncomparableError as error:
            return Result(case=case, status="incomparable", why=str(error))
        except FxsplitError as error:
            # The older checkpoint gives gradients only where its input wants one.
            allowed = case.features & REFUSABLE or {"checkpoint", "input gradient"} <= case.features
            why = f"{type(error).__name__}: {error}"
            if allowed:
                return Result(case=case, status="refused", why=why)
            return Result(case=case, status="failed", why=f"refused without need: {why}", detail=traceback.format_exc())
        except DifferenceError as error:
            return Result(case=case, status="failed", why=str(error))
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return Result(case=case, status="failed", why=why, detail=traceback.format_exc())
        finally:
            left = [f"{owner.__name__}.{name}" for owner, name, real in ORIGINALS if getattr(owner, name) is not real]
            for owner, name, real in ORIGINALS:
                if getattr(owner, name) is not real:
                    setattr(owner, name, real)
        if left:
            return Result(case=case, status="failed", why=f"left patched: {', '.join(left)}")
    return Result(case=case, status="same")


@contextmanager
def _quiet() -> Iterator[None]:
    before = random.getstate(), np.random.get_state(), torch.get_num_threads(), torch.is_grad_enabled()
    torch.set_num_threads(1)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_num_threads(before[2])


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _input(case: Case, step: int, batch: int = 4) -> Tensor:
    shape = (batch, CHANNELS, SIZE, SIZE) if case.image else (batch, WIDTH)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(case.seed + step))
    return x.double() if "double" in case.options else x


def _wrapped(case: Case, names: Mapping[str, Any], x: Tensor) -> Any:
    return x if case.inputs == "tensor" else eval(CONTAINERS[case.inputs][0].format(x="x"), dict(names), {"x": x})


def leaves(value: Any) -> list[Tensor]:
    """The tensors in an output, whatever it is."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [leaf for each in value.values() for leaf in leaves(each)]
    if isinstance(value, tuple | list):
        return [leaf for each in value for leaf in leaves(each)]
    if is_dataclass(value):
        return [leaf for each in fields(value) for leaf in leaves(getattr(value, each.name))]
    return [leaf for each in vars(value).values() for leaf in leaves(each)] if hasattr(value, "__dict__") else []


def form(value: Any) -> Any:
    """An output without its numbers: which containers, how nested."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.requires_grad
    if isinstance(value, Mapping):
        return type(value), [(key, form(each)) for key, each in value.items()]
    if isinstance(value, tuple | list):
        return type(value), [form(each) for each in value]
    if hasattr(value, "__dict__"):
        return type(value), [(name, form(each)) for name, each in vars(value).items()]
    return value


def loss_of(output: Any) -> Tensor | None:
    """A number that depends on every element of the output, and on each one differently."""
    wanted = [leaf.double() for leaf in leaves(output) if leaf.requires_grad]
    if not wanted:
        return None
    weights = [torch.linspace(-1, 2, leaf.numel(), dtype=leaf.dtype).view_as(leaf) for leaf in wanted]
    return torch.stack([(leaf * weight).mean() for leaf, weight in zip(wanted, weights, strict=True)]).sum()


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a model holds."""
    held: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        held[f"weight {name}"] = parameter.detach().clone()
        held[f"wish for a gradient of {name}"] = parameter.requires_grad
    held |= {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, bool | int | float | str) and name != "training":
                held[f"attribute {path}.{name}"] = value
    return held


def modes_of(model: nn.Module) -> dict[str, Any]:
    """The flags of all modules in the model; the executor stands for the model itself."""
    return {f"mode of {path}": module.training for path, module in model.named_modules() if path}


def random_states() -> dict[str, Any]:
    return {
        "random state of torch": torch.get_rng_state(),
        "random state of Python": random.getstate(),
        "random state of numpy": np.random.get_state()[1].tolist(),  # type: ignore[union-attr, index]
    }


def compare(expected: Mapping[str, Any], found: Mapping[str, Any], where: str, *, exact: bool) -> None:
    """Raise DifferenceError, naming the first thing that differs."""
    for name in {**expected, **found}:
        if name not in expected or name not in found:
            raise DifferenceError(f"{name} is {'missing' if name in expected else 'there'} {where}")
        if fault := difference(expected[name], found[name], exact=exact):
            raise DifferenceError(f"{name} differs {where}: {fault}")


def difference(expected: Any, found: Any, *, exact: bool) -> str:
    if isinstance(expected, Tensor) is not isinstance(found, Tensor):
        names = ["a tensor" if isinstance(each, Tensor) else repr(each) for each in (expected, found)]
        return " and ".join(names)
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        return "" if type(expected) is type(found) and expected == found else _short(f"{expected} and {found}")
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return f"{tuple(expected.shape)} {expected.dtype} and {tuple(found.shape)} {found.dtype}"
    if torch.equal(*(each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (expected, found))):
        return ""
    gap, scale = (expected.double() - found.double()).abs().max().item(), 1 + expected.double().abs().max().item()
    if not exact and expected.is_floating_point() and gap <= TOLERANCE * scale:
        return ""
    return f"by {gap:.3g} of {scale:.3g}"


def _short(text: str) -> str:
    return text if len(text) < 300 else f"{text[:300]} ..."


class _Run:
    def __init__(self, case: Case) -> None:
        self.case = case
        self.names = names_of(case)
        self.model = build(case, self.names)

    def all(self) -> None:
        case = self.case
        # Not a copy: some models cannot be copied.
        plain = build(case, self.names)
        _seed(case.seed)
        before, randoms = state_of(self.model), random_states()
        trace = fxsplit.trace(self.model, (_wrapped(case, self.names, _input(case, 0)),))
        compare(before, state_of(self.model), "after tracing", exact=True)
        compare(randoms, random_states(), "after tracing", exact=True)
        self.trace = trace
        self.partitions = divide(trace, case.cuts)
        self.calls = Calls(trace, self.partitions)
        self.net = Executor(trace, self.partitions)
        self.frozen = Frozen(plain, self.calls, self.partitions)
        self.optimizers = [torch.optim.SGD(each.parameters(), lr=0.05, momentum=0.9) for each in (self.net, plain)]
        self.phase = Phase(start=0, stop=len(self.partitions), epochs=1)
        step = 0
        for stretch in case.stretches:
            self._enter(stretch)
            for _ in range(stretch.steps):
                self._step(step)
                step += 1
            if "evaluation between" in case.options:
                self._evaluate(step)
        if "release" in case.options:
            self.net.release()
            self.frozen.enter(Phase(start=0, stop=len(self.partitions), epochs=1))
            self.phase = Phase(start=0, stop=len(self.partitions), epochs=1)
            self._compare_state("after the release", exact=True)
            if "modes" in case.options:
                compare(modes_of(self.frozen.model), modes_of(self.model), "after the release", exact=True)
        self._evaluate(step)

    @property
    def exact(self) -> bool:
        """Whether training folds nothing: neither a norm nor the layout of a convolution. Evaluation never does."""
        return self.phase.start == 0 or "double" not in self.case.options

    def _enter(self, stretch: Stretch) -> None:
        before = self.phase
        self.phase = phase_of(stretch, len(self.partitions), self.calls.apart())
        if self.phase.start and "use_reentrant=True" in source_of(self.case):
            raise IncomparableError("behind what is frozen the older checkpoint trains nothing, and partitions train")
        if self.calls.rest is not None and self.phase.role(self.calls.rest) != "training":
            raise IncomparableError("nobody can put half of a forward into evaluation by hand")
        mine, theirs = self.optimizers
        self.net.enter(self.phase, mine if "optimizer given" in self.case.options else None)
        self.frozen.enter(self.phase)
        if "optimizer given" in self.case.options:
            for held in list(theirs.state):
                if not held.requires_grad or (self.phase.fresh_optimizer and self.phase != before):
                    del theirs.state[held]

    def _step(self, step: int) -> None:
        events = [event for event in self.case.events if event.step == step]
        models = self.model, self.frozen.model
        for event in events:
            if event.kind not in BY_HAND:
                for model in models:
                    EVENTS[event.kind](model, Random(event.choice))
        if "tied" in self.case.features and any(event.kind in UNTYING for event in events):
            raise IncomparableError("parameters that are tied no longer have no partition to be frozen with")
        if any(event.kind in ("state assigned", "new parameter", "module replaced", "parametrization set")
               for event in events):  # fmt: skip
            self.optimizers = [torch.optim.SGD(each.parameters(), lr=0.05, momentum=0.9) for each in models]
            self.net.enter(self.phase)
            self.frozen.enter(self.phase)
        self.net.train()
        self.frozen.model.train()
        for event in events:
            if event.kind in BY_HAND:
                changed = []
                for model in models:
                    before = modes_of(model)
                    EVENTS[event.kind](model, Random(event.choice))
                    changed.append({path for path, mode in modes_of(model).items() if mode != before[path]})
                if changed[0] != changed[1]:
                    raise IncomparableError("what is held in evaluation shows no trace of an eval() by hand")
        where = f"in step {step} ({self._words()})"
        self._both(step, where, backward=True, exact=self.exact)
        for optimizer in self.optimizers:
            optimizer.step()
        self._compare_state(where, exact=self.exact)
        if not self.exact:
            self._align()

    def _words(self) -> str:
        phase = self.phase
        recompute = f", recomputes up to {phase.recompute}{' in segments' * phase.segmented}" * bool(phase.recompute)
        return f"training [{phase.start}, {phase.stop}) of {len(self.partitions)}{recompute}"

    def _evaluate(self, step: int) -> None:
        self.net.eval()
        self.frozen.model.eval()
        backward = "evaluation with gradients" in self.case.options
        batch = 3 if "other batch size" in self.case.options else 4
        where = f"in evaluation after step {step - 1} ({self._words()})"
        self._both(1000 + step, where, backward=backward, batch=batch, exact=True)
        self._compare_state(f"after evaluation ({self._words()})", exact=True)

    def _both(self, step: int, where: str, *, backward: bool, exact: bool, batch: int = 4) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none="kept gradients" not in self.case.options)
        try:
            with self.frozen.modes():
                expected = self._outcome(self.frozen.model, step, backward, batch)
        except Exception as error:
            raise VoidError(f"the plain model {where}: {type(error).__name__}: {error}") from error
        found = self._outcome(self.net, step, backward, batch)
        compare(expected, found, where, exact=exact)

    def _outcome(self, module: nn.Module, step: int, backward: bool, batch: int) -> dict[str, Any]:
        case = self.case
        _seed(case.seed + step)
        found: dict[str, Any] = {}
        for pass_ in range(2 if "two backwards" in case.options and backward else 1):
            x = _input(case, step + 100 * pass_, batch)
            if "input gradient" in case.options and backward:
                x.requires_grad_()
            around: Any = torch.autocast("cpu", torch.bfloat16) if "autocast around" in case.options else nullcontext()
            without: Callable[[], Any] = torch.inference_mode if "inference mode" in case.options else torch.no_grad
            with nullcontext() if backward else without():
                with around:
                    output = module(_wrapped(case, self.names, x))
                loss = loss_of(output) if backward else None
            found[f"form of output {pass_}"] = form(output)
            found |= {f"output {pass_}.{i}": leaf.detach().clone() for i, leaf in enumerate(leaves(output))}
            if loss is not None:
                found[f"loss {pass_}"] = loss.detach()
                loss.backward()  # type: ignore[no-untyped-call]
            found[f"gradient of the input {pass_}"] = x.grad
        for name, parameter in module.named_parameters():
            found[f"gradient of {name}"] = None if parameter.grad is None else parameter.grad.clone()
        return found | random_states()

    def _compare_state(self, where: str, *, exact: bool) -> None:
        compare(state_of(self.frozen.model), state_of(self.model), where, exact=exact)

    def _align(self) -> None:
        """Let the reference go on from the executor's own numbers, so that what follows is compared bit for bit."""
        with torch.no_grad():
            named = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
            twins = dict(self.frozen.model.named_parameters()) | dict(self.frozen.model.named_buffers())
            for name, tensor in named.items():
                twins[name].copy_(tensor)
            mine, theirs = self.optimizers
            for name, parameter in self.model.named_parameters():
                momentum = mine.state.get(parameter, {}).get("momentum_buffer")
                if momentum is not None and twins[name] in theirs.state:
                    theirs.state[twins[name]]["momentum_buffer"].copy_(momentum)


def divide(trace: Trace, places: tuple[float, ...]) -> tuple[Partition, ...]:
    """The partitions between the legal cuts at these places."""
    legal = [cut for cut in cuts(trace) if cut.refusal is None]
    if not legal or not places:
        return fxsplit.partition(trace, count=1)
    chosen = {legal[int(place * len(legal))].index for place in places}
    return fxsplit.partition(trace, at=[trace.train.ops[index].name for index in sorted(chosen)])


def phase_of(stretch: Stretch, count: int, apart: set[int]) -> Phase:
    """The phase of a stretch over `count` partitions, whose borders are none of the cuts in `apart`."""
    borders = [cut for cut in range(1, count) if cut not in apart]
    start, stop = 0, count
    if borders and stretch.role != "everything":
        first = borders[int(stretch.place * len(borders))]
        later = [*(cut for cut in borders if cut > first), count]
        if stretch.role == "frozen end":
            stop = first
        else:
            start = first
            stop = later[int(stretch.width * len(later))] if stretch.role == "window" else count
    recompute = 0
    if stretch.recompute is not None and stop - start > 1:
        recompute = start + 1 + int(stretch.recompute * (stop - start - 1))
    return Phase(
        start=start,
        stop=stop,
        epochs=1,
        recompute=recompute,
        segmented=bool(recompute) and stretch.segmented,
        fresh_optimizer=stretch.fresh_optimizer,
    )
