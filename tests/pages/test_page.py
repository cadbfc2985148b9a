"""The page as text: whole, shut off from the network, with the right figures. Browsers see it in `test_chromium`."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import takewhile

import pytest

from fxsplit.pages.figures import human
from fxsplit.pages.page import inspection_page, report_page
from fxsplit.plan.partition import partition
from fxsplit.plan.scaling import ScaleForecast
from fxsplit.plan.schedule import Phase, Plan, schedule
from fxsplit.report import EpochRecord, Inspection, RunReport
from tests.pairs import both

VOID = {"meta", "input"}


class Page(HTMLParser):
    """Elements with attributes and text; fails where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())

    def having(self, tag: str, name: str, value: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == tag and attributes.get(name) == value]


@pytest.fixture
def page(inspection: Inspection) -> Page:
    return Page(inspection_page(inspection))


@pytest.fixture
def run_page(report: RunReport, inspection: Inspection) -> Page:
    return Page(report_page(report, inspection))


def test_nothing_can_be_loaded_and_only_its_own_script_can_run(page: Page) -> None:
    (policy,) = page.having("meta", "http-equiv", "Content-Security-Policy")
    (style,), (script,) = page.texts["style"], page.texts["script"]
    assert script.startswith('"use strict"')
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy["content"]).split(";"))
    assert rules["default-src"] == "'none'"
    assert set(rules) == {"default-src", "style-src", "script-src", "base-uri", "form-action"}
    for name, text in (("style-src", style), ("script-src", script)):
        # As the browser sees it, line breaks at the ends and all.
        digest = base64.b64encode(hashlib.sha256(f"{text}\n".encode()).digest()).decode()
        assert rules[name] == f"'sha256-{digest}'"
    loading = [(tag, names) for tag, names in page.elements if {"src", "href", "style", "onclick"} & names.keys()]
    assert loading == []


def test_words_of_the_user_are_text(inspection: Inspection, report: RunReport) -> None:
    evil = "<script>alert(1)</script>\"'&"
    ops = tuple(replace(op, path=evil, target=evil) for op in inspection.train.ops)
    graph = replace(inspection.train, ops=ops)
    partitions = tuple(replace(part, name=evil) for part in inspection.partitions)
    odd = replace(
        inspection,
        model=evil,
        train=graph,
        eval=graph,
        plan=replace(inspection.plan, schedule=evil, partitions=partitions),
        classes={evil: evil},
        tied={evil: (evil,)},
        opaque={evil: evil},
    )
    run = replace(report, spec={evil: evil}, environment={evil: evil}, status=evil)
    for text in (inspection_page(odd), report_page(run, odd)):
        page = Page(text)
        assert len([tag for tag, _ in page.elements if tag == "script"]) == 1
        assert text.count("alert(1)") > 20
        assert "<script>alert" not in text
        assert evil in page.texts["code"]


def test_partitions_in_order_with_their_boundaries_to_scale(page: Page, inspection: Inspection) -> None:
    found = [names for tag, names in page.elements if tag == "details" and names.get("class") == "partition"]
    assert [str(names["data-find"]).split()[0] for names in found] == [part.name for part in inspection.partitions]
    widths = [
        page.elements[index + 1][1]["width"]
        for index, (_, names) in enumerate(page.elements)
        if names.get("class") == "flow"
    ]
    assert widths == ["25%", "100%", "100%", "100%"]


def test_bars_are_shares_of_the_level_above(inspection: Inspection) -> None:
    """Of six equal ops the first two are one module, of which each is half."""
    paths = ("m.a", "m.b", "c", "d", "e", "f")
    ops = tuple(replace(op, path=path) for op, path in zip(inspection.train.ops, paths, strict=True))
    graph = replace(inspection.train, ops=ops)
    plan = schedule("standard", partitions=partition(both(graph), count=1), epochs=1)
    page = Page(inspection_page(replace(inspection, train=graph, eval=graph, plan=plan, forecast=None)))
    widths = [
        page.elements[index + 1][1]["width"]
        for index, (_, names) in enumerate(page.elements)
        if names.get("class") == "bar"
    ]
    # The partition; the module, which is a row of two; those; the row of the other four; those.
    assert widths[::3] == ["100%", "33.33%", "50%", "50%", "66.67%", *4 * ["25%"]]


