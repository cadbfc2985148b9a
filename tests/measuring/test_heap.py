"""Memory of the host is given back at each change of phase."""

from __future__ import annotations

import sys

import pytest
import torch

from fxsplit.measuring.heap import trim_heap
from fxsplit.measuring.meter import resident_bytes
from fxsplit.plan.schedule import Phase
from fxsplit.training import trainer as module
from tests.networks import Chain
from tests.training.test_trainer import trainer

BLOCKS, BLOCK_BYTES = 1000, 80_000


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be asked for it")
def test_what_is_free_goes_back_to_the_system() -> None:
    trim_heap()
    # Small enough to come from the heap, which cannot shrink below the last one.
    blocks = [torch.ones(BLOCK_BYTES // 4) for _ in range(BLOCKS)]
    del blocks[:-1]
    before = resident_bytes()
    trim_heap()
    assert before - resident_bytes() > BLOCKS * BLOCK_BYTES / 2
    assert blocks[0].sum() == BLOCK_BYTES / 4


def test_each_phase_begins_so(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[int] = []
    plan = (Phase(start=0, stop=4, epochs=2), Phase(start=1, stop=4, epochs=1), Phase(start=2, stop=4, epochs=1))
    net = trainer(Chain(), plan=plan)
    monkeypatch.setattr(module, "trim_heap", lambda: trimmed.append(net.executor.window[0]))
    for _ in net.epochs():
        pass
    assert trimmed == [0, 1, 2]
