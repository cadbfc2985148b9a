"""Shows how well a trained model does, as one HTML file: per class, what it confuses, and its worst mistakes."""

from __future__ import annotations

from collections.abc import Sequence

from fxsplit.pages.document import document
from fxsplit.report import Evaluation

# With more classes the confusions are drawn without their numbers.
MOST_NUMBERED = 25
# So many of the most frequent confusions are listed, and so many shades tell how frequent one is.
LISTED, SHADES = 20, 10


def evaluation_page(evaluation: Evaluation, pictures: Sequence[str]) -> str:
    """Make the page of an evaluation. `pictures` are those of its mistakes, as data URIs."""
    return document(
        "evaluation.html.jinja",
        evaluation=evaluation,
        confused=evaluation.confused()[:LISTED],
        mistaken=sum(each.count - each.correct for each in evaluation.classes),
        mistakes=list(zip(evaluation.mistakes, pictures, strict=True)),
        is_numbered=len(evaluation.classes) <= MOST_NUMBERED,
        shade=_shade,
        per_cent=_per_cent,
    )


def _shade(count: int, whole: int) -> int:
    """Return how dark a cell is that has `count` of `whole` images: 0 for none, to SHADES for all."""
    return -(-SHADES * count // whole) if whole else 0


def _per_cent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2f} %"
