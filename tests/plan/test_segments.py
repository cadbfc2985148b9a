"""Segments: where a partition that recomputes is divided, and that it then needs less."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxsplit import trace
from fxsplit.graph import Graph
from fxsplit.models.libraries.paper import NETWORKS
from fxsplit.plan.budget import fit
from fxsplit.plan.forecast import Forecast, forecast
from fxsplit.plan.partition import partition
from fxsplit.plan.schedule import Phase, Plan
from fxsplit.plan.segments import segments
from tests.pairs import both
from tests.plan.test_partition import graph, op


def block(*, narrow: int = 2, skips: str = "c", wide: int = 8) -> Graph:
    """Four ops that each save 10 bytes, and a head; `b` delivers least, and `d` reads `skips` beside `c`."""
    return graph(
        (
            op("a", "x", size=wide, activation_bytes=10),
            op("b", "a", size=narrow, activation_bytes=10),
            op("c", "b", size=wide, activation_bytes=10),
            op("d", "c", skips, size=wide, activation_bytes=10),
            op("head", "d", size=1),
        )
    )


def starts(net: Graph) -> list[list[str]]:
    parts = partition(both(net), at=["head"])
    return [[segment.name for segment in each] for each in segments(parts, both(net))]


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        # 2 + 20 instead of 40 bytes; one more cut would add 8 and leave 20.
        (block(), ["a", "c"]),
        # What the partition reads lives anyway.
        (block(skips="x"), ["a", "c"]),
        # The value of a lives on beside that of b: 10 + 20 for two, 18 + 10 for four.
        (block(skips="a"), ["a", "b", "c", "d"]),
        # Divided, it would need 22 + 20 and more.
        (block(narrow=22, wide=22), ["a"]),
        # Wherever values are small, each op is one.
        (block(narrow=1, wide=1), ["a", "b", "c", "d"]),
    ],
)
def test_a_partition_is_divided_where_that_lessens_what_it_needs(net: Graph, expected: list[str]) -> None:
    assert starts(net) == [expected, ["head"]]


def test_segments_make_up_their_partitions() -> None:
    found = trace(NETWORKS["densenet"](10, 32, 3), (torch.empty(2, 3, 32, 32),))
    parts = partition(found, count=3)
    divided = segments(parts, found)
    assert divided[-1] == (parts[-1],)
    assert max(map(len, divided)) > 1
    for part, pieces in zip(parts, divided, strict=True):
        joined = [(piece.start, piece.stop) for piece in pieces]
        assert joined == [*zip([part.start, *(stop for _, stop in joined)], [stop for _, stop in joined], strict=False)]
        assert (pieces[0].reads, pieces[-1].writes) == (part.reads, part.writes)
        assert {name for piece in pieces for name in piece.state} == set(part.state)


def test_a_wide_block_needs_less_in_segments_and_a_budget_finds_out() -> None:
    found = trace(NETWORKS["resnext"](10, 32, 3), (torch.empty(2, 3, 32, 32),))
    parts = partition(found, count=4, by="natural")

    def made(**fields: Any) -> Plan:
        return Plan(schedule="mine", partitions=parts, phases=(Phase(start=0, stop=4, epochs=1, **fields),))

    def told(plan: Plan) -> Forecast:
        return forecast(plan, found, batch_size=8, optimizer_slots=2)

    whole, parted = (told(made(recompute=3, segmented=segmented)) for segmented in (False, True))
    assert parted.phases[0].activation_bytes < 0.9 * whole.phases[0].activation_bytes
    assert parted.phases[0].step_cost == pytest.approx(whole.phases[0].step_cost)
    budget = 1.05 * parted.phases[0].activation_bytes / parted.standard.activation_bytes
    fitted = fit(made(), found, budget=budget, batch_size=8, optimizer_slots=2)
    assert fitted.phases[0].segmented
    assert told(fitted).phases[0].activation_bytes <= budget * whole.standard.activation_bytes
