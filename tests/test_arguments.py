"""What functions of the library are given: one name for a list of one, and mistakes that are told in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxsplit
from tests.networks import Chain

X = torch.empty(2, 3, 8, 8)


@pytest.fixture(scope="module")
def trace() -> fxsplit.Trace:
    return fxsplit.trace(Chain(), (X,))


@pytest.mark.parametrize(
    ("given", "listed"),
    [
        (lambda trace, one: fxsplit.partition(trace, at=one), "conv2"),
        (lambda _, one: str(fxsplit.trace(nn.Sequential(Chain()), (X,), leaves=one)), "0"),
        (lambda _, one: str(fxsplit.trace(nn.Sequential(Chain()), (X,), leaves=one)), Chain),
        (lambda trace, one: fxsplit.device_map(trace, fxsplit.partition(trace, count=1), one), "cpu"),
        (lambda _, one: [each.model for each in fxsplit.check(one, structure_only=True, img_size=16)], "paper:cnn"),
    ],
    ids=["at", "leaves", "class", "devices", "check"],
)
def test_one_stands_for_a_list_of_one(trace: fxsplit.Trace, given: Callable[..., Any], listed: Any) -> None:
    assert given(trace, listed) == given(trace, [listed])
    assert given(trace, listed)
