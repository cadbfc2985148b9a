"""Shows how well a trained model does, as one HTML file: per class, what it confuses, and its worst mistakes."""

from __future__ import annotations

from collections.abc import Sequence

from fxsplit.pages.confusion import Confusion
from fxsplit.pages.document import document
from fxsplit.report import Evaluation


def evaluation_page(evaluation: Evaluation, pictures: Sequence[str]) -> str:
    """Make the page of an evaluation. `pictures` are those of its mistakes, as data URIs."""
    names = [each.name for each in evaluation.classes]
    counts = {name: dict(zip(names, row, strict=True)) for name, row in zip(names, evaluation.confusion, strict=True)}
    return document(
        "evaluation.html.jinja",
        evaluation=evaluation,
        confusion=Confusion(names=names, counts=counts),
        mistaken=sum(each.count - each.correct for each in evaluation.classes),
        mistakes=list(zip(evaluation.mistakes, pictures, strict=True)),
        per_cent=_per_cent,
    )


def _per_cent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2f} %"
