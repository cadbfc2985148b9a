"""What forwards are made of: each kind of unit writes a few statements, and the modules that they need.

All keep the shape of the value that they go on with: (N, 3, 4, 4) in the image part, (N, 6) in the flat one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from tests.fuzz.case import Unit

CHANNELS, SIZE, WIDTH, CLASSES = 3, 4, 6, 4

# Ops that only a statement which asks for `self.training` makes, and that tell where in the graph it is.
READS = ("dropout", "randn_like", "bernoulli_", "softmax", "erf", "batch_norm")


@dataclass
class Scope:
    """A class that is being written: its modules, the statements of its forward, and the values made so far."""

    name: str
    classes: list[Scope]
    image: bool
    made: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    values: list[str] = field(default_factory=lambda: ["x"])
    layers: list[str] = field(default_factory=list)
    weighted: list[str] = field(default_factory=list)
    depth: int = 0
    reads_mode: bool = False
    decorators: list[str] = field(default_factory=list)
    argument: str = "x"
    result: str = "{x}"

    @property
    def x(self) -> str:
        """The value that the next unit goes on with."""
        return self.values[-1]

    @property
    def shape(self) -> str:
        """Of one sample's value, with ones where a parameter broadcasts."""
        return f"(1, {CHANNELS}, 1, 1)" if self.image else f"(1, {WIDTH})"

    @property
    def width(self) -> int:
        return CHANNELS if self.image else WIDTH

    def put(self, expression: str) -> None:
        """Go on with the value of an expression."""
        name = f"x{len(self.lines)}"
        self.line(f"{name} = {expression}")
        self.values.append(name)

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def hold(self, expression: str, *, layer: bool = False, weighted: bool = False) -> str:
        """Keep a module, parameter or buffer; its name in forward."""
        name = f"m{len(self.made)}"
        self.made.append(f"self.{name} = {expression}")
        if layer:
            self.layers.append(name)
        if weighted:
            self.weighted.append(name)
        return f"self.{name}"

    def inner(self, units: Sequence[Unit]) -> Scope:
        """A new class with these units in its forward."""
        scope = Scope(f"Block{len(self.classes)}", self.classes, self.image)
        self.classes.append(scope)
        scope.write(units)
        return scope

    def write(self, units: Sequence[Unit]) -> None:
        """Write units one after the other."""
        for unit in units:
            if unit.kind in READING and self.reads_mode:
                # One class asks for the mode in one place, so that the reference knows whose mode is meant.
                self.put(f"{self.hold(self.inner([unit]).name + '()')}({self.x})")
            else:
                self.reads_mode |= unit.kind in READING
                UNITS[unit.kind](self, unit, Random(unit.choice))

    def source(self) -> str:
        """The class as text."""
        body = [f"class {self.name}(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        body += [f"        {line}" for line in self.made]
        body += [f"    {line}" for line in self.methods]
        body += [f"    {line}" for line in self.decorators]
        body += [f"    def forward(self, {self.argument}):"]
        body += [f"        {line}" for line in self.lines]
        body += [f"        return {self.result.format(x=self.x)}"]
        return "\n".join(body)


Write = Callable[[Scope, Unit, Random], None]


def layer(*choices: str) -> Write:
    """One of torch's modules."""

    def write(scope: Scope, unit: Unit, dice: Random) -> None:
        text = dice.choice(choices).format(width=scope.width)
        scope.put(f"{scope.hold(text, layer=True)}({scope.x})")

    return write


def affine(scope: Scope, unit: Unit, dice: Random) -> None:
    """A convolution or a linear layer."""
    width = scope.width
    images = [
        f"nn.Conv2d({width}, {width}, 3, padding=1)",
        f"nn.Conv2d({width}, {width}, 1, bias=False)",
        f"nn.Conv2d({width}, {width}, 3, padding=1, groups={width}, bias=False)",
    ]
    texts = images if scope.image else [f"nn.Linear({width}, {width})", f"nn.Linear({width}, {width}, bias=False)"]
    scope.put(f"{scope.hold(dice.choice(texts), layer=True, weighted=True)}({scope.x})")


def norm(scope: Scope, unit: Unit, dice: Random) -> None:
    """BatchNorm, the usual one or with a mean over all batches."""
    kind = "BatchNorm2d" if scope.image else "BatchNorm1d"
    option = dice.choice(["", "", ", momentum=None", ", affine=False", ", track_running_stats=False"])
    scope.put(f"{scope.hold(f'nn.{kind}({scope.width}{option})', layer=True)}({scope.x})")


def sample_norm(scope: Scope, unit: Unit, dice: Random) -> None:
    text = f"nn.GroupNorm(1, {scope.width})" if scope.image or dice.random() < 0.3 else f"nn.LayerNorm({scope.width})"
    scope.put(f"{scope.hold(text, layer=True)}({scope.x})")


def statement(*choices: str) -> Write:
    """An expression of the value `x`."""

    def write(scope: Scope, unit: Unit, dice: Random) -> None:
        scope.put(dice.choice(choices).format(x=scope.x))

    return write


def in_place(scope: Scope, unit: Unit, dice: Random) -> None:
    x = scope.x
    for line in dice.choice(
        [
            [f"{x}.relu_()"],
            [f"{x} += 1"],
            [f"{x}.mul_(0.5).add_(0.1)"],
            [f"F.relu({x}, inplace=True)"],
            [f"{x}[:, 0] = 0.5"],
            [f"{x}[:, :1] *= 2"],
            [f"flat = {x}.flatten(1)", "flat[:, ::2] *= 0.5"],
            [f"first = {x}[:1]", "first.add_(1)"],
        ]
    ):
        scope.line(line)


def earlier(scope: Scope, dice: Random) -> str:
    return dice.choice(scope.values[:-1] or scope.values)


def add(scope: Scope, unit: Unit, dice: Random) -> None:
    """An additive skip, over any number of units."""
    scope.put(dice.choice(["{x} + {y}", "{x} + 0.5 * {y}", "{x} * {y}"]).format(x=scope.x, y=earlier(scope, dice)))


def add_in_place(scope: Scope, unit: Unit, dice: Random) -> None:
    scope.line(f"{scope.x} += {earlier(scope, dice)}")


def concatenate(scope: Scope, unit: Unit, dice: Random) -> None:
    """A concatenated skip."""
    width = scope.width
    text = f"nn.Conv2d({2 * width}, {width}, 1)" if scope.image else f"nn.Linear({2 * width}, {width})"
    scope.put(f"{scope.hold(text)}(torch.cat(({scope.x}, {earlier(scope, dice)}), 1))")


def again(scope: Scope, unit: Unit, dice: Random) -> None:
    """A module that was called before, or a second name for it."""
    if not scope.layers:
        affine(scope, unit, dice)
    name = f"self.{dice.choice(scope.layers)}"
    scope.put(f"{scope.hold(name) if dice.random() < 0.3 else name}({scope.x})")


def tied(scope: Scope, unit: Unit, dice: Random) -> None:
    """A module of its own with the weight of an earlier one."""
    if not scope.weighted:
        affine(scope, unit, dice)
    other = dice.choice(scope.weighted)
    name = scope.hold(next(line for line in scope.made if line.startswith(f"self.{other} ")).partition(" = ")[2])
    scope.made.append(f"{name}.weight = self.{other}.weight")
    scope.put(f"{name}({scope.x})")


def parameter(scope: Scope, unit: Unit, dice: Random) -> None:
    """A parameter of forward itself, used once or twice."""
    name = scope.hold(f"nn.Parameter(torch.full({scope.shape}, 0.75))")
    scope.put(f"{scope.x} * {name}")
    if dice.random() < 0.5:
        scope.put(f"({scope.x} + {name}).tanh()")


def buffer(scope: Scope, unit: Unit, dice: Random) -> None:
    """A buffer that is read."""
    scope.put(f"{scope.x} + {_buffer(scope, f'torch.full({scope.shape}, 0.25)')}")


def _buffer(scope: Scope, value: str) -> str:
    name = f"b{len(scope.made)}"
    scope.made.append(f"self.register_buffer({name!r}, {value})")
    return f"self.{name}"


def moved_buffer(scope: Scope, unit: Unit, dice: Random) -> None:
    """A buffer that each forward writes into, and that counts in what it delivers."""
    name = _buffer(scope, "torch.zeros(())")
    scope.line(f"{name}.add_(1)")
    scope.put(f"{scope.x} * (1 + 0.1 * {name})" if dice.random() < 0.5 else f"{scope.x} + 0.5")


def assigned_buffer(scope: Scope, unit: Unit, dice: Random) -> None:
    """A moving average: each forward puts a new tensor in the place of the buffer."""
    inner = scope.inner([])
    name = _buffer(inner, f"torch.zeros({scope.shape})")
    over = "(0, 2, 3)" if scope.image else "0"
    inner.line(f"{name} = 0.9 * {name} + 0.1 * x.detach().mean({over}, keepdim=True)")
    inner.put(f"x - {name}")
    scope.put(f"{scope.hold(inner.name + '()')}({scope.x})")


def counter(scope: Scope, unit: Unit, dice: Random) -> None:
    """A number that each forward counts up."""
    inner = scope.inner([])
    inner.made.append("self.calls = 0")
    inner.line("self.calls += 1")
    inner.put("x * (1 + 1 / self.calls)")
    scope.put(f"{scope.hold(inner.name + '()')}({scope.x})")


def data_branch(scope: Scope, unit: Unit, dice: Random) -> None:
    inner = scope.inner([])
    inner.put("x.relu() if x.sum() > 0 else -x")
    scope.put(f"{scope.hold(inner.name + '()')}({scope.x})")


def dropout_function(scope: Scope, unit: Unit, dice: Random) -> None:
    option = dice.choice(["", "", ", inplace=True"])
    scope.put(f"F.dropout({scope.x}, 0.3, self.training{option})")


def norm_function(scope: Scope, unit: Unit, dice: Random) -> None:
    mean, variance = (_buffer(scope, f"torch.{kind}({scope.width})") for kind in ("zeros", "ones"))
    scope.put(f"F.batch_norm({scope.x}, {mean}, {variance}, None, None, self.training, 0.2, 1e-4)")


def training_branch(scope: Scope, unit: Unit, dice: Random) -> None:
    """More, fewer or other ops in training than in evaluation."""
    x = scope.x
    column = "(len({x}), 1, 1, 1)" if scope.image else "(len({x}), 1)"
    text = dice.choice(
        [
            "{x} + 0.1 * torch.randn_like({x}) if self.training else {x}",
            "{x} * torch.empty(" + column + ", dtype={x}.dtype).bernoulli_(0.7) if self.training else {x}",
            "{x} if self.training else {x}.softmax(1)",
            "{x}.erf() if self.training else {x}.sigmoid()",
        ]
    )
    scope.put(text.format(x=x))


def random_number(*sources: str) -> Write:
    """A number drawn outside of torch."""

    def write(scope: Scope, unit: Unit, dice: Random) -> None:
        scope.put(f"{scope.x} * {dice.choice(sources)}")

    return write


def random_branch(scope: Scope, unit: Unit, dice: Random) -> None:
    """A layer that is left out by chance."""
    inner = scope.inner([])
    source = dice.choice(["random.random()", "np.random.rand()", "torch.rand(()).item()"])
    affine(inner, unit, dice)
    chosen = inner.lines.pop()
    inner.line(f"{chosen} if {source} < 0.5 else x")
    scope.put(f"{scope.hold(inner.name + '()')}({scope.x})")


def shape_question(scope: Scope, unit: Unit, dice: Random) -> None:
    """Python asks for sizes."""
    x = scope.x
    scope.put(
        dice.choice(
            [
                f"{x}.tanh() if {x}.shape[1] > 2 else {x}",
                f"{x} / len({x})",
                f"{x}.reshape(int({x}.shape[0]), -1).sub(0.1).reshape({x}.shape)",
                f"{x} + torch.ones({x}.shape[0], *[1] * ({x}.dim() - 1), dtype={x}.dtype)",
            ]
        )
    )


def context(*openings: str) -> Write:
    """Children inside of a context; what they deliver is added to the value or takes its place."""

    def write(scope: Scope, unit: Unit, dice: Random) -> None:
        opening, x = dice.choice(openings), scope.x
        if dice.random() < 0.3:
            inner = scope.inner(unit.children)
            inner.decorators.append(f"@{opening}")
            scope.put(f"{scope.hold(inner.name + '()')}({x})")
        else:
            scope.line(f"with {opening}:")
            scope.depth += 1
            before = list(scope.values)
            scope.write(unit.children)
            if scope.values == before:
                scope.put(f"{x} * 2")
            made, scope.values = scope.values[-1], before
            scope.depth -= 1
            scope.values.append(made)
        y = scope.x
        if "autocast" in opening:
            scope.put(f"{y}.to({x}.dtype)")
        if dice.random() < 0.7:
            scope.put(f"{x} + {scope.x}")

    return write


def block(scope: Scope, unit: Unit, dice: Random) -> None:
    inner = scope.inner(unit.children)
    scope.put(f"{scope.hold(inner.name + '()', layer=True)}({scope.x})")


def sequential(scope: Scope, unit: Unit, dice: Random) -> None:
    modules = [f"{scope.inner([child]).name}()" for child in unit.children]
    scope.put(f"{scope.hold('nn.Sequential(' + ', '.join(modules) + ')', layer=True)}({scope.x})")


# How a value is put into a container, and taken out.
CONTAINERS = {
    "tuple": ("({x}, 1)", "[0]"),
    "list": ("[{x}]", "[0]"),
    "dict": ("{{'x': {x}}}", "['x']"),
    "named tuple": ("Pair({x}, None)", ".x"),
    "dataclass": ("Record({x})", ".x"),
    "own dict": ("OwnDict(x={x})", "['x']"),
    "user dict": ("UserDict(x={x})", "['x']"),
    "own list": ("OwnList([{x}])", "[0]"),
    "object": ("Holder({x})", ".x"),
}


def container(*kinds: str) -> Write:
    """A block that is given its value in a container, or gives it back in one, or both."""

    def write(scope: Scope, unit: Unit, dice: Random) -> None:
        inner = scope.inner(unit.children)
        (wrap_in, unwrap_in), (wrap_out, unwrap_out) = (CONTAINERS[dice.choice(kinds)] for _ in range(2))
        given, back = scope.x, ""
        if dice.random() < 0.6:
            given = wrap_in.format(x=given)
            inner.argument = "given"
            inner.lines.insert(0, f"x = given{unwrap_in}")
        if dice.random() < 0.7 or given == scope.x:
            inner.result, back = wrap_out, unwrap_out
        scope.put(f"{scope.hold(inner.name + '()')}({given}){back}")

    return write


def checkpointed(scope: Scope, unit: Unit, dice: Random) -> None:
    reentrant = dice.random() < 0.4
    inner = scope.inner(unit.children)
    scope.put(f"checkpoint({scope.hold(inner.name + '()')}, {scope.x}, use_reentrant={reentrant})")


def hooked(scope: Scope, unit: Unit, dice: Random) -> None:
    """A block or a layer whose hook changes what it is given or delivers."""
    name = scope.hold(f"{scope.inner(unit.children).name}()")
    kind = dice.choice(["forward_hook(halve)", "forward_pre_hook(negate)"])
    scope.made.append(f"{name}.register_{kind}")
    scope.put(f"{name}({scope.x})")


def parametrized(scope: Scope, unit: Unit, dice: Random) -> None:
    affine(scope, unit, dice)
    name = scope.weighted.pop()
    scope.layers.remove(name)
    wrap = dice.choice(
        ["nn.utils.parametrizations.weight_norm", "nn.utils.weight_norm", "nn.utils.parametrizations.spectral_norm"]
    )
    scope.made.append(f"{wrap}(self.{name})")


def frozen_by_user(scope: Scope, unit: Unit, dice: Random) -> None:
    affine(scope, unit, dice)
    scope.made.append(f"self.{scope.weighted[-1]}.requires_grad_(False)")


UNITS: dict[str, Write] = {
    "affine": affine,
    "norm": norm,
    "sample norm": sample_norm,
    "activation": layer("nn.ReLU()", "nn.GELU()", "nn.Tanh()", "nn.LeakyReLU(0.2)"),
    "in-place activation": layer("nn.ReLU(inplace=True)", "nn.Hardtanh(-2, 2, inplace=True)", "nn.SiLU(inplace=True)"),
    "function": statement("F.relu({x})", "{x}.tanh()", "torch.sigmoid({x})", "{x} * 0.5", "F.gelu({x}) - {x}"),
    "in place": in_place,
    "dropout": layer("nn.Dropout(0.3)", "nn.AlphaDropout(0.2)", "nn.Dropout(0.3, inplace=True)"),
    "dropout function": dropout_function,
    "norm function": norm_function,
    "add": add,
    "add in place": add_in_place,
    "concatenate": concatenate,
    "again": again,
    "tied": tied,
    "parameter": parameter,
    "buffer": buffer,
    "moved buffer": moved_buffer,
    "assigned buffer": assigned_buffer,
    "counter": counter,
    "training branch": training_branch,
    "shape question": shape_question,
    "data branch": data_branch,
    "torch noise": statement("{x} + 0.1 * torch.rand_like({x})", "{x} * torch.rand({x}.shape, dtype={x}.dtype)"),
    "python number": random_number("random.random()", "random.uniform(0.5, 1.5)"),
    "numpy number": random_number("np.random.rand()", "np.random.uniform(0.5, 1.5)", "float(np.random.rand())"),
    "random branch": random_branch,
    "no grad": context("torch.no_grad()", "torch.set_grad_enabled(False)"),
    "grad on": context("torch.enable_grad()", "torch.set_grad_enabled(True)"),
    "autocast": context('torch.autocast("cpu", dtype=torch.bfloat16)'),
    "block": block,
    "sequential": sequential,
    "container": container("tuple", "list", "dict", "named tuple", "dataclass"),
    "own container": container("own dict", "user dict", "own list", "object"),
    "checkpoint": checkpointed,
    "hook": hooked,
    "parametrized": parametrized,
    "frozen by user": frozen_by_user,
}
READING = {"dropout function", "norm function", "training branch"}
NESTING = {"no grad", "grad on", "autocast", "block", "sequential", "container", "own container", "checkpoint", "hook"}
# A checkpoint of torch's runs a module twice: with its running statistics that is a fault of the model.
STATELESS = ("affine", "sample norm", "activation", "function", "dropout", "add")
