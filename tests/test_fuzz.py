"""Five hundred cases of the fuzz: what partitions leave behind is what the model leaves behind, or it is refused."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.fuzz.draw import SOUND
from tests.fuzz.harness import drawn, run
from tests.fuzz.mutations import MUTATIONS, found
from tests.fuzz.report import reproducer
from tests.fuzz.shrink import shrink

# The second half is for whoever has a minute more.
COUNT, QUICK, CHUNK = 500, 250, 25
FIRST = [
    *range(0, QUICK, CHUNK),
    *(pytest.param(first, marks=pytest.mark.slow) for first in range(QUICK, COUNT, CHUNK)),
]
STATUSES: Counter[str] = Counter()


@pytest.mark.parametrize("first", FIRST)
def test_partitions_do_what_the_model_does(first: int) -> None:
    for seed in range(first, first + CHUNK):
        result = run(drawn(seed, frozenset(SOUND)))
        STATUSES[result.status] += 1
        if result.status == "failed":
            smallest = reproducer(shrink(result, tries=60))
            pytest.fail(f"python -m tests.fuzz --seed {seed} --count 1 --show\n{result.why}\n\n{smallest}")


def test_most_cases_are_not_refused() -> None:
    count = sum(STATUSES.values())
    if count not in (QUICK, COUNT):
        pytest.skip("only counted after all of them")
    assert STATUSES["same"] >= 0.9 * count
    assert STATUSES["void"] <= 0.02 * count
    assert STATUSES["incomparable"] <= 0.06 * count


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_is_found(name: str) -> None:
    assert found(name, COUNT) is not None


def test_a_seed_gives_one_case() -> None:
    features = frozenset(SOUND)
    assert drawn(7, features) == drawn(7, features)
    assert len({drawn(seed, features) for seed in range(20)}) == 20