def test_the_timeline_shows_the_role_of_each_partition(inspection: Inspection) -> None:
    plan = Plan(
        schedule="mine",
        partitions=inspection.partitions,
        phases=(Phase(start=0, stop=3, epochs=5), Phase(start=1, stop=2, epochs=3), Phase(start=1, stop=3, epochs=2)),
    )
    page = Page(inspection_page(replace(inspection, plan=plan, forecast=None)))
    spans = [
        (names["class"], names["x"], names["width"])
        for tag, names in page.elements
        if tag == "rect" and names.get("class") in ("training", "settled", "frozen")
    ]
    assert spans == [
        ("training", "0%", "50%"), ("settled", "50%", "50%"),
        ("training", "0%", "100%"),
        ("training", "0%", "50%"), ("frozen", "50%", "30%"), ("training", "80%", "20%"),
    ]  # fmt: skip
    labels = [names.get("aria-label") for tag, names in page.elements if tag == "svg"]
    assert "training in epochs 1 to 5, frozen in epochs 6 to 8, training in epochs 9 to 10" in labels
    assert {"all", "number 2 of 3", "last 2 of 3"} <= set(page.texts["td"])


def test_the_forecast_lies_beside_the_timeline(page: Page, inspection: Inspection) -> None:
    assert inspection.forecast is not None
    assert [text for text in page.texts["td"] if text.endswith(" of standard")] == [
        f"{phase.step_cost:.2f} of standard" for phase in inspection.forecast.phases
    ]
    assert {"time of a step, of standard", "peak memory", "standard: 1.00"} <= set(page.texts["span"])
    assert any(text.startswith("Forecast from shapes alone, batches of 2: ") for text in page.texts["p"])
    first = inspection.forecast.phases[0]
    assert {f"epoch 1: {first.step_cost:.2f}", f"epoch 2: {human(first.peak_bytes, 'B')}"} <= set(page.texts["title"])


def test_what_several_devices_take_has_a_row_each(inspection: Inspection, page: Page) -> None:
    assert not page.having("section", "id", "devices")
    ahead = tuple(
        ScaleForecast(
            kind=kind, devices=count, step_seconds=8 / count, idle_share=0.25, traffic_bytes=2500, peak_bytes=10**6,
            is_fastest=kind == "fsdp",
        )
        for kind, count in (("ddp", 1), ("fsdp", 4096))
    )  # fmt: skip
    cells = Page(inspection_page(replace(inspection, scaling=ahead))).texts["td"]
    last = cells[cells.index("fsdp") - 1 :]
    assert last[:8] == ["4096", "fsdp", "2.0 ms", "4096.00", "25 %", "2.5 kB", "1.0 MB", "yes"]


def test_the_peak_of_the_plan_stands_beside_that_of_standard_training(inspection: Inspection) -> None:
    assert inspection.forecast is not None
    phases = tuple(replace(phase, peak_bytes=2_000_000) for phase in inspection.forecast.phases)
    standard = replace(inspection.forecast.standard, peak_bytes=5_000_000)
    ahead = replace(inspection.forecast, phases=phases, standard=standard)
    page = Page(inspection_page(replace(inspection, forecast=ahead)))
    assert "standard: 5.0 MB" in page.texts["span"]
    assert "epoch 1: 2.0 MB" in page.texts["title"]
    assert "V0.6H1V1Z" in str(page.having("path", "class", "area measured")[1]["d"])


def test_a_run_has_what_was_measured_and_the_forecast_beside_it(report: RunReport, inspection: Inspection) -> None:
    """The first phase took 10 s an epoch; by its costs, the others should take a half of it and 1.5 times as long."""
    assert inspection.forecast is not None
    costs = zip(inspection.forecast.phases, (0.8, 0.4, 1.2), (3_000_000, 2_000_000, 1_000_000), strict=True)
    phases = tuple(replace(phase, step_cost=cost, peak_bytes=peak) for phase, cost, peak in costs)
    standard = replace(inspection.forecast.standard, peak_bytes=4_000_000)
    ahead = replace(inspection, forecast=replace(inspection.forecast, phases=phases, standard=standard))
    page = Page(report_page(report, ahead))
    titles = page.texts["title"]
    assert "epoch 1: training 60.00 %, test 50.00 %" in titles
    assert "epoch 6: training 1.5, test 1.25" in titles
    assert {"epoch 2: 0.1", "epoch 1: 1.0 GB"} <= set(titles)
    assert [title for title in titles if "forecast" in title and title.endswith(" s")] == [
        f"epoch {epoch}: measured 10.0 s, forecast {seconds} s"
        for epoch, seconds in enumerate(("10.0", "10.0", "5.0", "5.0", "15.0", "15.0"), start=1)
    ]
    assert {"standard: 12.5 s", "standard: 4.0 MB"} <= set(page.texts["span"])
    assert {"20.0 s", "3.0 s", "10.0 s", "30.0 s", "3.0 MB", "51.00 %", "53.00 %"} <= set(page.texts["td"])
    assert any("Standard training would take 1 min 15 s for 6 epochs" in text for text in page.texts["p"])
    assert {"55.00 %", "finished", "1 min 12 s"} <= set(page.texts["dd"])


