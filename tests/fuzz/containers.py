"""What fuzzed models put values into, and the hooks that they have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass
class Record:
    x: Any
    y: Any = None


class OwnDict(dict[str, Any]):
    """A dict of the user's own class."""


class OwnList(list[Any]):
    """A list of the user's own class."""


class Holder:
    """An object that holds a value."""

    def __init__(self, x: Any) -> None:
        self.x = x


def halve(module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG001
    return output / 2


def negate(module: nn.Module, args: Any) -> Any:  # noqa: ARG001
    return (-args[0],)
