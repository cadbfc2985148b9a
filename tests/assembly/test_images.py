"""What is said of the images of a run before there are any."""

from __future__ import annotations

from typing import Any

import pytest

from fxsplit.assembly.images import views
from fxsplit.spec import RunSpec


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, None),  # one that never changes has no views
        ({"augment": "flip-alternate"}, 2),
        ({"augment": "flip-alternate", "reprob": 0.5}, None),
        ({"augment": "flip-alternate", "reprob": 0.5, "cache_views": 4}, 4),
        ({"augment": "crop-flip"}, None),
        ({"augment": "crop-flip", "cache_views": 3}, 3),
    ],
)
def test_a_cache_keeps_as_many_views_of_an_image_as_there_are(asked: dict[str, Any], expected: int | None) -> None:
    assert views(RunSpec(model="paper:cnn", **{"augment": "none", **asked})) == expected
