"""Command lines: every option, with good and bad values, in a folder with recipes, plans, models and images."""

from __future__ import annotations

import io
import random
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fxsplit.models import registry
from fxsplit.spec import RunSpec
from fxsplit_cli.main import main
from tests.fuzz_input import plans, recipes
from tests.fuzz_input.mutate import HOSTILE, word
from tests.fuzz_input.outcome import NAME, UNEXPECTED, Outcome, crashed, fault_of, nothing_made

# Of a run that is over in a moment.
SMALL = {"--img-size": "16", "--train-limit": "64", "--batch-size": "16", "--device": "cpu", "--workers": "0"}
FACTORIES = """
import os, sys
from torch import nn

def build(num_classes, img_size):
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *head)

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(10))

def few(): return nn.Sequential(nn.Flatten(), nn.Linear(768, 7))
def maps(): return nn.Conv2d(3, 10, 3)
class Scalar(nn.Module):
    def forward(self, x): return x.mean()
class Nothing(nn.Module):
    def forward(self, x): return None
class Words(nn.Module):
    def forward(self, x): return {"scores": "many"}
class Leaves(nn.Module):
    def forward(self, x): sys.exit(3)
class Throws(nn.Module):
    def forward(self, x): raise BaseException("stop")
class Asks(nn.Module):
    def forward(self, x): return x.flatten(1)[:, :int(input("how many? "))]
class Halves(nn.Module):
    def forward(self, x): return x.flatten(1)[: len(x) // 2]
def raises(): raise RuntimeError("two\\nlines \\x1b]0;pwn\\x07 " + "long " * 500)
def base(): raise BaseException("base")
def generator(): raise GeneratorExit
def leaves(): sys.exit(0)
def text(): return "a model"
def number(): return 3
def kind(): return nn.Linear
def asks(): return input("may I? ")
def prints():
    print("printed"); os.write(1, b"written"); return build(10, 16)
def needs(more): return more
def deep():
    return deep()
built = nn.Linear(3, 3)
lazy = lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
nothing = None
def empty(): return nn.Sequential()
class Keys(nn.Module):
    def __init__(self):
        super().__init__()
        self.kinds = nn.ModuleDict({CODE: nn.Linear(768, 10), "global": nn.ReLU(), "a\\\\b": nn.ReLU()})
    def forward(self, x):
        for each in self.kinds.values():
            x = each(x.flatten(1))
        return x
CODE = 'x", getattr(__import__("os"), "abort")()), getattr(self, "x'
"""
CONFIG = '{"model_type": "x", "auto_map": {"AutoConfig": "evil.C"}}'
MADE = """
build build build Net few maps Scalar Nothing Words Leaves Throws Asks Halves raises base generator leaves text number
kind asks prints needs deep built lazy nothing empty Keys _x nosuch
"""
MODELS = (
    *("paper:cnn",) * 30,
    *(f"nets.py:{name}" for name in MADE.split()),
    *("nets.py:", "nets:build", "nosuch.py:f", "broken.py:f", "quits.py:f", "os:getcwd", "builtins:int", "json:loads"),
    *("timm:nosuch", "torchvision:nosuch", "hf:nosuch", "hf:./folder", "hf:./nosuch", "paper:nosuch", "cnn", ":", ":b"),
)
FILES = {
    "plan": ("plan.json", "plan.json", "worse.json", "none.json", "folder", "weights.pth", "recipe.yaml"),
    "initial_checkpoint": (
        "weights.pth",
        "weights.safetensors",
        "other.pth",
        "evil.pth",
        "none.pth",
        "plan.json",
        "folder",
    ),
    "data": (
        *("digits",) * 4,
        "synthetic",
        "folder:images",
        "folder:images",
        "folder:folder",
        "folder:nets.py",
        "images",
    ),
    "output": ("runs", "plan.json", "nowhere/runs"),
    "data_dir": ("cifar",),
    "opt": ("adamw", "sgd", "lion", "adahessian", "lbfgs", "bnbadam", "lookahead_adam", "nosuch"),
    "sched": ("cosine", "step", "multistep", "poly", "wsd", "rsqrt", "tanh", "plateau", "nosuch"),
    "torchcompile": ("eager", "nosuch"),
    "device": ("cpu", "auto", "cuda", "cuda:7", "tpu"),
    "at": ("conv2", "conv1.relu", "drop1,drop2", "nosuch", "", ","),
    "img_size": ("16", "16", "8", "1", "2", "5", "17"),
    "batch_size": ("16", "1", "2", "3", "64"),
    "mean": ("0.5", "0.5,0.5,0.5", "1,2", ""),
    "std": ("0.5", "0.5,0.5,0.5", "0", ""),
}


