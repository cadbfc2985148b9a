"""What a shell may complete: models, data, runs, and options with a choice. None of it loads torch.

`fxsplit --install-completion` is typer's own. Libraries are not imported either: the names of their models are read
from their source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, MutableMapping
from importlib.util import find_spec
from pathlib import Path

from fxsplit.resuming import AUTO

DATA = ("digits", "cifar10", "cifar100", "synthetic")
PAPER = ("cnn", "vgg16", "resnext", "densenet")
# How libraries announce their models, in the folder `models` of their package.
LIBRARIES = ("timm", "torchvision")
REGISTERED = re.compile(r'^@register_model(?:\(name="(\w+)"\)|\b(?:.*\n)+?def (\w+))', re.MULTILINE)
RUNS = Path("output", "train")

# Where a word begins that bash has cut at a colon, such as `timm:`.
_beginning = ""


def models(incomplete: str) -> list[str]:
    """List models; as long as several libraries may be meant, these."""
    typed = _beginning + incomplete
    meant = [f"{name}:" for name in ("paper", *LIBRARIES) if f"{name}:".startswith(typed[: len(name) + 1])]
    if len(meant) != 1:
        return meant
    library = meant[0].removesuffix(":")
    names = PAPER if library == "paper" else _registered(library)
    found = (f"{library}:{name}" for name in names)
    # Of what bash has cut it wants the rest.
    return [name.removeprefix(_beginning) for name in found if name.startswith(typed)]


def data(incomplete: str) -> list[str]:
    """List data sets."""
    return [] if _beginning else [name for name in DATA if name.startswith(incomplete)]


def runs(incomplete: str) -> list[str]:
    """List the folders of runs, the newest first, where `train` puts them."""
    found = sorted((path for path in RUNS.glob("*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
    return [name for name in map(str, reversed(found)) if name.startswith(incomplete)]


def runs_to_resume(incomplete: str) -> list[str]:
    """List what `--resume` takes."""
    return [name for name in (AUTO, *runs(incomplete)) if name.startswith(incomplete)]


def one_of(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Make what lists the choices of an option."""

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete


def join_words(environ: MutableMapping[str, str]) -> None:
    """Put together what bash has cut at colons, before typer reads it.

    To bash `timm:res` is three words, and it completes the last:

        fxsplit  check  timm  :  resnet18  timm  :  res         as bash gives it
        fxsplit  check  timm:resnet18               res         as typer is to see it; `timm:` is remembered
    """
    global _beginning
    if environ.get("_FXSPLIT_COMPLETE") != "complete_bash":
        return
    words, at = environ["COMP_WORDS"].split("\n"), int(environ["COMP_CWORD"])
    before, current = words[:at], words[at] if at < len(words) else ""
    if current == ":":
        before, current = [*before, ":"], ""
    joined: list[str] = []
    glued = False
    for word in before:
        if joined and (word == ":" or glued):
            joined[-1] += word
        else:
            joined.append(word)
        glued = word == ":"
    if glued:
        _beginning = joined.pop()
    environ["COMP_WORDS"] = "\n".join([*joined, current])
    environ["COMP_CWORD"] = str(len(joined))


def _registered(package: str) -> list[str]:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return []
    sources = (Path(spec.origin).parent / "models").rglob("*.py")
    found = (match for path in sources for match in REGISTERED.finditer(path.read_text(encoding="utf-8")))
    return sorted({match[1] or match[2] for match in found})
