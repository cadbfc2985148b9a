"""A forward that catches errors does not catch those by which tracing says that something cannot be recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.exact import Linears, With, assert_exact, rows


class Trying(Linears):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        try:
            if h.sum() > -1e9:
                h = h * 2
        except Exception:
            h = h * 3
        return self.c(h)


class Reading(Linears):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        try:
            factor = h.sum().item()
        except Exception:
            factor = 7.0
        return self.c(h) * factor


class Suppressing(Linears):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with contextlib.suppress(Exception):
            if h.sum() > -1e9:
                h = h * 2
        return self.c(h)


class TryingInside(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return x * 2 if x.sum() > -1e9 else x
        except Exception:
            return x


def scaled(h: Tensor) -> Tensor:
    try:
        return h * float(h.sum())
    except Exception:
        return h


class Calling(Linears):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(scaled(self.a(x)))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(_: object, h: Tensor) -> Tensor:
        return h * 2

    @staticmethod
    def backward(_: object, gradient: Tensor) -> Tensor:
        return gradient * 2


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return Double.apply(x)  # type: ignore[no-any-return, no-untyped-call]
        except Exception:
            return x


@pytest.mark.parametrize(
    "make", [Trying, Reading, Suppressing, lambda: With(TryingInside()), Calling, lambda: With(Doubling())]
)
def test_what_cannot_be_recorded_is_not_lost_where_forward_catches_errors(make: Callable[[], nn.Module]) -> None:
    assert assert_exact(make(), rows()).opaque


class Mending(Linears):
    """Its own error is its own business, in tracing as in any call."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        try:
            return self.a(h)
        except RuntimeError:
            return self.c(h)


def test_an_error_of_the_model_is_caught_by_the_model() -> None:
    assert not assert_exact(Mending(), rows()).opaque