def furnish(folder: Path) -> None:
    """Put everything into a folder that command lines name."""
    (folder / "nets.py").write_text(FACTORIES)
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "quits.py").write_text("import sys\nsys.exit(0)\n")
    (folder / "plan.json").write_text(plans.plans()[2])
    (folder / "worse.json").write_text('{"schema": 3, "schedule": "\\ud800", "cuts": [], "phases": [{}]}')
    (folder / "recipe.yaml").write_text("model: paper:cnn\nimg-size: 16\nepochs: 2\n")
    (folder / "evil.yaml").write_text("model: nets.py:build\noutput: ../elsewhere\nexperiment: ../../x\n")
    (folder / "folder").mkdir()
    (folder / "folder" / "config.json").write_text(CONFIG)
    (folder / "folder" / "evil.py").write_text("raise SystemExit\n")
    model = registry.build("paper:cnn", num_classes=10, img_size=16)
    torch.save(model.state_dict(), folder / "weights.pth")
    torch.save({"lone": torch.zeros(2)}, folder / "other.pth")
    torch.save({"model": torch.nn.Linear(1, 1)}, folder / "evil.pth")
    draw = random.Random(0)
    for name in ("cats", "dogs"):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(8):
            pixels = Image.frombytes("RGB", (9, 7), draw.randbytes(9 * 7 * 3))
            pixels.save(folder / "images" / name / f"{number}.png")


def _value(draw: random.Random, item: Any) -> str:
    kind = draw.randrange(10)
    if kind < 6 and item.name in FILES:
        return draw.choice(FILES[item.name])
    if kind < 6 and item.metadata["choices"]:
        return str(draw.choice(item.metadata["choices"]))
    if kind < 8:
        good = recipes.WORDS.get(item.name.replace("_", "-"), item.default)
        return ",".join(map(str, good)) if isinstance(good, list | tuple) else str(good)
    if kind == 8 and item.metadata["choices"]:
        return word(draw, item.metadata["choices"])
    return str(draw.choice(HOSTILE))


def words(draw: random.Random) -> list[str]:
    """A command line: mostly of train, for a run that is over in a moment, with up to six options more."""
    verb = draw.choice((*("train",) * 8, "inspect", "check", "trian", ""))
    line = [verb] if verb else []
    if draw.random() < 0.95:
        line.append(draw.choice(MODELS))
    if verb == "check":
        line += draw.choice(([], ["--meta"], ["--parts", "2"], ["--forecast", "--batch-size", "2"], ["--jobs", "0"]))
        return [*line, "--img-size", "16"]
    options = [each for each in fields(RunSpec) if each.name not in ("model", "dry_run")]
    for item in draw.sample(options, draw.choice((0, 1, 1, 1, 2, 2, 3, 6))):
        name = f"--{item.name.replace('_', '-')}"
        if isinstance(item.default, bool):
            line.append(draw.choice((name, f"--no-{name[2:]}")))
        else:
            line += [name, _value(draw, item)] if draw.random() < 0.9 else [f"{name}={_value(draw, item)}"]
    if draw.random() < 0.3:
        line += draw.choice((
            *(["--l2l"], ["-q"], ["--json"], ["-v"], ["--no-progress"], ["--print-config"], ["--trust-recipe"]),
            *(["--trust-code"], ["-c", "recipe.yaml"], ["-c", "evil.yaml"], ["-c", "none.yaml"], ["-c", "nets.py"]),
            *(["--resume", "auto"], ["--resume", "folder"], ["--resume", "nowhere"], ["--resume", "weights.pth"]),
            *(["--nosuch"], ["--help"], [""], ["--"], ["--lr"], ["a", "b"]),
        ))  # fmt: skip
    given = {each.partition("=")[0] for each in line}
    for name, good in SMALL.items():
        if name not in given and draw.random() < 0.97 and (verb == "train" or name in ("--img-size", "--batch-size")):
            line += [name, good]
    return [*line, "--dry-run"] if verb == "train" else line


def run(seed: int, folder: Path) -> Outcome:
    """Run a command line in a furnished folder, as in a shell but for the shell."""
    if not (folder / "nets.py").exists():
        furnish(folder)
    line = words(random.Random(seed))
    out, err = io.StringIO(), io.StringIO()
    try:
        with nothing_made(folder), redirect_stdout(out), redirect_stderr(err):
            code = main(line)
    except BaseException as error:
        failed = crashed(error)
        failed.why = f"{line}: {failed.why}"
        return failed
    said = err.getvalue()
    last = said.rstrip("\n").rpartition("\n")[2]
    why = ""
    if UNEXPECTED.search(said):
        why = "unexpected"
    elif code not in (0, 1, 2, 3, 4):
        why = "an exit code that is not documented"
    elif code in (1, 2) and line and "--help" not in line and NAME in last:
        why = fault_of(last.removeprefix(NAME))
    if why:
        return Outcome("failed", str(code), f"{why}: {line}: {said[-500:]}")
    return Outcome("done" if code == 0 else "refused", f"exit code {code}", f"{line}: {last}")
