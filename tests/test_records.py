"""Records survive their JSON, which is strict, and what is no record is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxsplit.errors import UsageError
from fxsplit.plan.schedule import Phase, Plan
from fxsplit.records import json_line, json_text, read_record
from fxsplit.report import EpochRecord, RunReport


def strict(text: str) -> Any:
    """What JSON says, where NaN and Infinity are none."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_null() -> None:
    data = {"loss": math.nan, "losses": [(1.5, math.inf), {"least": -math.inf}]}
    expected = {"loss": None, "losses": [[1.5, None], {"least": None}]}
    assert strict(json_text(data)) == strict(json_line(data)) == expected
    assert json_text(data).endswith("\n")
    assert "\n" not in json_line(data)


@dataclass(frozen=True)
class Inner:
    flag: bool


@dataclass(frozen=True)
class Outer:
    whole: int
    number: float
    text: str
    names: tuple[str, ...]
    inner: tuple[Inner, ...]
    facts: dict[str, Any]
    maybe: int | None = None


GOOD = {"whole": 1, "number": 2, "text": "a", "names": ["b"], "inner": [{"flag": True}], "facts": {"c": [None]}}


def test_a_record_of_every_kind_of_field() -> None:
    found = read_record(Outer, GOOD)
    assert found == Outer(1, 2.0, "a", ("b",), (Inner(True),), {"c": [None]})
    assert type(found.number) is float
    assert read_record(Outer, {**GOOD, "maybe": 3}).maybe == 3
    assert math.isnan(read_record(Outer, {**GOOD, "number": None}).number)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"whole": 1.0}, "'whole' of Outer cannot be 1.0"),
        ({"whole": True}, "'whole' of Outer cannot be True"),
        ({"whole": None}, "'whole' of Outer cannot be None"),
        ({"number": True}, "'number' of Outer cannot be True"),
        ({"number": 10**400}, f"'number' of Outer cannot be {10**400}"),
        ({"number": "1"}, "'number' of Outer cannot be '1'"),
        ({"names": "b"}, "'names' of Outer cannot be 'b'"),
        ({"names": [1]}, "'names' of Outer cannot be [1]"),
        ({"inner": [3]}, "'inner' of Outer cannot be [3]"),
        ({"inner": [{"flag": 1}]}, "'flag' of Inner cannot be 1"),
        ({"inner": [{}]}, "Inner lacks the key 'flag'"),
        ({"maybe": "1"}, "'maybe' of Outer cannot be '1'"),
        ({"txt": "a"}, "Outer has no key 'txt'; did you mean 'text'?"),
    ],
)
def test_what_is_no_record(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        read_record(Outer, {**GOOD, **change})
    with pytest.raises(ValueError, match="Outer must be a mapping, not int"):
        read_record(Outer, 3)
    with pytest.raises(ValueError, match="Outer lacks the key 'whole'"):
        read_record(Outer, {key: value for key, value in GOOD.items() if key != "whole"})


finite = st.floats(allow_nan=False, allow_infinity=False)
KINDS = {"int": st.integers(), "float": finite, "str": st.text(), "int | None": st.none() | st.integers(),
         "float | None": st.none() | finite}  # fmt: skip


@given(st.fixed_dictionaries({item.name: KINDS[str(item.type)] for item in fields(EpochRecord)}))
def test_an_epoch_survives_its_line(values: dict[str, Any]) -> None:
    record = EpochRecord(**values)
    assert read_record(EpochRecord, strict(json_line(values))) == record


@pytest.fixture
def full(report: RunReport, plan: Plan) -> RunReport:
    """A report none of whose fields is as it would be if it were not given."""
    phases = (
        replace(plan.phases[0], micro_batches=2, fresh_optimizer=True),
        replace(plan.phases[1], recompute=1, segmented=True),
        plan.phases[2],
    )
    records = tuple(
        replace(record, peak_allocated_bytes=1, peak_reserved_bytes=2, device_bytes=3, cache_resident_bytes=4,
                cache_file_bytes=5, processor_seconds=6.0, multiply_adds=7, ensemble_top1=8.0, reduced_bytes=10,
                gathered_bytes=11, sent_bytes=12, held_out_top1=9.0)
        for record in report.epochs
    )  # fmt: skip
    return replace(
        report,
        spec={"model": "paper:cnn", "preset": "l2l", "at": ["a"], "lr": 0.1, "clip-grad": None},
        environment={"torch": "2.14.0", "gpu": {"name": "x"}},
        plan=replace(plan, preset="l2l", phases=phases),
        passes=("pointwise_products",),
        prove_seconds=0.5,
        processor_seconds=70.0,
        data={"train": 9, "labels": "ab"},
        epochs=records,
    )


def test_a_report_survives_its_file(full: RunReport) -> None:
    for record in (full, full.epochs[0], full.plan, *full.plan.phases[:1]):
        for item in fields(record):
            at_rest = item.default if item.default is not MISSING else None
            rests = isinstance(record, Phase) and item.name in ("recompute", "segmented", "thaws")
            assert rests or getattr(record, item.name) != at_rest, f"{item.name} would be the same if it were lost"
    data = strict(json_text(full.to_dict()))
    assert RunReport.from_dict(data) == full
    assert RunReport.from_dict(full.to_dict()) == full
    assert (data["schema"], data["accuracy_pct"], data["plan"]["preset"]) == (1, full.accuracy_pct, "l2l")
    assert (data["plan"]["model"], data["plan"]["torch"]) == ("paper:cnn", "2.14.0")


def test_a_report_of_a_run_that_diverged_or_never_began(full: RunReport) -> None:
    diverged = replace(full, epochs=(replace(full.epochs[0], train_loss=math.nan, eval_loss=math.inf),))
    found = RunReport.from_dict(strict(json_text(diverged.to_dict())))
    assert math.isnan(found.epochs[0].train_loss)
    assert math.isnan(found.epochs[0].eval_loss)
    assert found.epochs[0].lr == full.epochs[0].lr
    none = replace(full, epochs=())
    assert RunReport.from_dict(strict(json_text(none.to_dict()))) == none


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda data: data.update(schema=2), "the report of a run has schema 2, and this version reads 1"),
        (lambda data: data.pop("schema"), "the report of a run has schema None, and this version reads 1"),
        (lambda data: data.pop("status"), "this is not the report of a run: RunReport lacks the key 'status'"),
        (lambda data: data.update(more=1), "this is not the report of a run: RunReport has no key 'more'"),
        (lambda data: data["epochs"][0].update(lr="fast"), "'lr' of EpochRecord cannot be 'fast'"),
        (lambda data: data.pop("plan"), "the plan 'report.json' must be a JSON object"),
        (lambda data: data["plan"].update(schema=2), "the plan 'report.json' has schema 2"),
    ],
)
def test_what_is_no_report(report: RunReport, change: Callable[[Any], object], sentence: str) -> None:
    data = json.loads(json_text(report.to_dict()))
    change(data)
    with pytest.raises(UsageError) as caught:
        RunReport.from_dict(data)
    assert sentence in str(caught.value)
    with pytest.raises(UsageError, match="must be a JSON object"):
        RunReport.from_dict([])
