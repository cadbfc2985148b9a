"""What the sources of named models have in common: how each is described, and how its errors become ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxsplit.errors import DataError, UsageError, reason, shown, shown_path

USUAL_SIZE = 224
HUB_CACHE = "Hugging Face's cache (HF_HOME)"
DROP_PATH = "drop_path_rate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """Describes the images that weights were trained on.

    They are `img_size` pixels wide, made so by `interpolation` ("bilinear", "bicubic" or another that torchvision
    knows). `mean` and `std` of each channel normalise pixels in [0, 1].
    """

    img_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """Describes a source of named models: how to build one, list them all, and find the image size of one.

    `preprocessing` tells how images were prepared for pretrained weights. `rebuild` builds without them what `build`
    makes for them, where that is another network than without.
    """

    build: Callable[..., nn.Module]
    names: Callable[[], list[str]]
    native_size: Callable[[str], int]
    preprocessing: Callable[[str], Preprocessing | None] = lambda _name: None
    rebuild: Callable[..., nn.Module] | None = None


@contextmanager
def errors_of(library: str, name: str, settings: dict[str, Any], *, cache: str) -> Iterator[None]:
    """Turn the errors of a library into DataError and UsageError."""
    try:
        yield
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise UsageError(
                f"{shown_path(f'{library}:{name}')} comes with Python code of its own, which is not run; if you trust "
                "it, add --trust-code"
            ) from error
        if isinstance(error, ValueError):
            raise _cannot_build(library, name, settings, error) from error
        raise DataError(
            f"{shown_path(f'{library}:{name}')} cannot be downloaded or read ({reason(error)}); connect to the "
            f"network, copy its files into {cache}, start from a file of them by --initial-checkpoint, or do without"
        ) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # code that comes with a model may call sys.exit
        raise _cannot_build(library, name, settings, error) from error


def _cannot_build(library: str, name: str, settings: dict[str, Any], error: BaseException) -> UsageError:
    asked = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    return UsageError(f"{library} cannot build {shown(name)}{asked and f' with {asked}'}: {reason(error)}")


def drop_path_argument(parameter: str, rate: float) -> dict[str, float]:
    """Return the argument for stochastic depth: none for a rate of 0, so that the builder's default holds."""
    return {parameter: rate} if rate else {}


def no_drop_path(spec: str, parameter: str) -> UsageError:
    return UsageError(f"{spec!r} takes no {parameter}, the rate of stochastic depth; leave out drop-path")


def refuse_pretrained(spec: str, pretrained: bool) -> None:
    if pretrained:
        raise UsageError(f"{spec!r} has no pretrained weights; only models of timm, torchvision and hf:ORG/NAME have")