def test_memory_of_a_gpu_stands_beside_its_forecast(
    report: RunReport, epochs: tuple[EpochRecord, ...], inspection: Inspection
) -> None:
    measured = tuple(replace(epoch, peak_allocated_bytes=7_000_000 + epoch.phase) for epoch in epochs)
    page = Page(report_page(replace(report, epochs=measured), inspection))
    assert "peak memory, CUDA" in page.texts["th"]
    assert any(text.startswith("epoch 1: measured 7.0 MB, forecast ") for text in page.texts["title"])
    assert "7.0 MB" in page.texts["td"]
    without = Page(report_page(report, inspection))
    assert "peak memory, CUDA" not in without.texts["th"]
    assert "not available" not in without.texts["td"]


def test_a_run_without_a_forecast_has_what_was_measured(report: RunReport, inspection: Inspection) -> None:
    page = Page(report_page(report, replace(inspection, forecast=None)))
    assert not any("forecast" in text for tag in page.texts.keys() - {"style", "script"} for text in page.texts[tag])
    assert "epoch 2: 10.0 s" in page.texts["title"]


def test_the_learning_rate_of_every_epoch_is_drawn(
    report: RunReport, epochs: tuple[EpochRecord, ...], inspection: Inspection
) -> None:
    cooling = tuple(replace(epoch, lr=0.1 - epoch.epoch / 500) for epoch in epochs)
    page = Page(report_page(replace(report, epochs=cooling), inspection))
    assert {"epoch 1: 0.098", "epoch 6: 0.088"} <= set(page.texts["title"])
    assert {"0.098", "0.088"} <= set(page.texts["td"])
    # On an axis from 0 to 0.1.
    assert "M0.08333 0.02h0" in [str(names["d"])[:15] for names in page.having("path", "class", "curve test")]


def test_on_a_narrow_page_every_cell_has_its_heading(page: Page, run_page: Page) -> None:
    """The names that the style sheet puts before the cells are those of the columns."""
    for found in (page, run_page):
        tags = [(tag, names) for tag, names in found.elements if tag in ("table", "th", "td", "tr")]
        first = next(index for index, (tag, names) in enumerate(tags) if names.get("class") == "stacked")
        count = [tag for tag, _ in takewhile(lambda each: each[0] != "td", tags[first:])].count("th")
        headings = found.texts["th"][:count]
        cells = [str(names["data-name"]) for tag, names in tags[first:] if tag == "td" and "data-name" in names]
        assert cells == headings * 3


def test_lanes_of_a_long_run_are_as_fine_as_pixels(inspection: Inspection) -> None:
    phases = (Phase(start=0, stop=3, epochs=2500), Phase(start=1, stop=3, epochs=1500))
    assert inspection.forecast is not None
    ahead = replace(inspection.forecast, phases=inspection.forecast.phases[:2])
    plan = Plan(schedule="long", partitions=inspection.partitions, phases=phases)
    page = Page(inspection_page(replace(inspection, plan=plan, forecast=ahead)))
    said = [text for text in page.texts["title"] if text.startswith("epoch ")]
    assert len(said) == 2 * 800
    assert said[0].startswith("epoch 3: ")
    time = str(page.having("path", "class", "area measured")[0]["d"])
    assert time.startswith("M0 1V")
    assert time.endswith("H1V1Z")


def test_the_title_says_which_run_it_is(report: RunReport, inspection: Inspection, run_page: Page) -> None:
    assert run_page.texts["title"][0] == "[red]run · file[bold].py:make · fxsplit"
    assert "fxsplit evaluate 'output/train/[red]run' --output evaluation.html" in run_page.texts["code"]
    dated = replace(report, environment={"date_utc": "2026-11-27T11:33:59+00:00"})
    page = Page(report_page(dated, inspection))
    assert page.texts["title"][0] == "[red]run · file[bold].py:make · 2026-11-27 11:33 UTC · fxsplit"
    assert Page(report_page(replace(report, folder=""), inspection)).texts["title"][0] == "file[bold].py:make · fxsplit"


def test_an_epoch_lies_below_its_place_in_the_timeline(report: RunReport, inspection: Inspection) -> None:
    """Also of a run that was interrupted: the epochs that never were stay empty."""
    page = Page(report_page(replace(report, status="interrupted", epochs=report.epochs[:3]), inspection))
    (accuracy, *_) = page.having("path", "class", "curve test")
    # From 50 to 52 % on an axis from 50 to 70 %; epochs in the middles of sixths.
    assert accuracy["d"] == "M0.08333 1h0L0.25 0.95L0.41667 0.9"
    measured, *_ = page.having("path", "class", "area measured")
    assert str(measured["d"]).endswith("H0.5V1Z")


def test_a_run_without_epochs_and_one_that_diverged(
    report: RunReport, epochs: tuple[EpochRecord, ...], inspection: Inspection
) -> None:
    empty = Page(report_page(replace(report, epochs=()), inspection))
    assert "not available" in empty.texts["dd"]
    nan = float("nan")
    lost = tuple(replace(epoch, train_loss=nan, eval_loss=nan) for epoch in epochs)
    diverged = Page(report_page(replace(report, epochs=lost), inspection))
    accuracy, loss = (names["d"] for names in diverged.having("path", "class", "curve training"))
    assert str(accuracy).startswith("M0.08333")
    assert loss == ""


def test_measured_ops_have_a_column_of_their_own(inspection: Inspection) -> None:
    ops = tuple(replace(op, seconds=0.001) for op in inspection.train.ops)
    graph = replace(inspection.train, ops=ops)
    text = inspection_page(replace(inspection, train=graph))
    assert text.count('class="figure seconds"') == 1 + 3 * (1 + 1 + 2)
    assert re.search(r"6\.0 ms|2\.0 ms", text)


def test_few_classes_are_a_table_of_what_their_images_are_taken_for(report: RunReport, inspection: Inspection) -> None:
    """In the order of the classes of the data; an output without a class comes last."""
    counts = {"b": {"b": 3, "a": 1, "output 2": 1}, "a": {"a": 9, "b": 1}}
    page = Page(report_page(replace(report, data={"classes": ["a", "b"]}, confusion=counts), inspection))
    shades = [(names["class"]) for tag, names in page.elements if str(names.get("class")).startswith("shade-")]
    assert shades == ["shade-9", "shade-1", "shade-0", "shade-2", "shade-6", "shade-2", *3 * ["shade-0"]]
    cells = page.texts["td"]
    first = cells.index("9")
    assert cells[first : first + 11] == ["9", "1", "1", "3", "1", "a", "b", "1 of 10", "b", "a", "1 of 5"]
    assert not Page(report_page(report, inspection)).having("table", "class", "confusion")


def test_of_many_classes_the_most_frequent_confusions_are_listed(report: RunReport, inspection: Inspection) -> None:
    names = [f"class {number}" for number in range(31)]
    counts = {name: {name: 50, names[number - 1]: number} for number, name in enumerate(names)}
    page = Page(report_page(replace(report, data={"classes": names}, confusion=counts), inspection))
    assert not page.having("table", "class", "confusion")
    assert [text for text in page.texts["td"] if re.match(r"\d+ of \d", text)] == [
        f"{n} of {50 + n}" for n in range(30, 10, -1)
    ]
    assert "The most frequent among 31 classes." in page.texts["p"]


def test_the_snapshot_ensemble_stands_beside_the_network(
    report: RunReport, epochs: tuple[EpochRecord, ...], inspection: Inspection
) -> None:
    """From the end of the second phase on."""
    tested = tuple(replace(epoch, ensemble_top1={4: 56.25, 6: 57.5}.get(epoch.epoch)) for epoch in epochs)
    page = Page(report_page(replace(report, epochs=tested), inspection))
    assert "after the last epoch; snapshot ensemble 57.50 %" in page.texts["small"]
    assert [text for text in page.texts["td"] if text in ("56.25 %", "57.50 %")] == ["56.25 %", "57.50 %"]
    dots = page.having("circle", "class", "dot ensemble")
    assert [dot["cx"] for dot in dots] == ["58.33%", "91.67%"]
    assert "snapshot ensemble: 4, 56.25 %" in page.texts["title"]
    assert not any("ensemble" in text for text in Page(report_page(report, inspection)).texts["span"])
