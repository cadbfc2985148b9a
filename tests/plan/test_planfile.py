"""Plan files: what is written is read, what is edited is worked out anew, and all that is wrong is told at once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxsplit.errors import FxsplitError, PartitionError, UsageError
from fxsplit.graph import Graph, Op, State, Value
from fxsplit.plan.partition import partition
from fxsplit.plan.plandiff import Change, diff
from fxsplit.plan.planfile import CUT, PHASE_KEYS, NamedPhase, PlanFile, from_dict, read, read_file, write_file
from fxsplit.plan.schedule import SCHEDULES, Phase, Plan, schedule
from tests.pairs import both


def graph(*names: str) -> Graph:
    """Ops in a row, each a module with a weight; the n-th costs n multiply-adds."""
    ops = tuple(
        Op(
            name=name,
            path=name,
            kind="module",
            target="Linear",
            reads=(before,),
            output=Value(name=name, shape=(2, 3), dtype="float32", bytes_per_sample=12),
            state=(f"{name}.w",),
            macs=number,
        )
        for number, (before, name) in enumerate(zip(("x", *names), names, strict=False), start=1)
    )
    return Graph(
        batch_size=2,
        inputs=(Value(name="x", shape=(2, 3), dtype="float32", bytes_per_sample=12),),
        ops=ops,
        outputs=(names[-1],),
        state=tuple(
            State(name=f"{name}.w", shape=(3,), dtype="float32", bytes=12, is_parameter=True) for name in names
        ),
    )


NET = graph("stem", "layer1.0", "layer1.1", "layer2", "layer3", "head")
PLAN = Plan(
    schedule="settle",
    partitions=partition(both(NET), at=["layer1", "layer2", "layer3"]),
    phases=(
        Phase(start=0, stop=4, epochs=7),
        Phase(start=1, stop=4, epochs=1),
        Phase(start=2, stop=4, epochs=4),
    ),
)


def file_of(plan: Plan, net: Graph = NET) -> PlanFile:
    return PlanFile.of(plan, model="my:net", graph=net.digest(), torch="2.14.0")


def edited(change: Callable[[dict[str, Any]], object], plan: Plan = PLAN) -> str:
    """The file of a plan after an edit by hand."""
    data = json.loads(file_of(plan).to_json())
    change(data)
    return json.dumps(data)


def planned(text: str, net: Graph = NET) -> Plan:
    return read(text, origin="p.json", modes=both(net)).plan(both(net))


# Reading back


@given(
    st.sampled_from(sorted(SCHEDULES)),
    st.lists(st.sampled_from([op.name for op in NET.ops[1:]]), unique=True),
    st.integers(1, 40),
)
def test_a_plan_survives_its_file(name: str, at: list[str], epochs: int) -> None:
    parts = partition(both(NET), at=at) if at else partition(both(NET), count=1)
    plan = schedule(name, partitions=parts, epochs=epochs)
    text = file_of(plan).to_json()
    assert read(text, origin="p.json") == file_of(plan)
    assert read(text, origin="p.json").to_json() == text
    assert planned(text) == plan


def test_the_text_of_a_plan_file_is_frozen() -> None:
    def derived(index: int, name: str, ops: str, ends: str, state: str, figures: str) -> str:
        return (
            f'    {{"index": {index}, "name": "{name}", {ops}, {ends}, "state": [{state}], {figures}, '
            '"activation_bytes": 0, "boundary_bytes": 12}'
        )

    def ops(start: int, stop: int) -> str:
        return f'"start": {start}, "stop": {stop}, "eval_start": {start}, "eval_stop": {stop}'

    def ends(reads: str, writes: str) -> str:
        return f'"reads": ["{reads}"], "writes": ["{writes}"]'

    def figures(parameters: int, macs: int) -> str:
        return f'"parameters": {parameters}, "state_bytes": {4 * parameters}, "macs": {macs}'

    assert file_of(replace(PLAN, preset="l2l")).to_json() == (
        "{\n"
        '  "schema": 3,\n'
        '  "model": "my:net",\n'
        f'  "graph": "{NET.digest()}",\n'
        '  "torch": "2.14.0",\n'
        '  "preset": "l2l",\n'
        '  "schedule": "settle",\n'
        '  "cuts": [\n    "layer1",\n    "layer2",\n    "layer3"\n  ],\n'
        '  "phases": [\n'
        '    {"from": null, "up_to": null, "epochs": 7, "fresh_optimizer": false, "recompute_up_to": null},\n'
        '    {"from": "layer1", "up_to": null, "epochs": 1, "fresh_optimizer": false, "recompute_up_to": null},\n'
        '    {"from": "layer2", "up_to": null, "epochs": 4, "fresh_optimizer": false, "recompute_up_to": null}\n'
        "  ],\n"
        '  "derived": [\n'
        + ",\n".join(
            [
                derived(0, "stem", ops(0, 1), ends("x", "stem"), '"stem.w"', figures(3, 1)),
                derived(1, "layer1", ops(1, 3), ends("stem", "layer1.1"), '"layer1.0.w", "layer1.1.w"', figures(6, 5)),
                derived(2, "layer2", ops(3, 4), ends("layer1.1", "layer2"), '"layer2.w"', figures(3, 4)),
                derived(3, "layer3", ops(4, 6), ends("layer2", "head"), '"layer3.w", "head.w"', figures(6, 11)),
            ]
        )
        + "\n  ]\n}\n"
    )


def test_a_record_of_a_plan_gives_it_back_without_a_model() -> None:
    phases = (
        Phase(start=0, stop=3, epochs=2, fresh_optimizer=True, recompute=2, segmented=True),
        Phase(start=1, stop=4, epochs=1, micro_batches=4),
    )
    plan = Plan(schedule="mine", preset="l2l", partitions=PLAN.partitions, phases=phases)
    data = file_of(plan).to_dict()
    assert from_dict(json.loads(json.dumps(data)), origin="p.json").recorded_plan() == plan
    assert json.loads(file_of(plan).to_json()) == json.loads(json.dumps(data))
    with pytest.raises(PartitionError, match="does not say of which partitions"):
        from_dict({**data, "derived": data["derived"][:2]}, origin="p.json").recorded_plan()


def test_every_field_of_a_phase_has_a_key() -> None:
    for kind in (Phase, NamedPhase):
        assert [item.name for item in fields(kind)] == [key.field for key in PHASE_KEYS]
        defaults = {item.name: item.default for item in fields(kind) if item.default is not MISSING}
        rules = {key.field: (key.default, key.rule) for key in PHASE_KEYS}
        assert all(rules[name][0] == default or rules[name][1] is CUT for name, default in defaults.items())


def test_what_recomputes_is_named_by_its_cut() -> None:
    phases = '[{"from": "layer1", "recompute_up_to": "layer3", "epochs": 2}]'
    text = '{"schema": 3, "schedule": "mine", "cuts": ["layer1", "layer2", "layer3"], "phases": %s}'
    plan = planned(text % phases)
    assert plan.phases == (Phase(start=1, stop=4, epochs=2, recompute=3),)
    assert planned(file_of(plan).to_json()) == plan
    with pytest.raises(PartitionError, match="cannot recompute up to 'layer1', outside of what trains"):
        planned(text % phases.replace("layer3", "layer1"))
    segmented = planned(text % phases.replace('"epochs"', '"segmented": true, "epochs"'))
    assert segmented.phases == (Phase(start=1, stop=4, epochs=2, recompute=3, segmented=True),)
    assert planned(file_of(segmented).to_json()) == segmented
    with pytest.raises(UsageError, match="segmented is true, but there is no recompute_up_to"):
        planned(text % '[{"segmented": true, "epochs": 2}]')
    with pytest.raises(UsageError, match="recompute_up_to is 'layer4', which is none of the cuts"):
        planned(text % phases.replace("layer3", "layer4"))


def test_micro_batches_are_written_where_there_are_any() -> None:
    text = edited(lambda data: data["phases"][1].update(micro_batches=4))
    plan = planned(text)
    assert [phase.micro_batches for phase in plan.phases] == [1, 4, 1]
    again = file_of(plan).to_json()
    assert again.count("micro_batches") == 1
    assert planned(again) == plan
    (change,) = diff(file_of(PLAN), file_of(plan))
    assert (change.before, change.after) == ("from layer1, 1 epoch", "from layer1, 1 epoch, 4 micro-batches")


def test_a_file_may_be_written_by_hand() -> None:
    phases = '[{"epochs": 2}, {"up_to": "layer2", "epochs": 1}]'
    plan = planned(f'{{"schema": 3, "schedule": "mine", "cuts": ["layer2"], "phases": {phases}}}')
    assert (plan.schedule, plan.partitions) == ("mine", partition(both(NET), at=["layer2"]))
    assert plan.phases == (Phase(start=0, stop=2, epochs=2), Phase(start=0, stop=1, epochs=1))


def test_files_on_disk(tmp_path: Path) -> None:
    path = str(tmp_path / "plan.json")
    write_file(file_of(PLAN), path)
    assert read_file(path) == file_of(PLAN)
    with pytest.raises(UsageError, match=r"the plan '.*none.json' cannot be read: No such file"):
        read_file(str(tmp_path / "none.json"))
    with pytest.raises(UsageError, match=r"cannot be written: .*; choose another path"):
        write_file(file_of(PLAN), str(tmp_path / "none" / "plan.json"))
    (tmp_path / "image.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="it is no text"):
        read_file(str(tmp_path / "image.json"))


# Editing


def test_an_edited_cut_is_worked_out_anew() -> None:
    def move(data: dict[str, Any]) -> None:
        data["cuts"][0] = "layer1.1"
        data["phases"][1].update({"from": "layer1.1", "epochs": 5})

    plan = planned(edited(move))
    assert plan.partitions == partition(both(NET), at=["layer1.1", "layer2", "layer3"])
    assert [(phase.start, phase.stop, phase.epochs) for phase in plan.phases] == [(0, 4, 7), (1, 4, 5), (2, 4, 4)]


def test_a_further_cut_moves_no_phase() -> None:
    """In whatever order the cuts are written, and by whichever of its names a place is called."""

    def add(data: dict[str, Any]) -> None:
        data["cuts"] += ["head", "layer1.1"]
        data["cuts"][0] = data["phases"][1]["from"] = "layer1.0"

    plan = planned(edited(add))
    assert plan.partitions == partition(both(NET), at=["layer1", "layer1.1", "layer2", "layer3", "head"])
    assert [(phase.start, phase.stop) for phase in plan.phases] == [(0, 6), (1, 6), (3, 6)]


def test_derived_figures_are_never_believed() -> None:
    text = edited(lambda data: data["derived"][0].update(macs=10**9))
    assert planned(text) == PLAN
    assert planned(edited(lambda data: data.pop("derived"))) == PLAN


def test_a_plan_may_be_used_for_another_model_that_has_its_places() -> None:
    wider = graph("stem", "layer1", "layer2", "more", "layer3")
    plan = planned(file_of(PLAN).to_json(), wider)
    assert plan.partitions == partition(both(wider), at=["layer1", "layer2", "layer3"])


# What is wrong


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda plan: plan.update(author="me"), "the key 'author' is not known"),
        (lambda plan: plan.update(cut=plan.pop("cuts")), "the key 'cut' is not known; did you mean 'cuts'?"),
        (lambda plan: plan.pop("cuts"), "the key 'cuts' is missing"),
        (lambda plan: plan.pop("schedule"), "the key 'schedule' is missing"),
        (lambda plan: plan.update(schedule=""), 'schedule is "", but must be a name'),
        (lambda plan: plan.update(model=3), "model is 3, but must be text"),
        (lambda plan: plan.update(preset="l3l"), 'preset is "l3l", but must be one of none, l2l'),
        (lambda plan: plan.update(preset=["l2l"]), 'preset is ["l2l"], but must be one of none, l2l'),
        (lambda plan: plan.update(cuts="layer1"), 'cuts is "layer1", but must be a list of module paths'),
        (lambda plan: plan.update(cuts=["layer1", 2]), "but must be a list of module paths"),
        (lambda plan: plan["cuts"].append("layer1"), "the cut 'layer1' is given twice"),
        (lambda plan: plan.update(phases=[]), "phases is [], but must be a list of 1 to 2000 phases"),
        (lambda plan: plan.update(phases=[3]), "phases is [3], but must be a list of 1 to 2000 phases"),
        (lambda plan: plan["derived"][0].pop("macs"), "but must be as it was saved, or left out"),
        (lambda plan: plan["derived"][0].update(state=[1]), "but must be as it was saved, or left out"),
        (lambda plan: plan["derived"][0].update(stop=0), "but must be as it was saved, or left out"),
        (lambda plan: plan["derived"].append(3), "but must be as it was saved, or left out"),
        (lambda plan: plan["phases"][0].pop("epochs"), "phase 1: the key 'epochs' is missing"),
        (
            lambda plan: plan["phases"][1].update(epoch=3),
            "phase 2: the key 'epoch' is not known; did you mean 'epochs'?",
        ),
        (
            lambda plan: plan["phases"][0].update(epochs=0),
            "phase 1: epochs is 0, but must be a whole number at least 1",
        ),
        (
            lambda plan: plan["phases"][0].update(epochs=10**300),
            ", but must be a whole number at least 1 and at most 1000000",
        ),
        (lambda plan: plan["phases"][0].update(epochs=True), "phase 1: epochs is true, but must be a whole number"),
        (lambda plan: plan["phases"][0].update(epochs="3"), 'phase 1: epochs is "3", but must be a whole number'),
        (lambda plan: plan["phases"][0].update(fresh_optimizer=1), "fresh_optimizer is 1, but must be true or false"),
        (
            lambda plan: plan["phases"][0].update(micro_batches=0),
            "phase 1: micro_batches is 0, but must be a whole number at least 1",
        ),
        (lambda plan: plan["phases"][0].update(up_to=2), "phase 1: up_to is 2, but must be one of the cuts or null"),
        (
            lambda plan: plan["phases"][2].update({"from": "layer4"}),
            "phase 3: from is 'layer4', which is none of the cuts; did you mean 'layer3' or 'layer2'?",
        ),
    ],
)
def test_what_is_no_plan(change: Callable[[dict[str, Any]], object], fault: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(edited(change), origin="p.json")
    assert str(caught.value).startswith("the plan 'p.json' cannot be used: ")
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the plan 'p.json' is not valid JSON near line 1: "),
        ("[" * 100_000, "the plan 'p.json' is nested too deeply for a plan"),
        ("[]", "the plan 'p.json' must be a JSON object, with the keys schema, model, graph, torch, preset, schedule"),
        ('{"schema": 4, "stages": []}', "has schema 4, and this version reads 3; save the plan anew"),
        ('{"schema": 1, "partitions": []}', "has schema 1, and this version reads 3; save the plan anew"),
        ("{}", "cannot be used: the key 'schema' is missing; the key 'schedule' is missing; the key 'cuts' is missing"),
    ],
)
def test_what_is_no_plan_at_all(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        read(text, origin="p.json")


def test_all_that_is_wrong_is_told_at_once() -> None:
    def spoil(data: dict[str, Any]) -> None:
        data["cuts"] = ["layer1", "layer9", "stem"]
        data["phases"][0]["epochs"] = 0
        data["author"] = "me"

    with pytest.raises(UsageError) as caught:
        planned(edited(spoil))
    assert str(caught.value) == (
        "the plan 'p.json' cannot be used: the key 'author' is not known; "
        "phase 1: epochs is 0, but must be a whole number at least 1 and at most 1000000; "
        "phase 3: from is 'layer2', which is none of the cuts; did you mean 'layer9' or 'layer1'?; "
        "no operation of the model lies in 'layer9'; did you mean 'layer3' or 'layer2'?; "
        "the model cannot be cut before 'stem': it holds the first operation of the model; "
        "it can be cut before 'layer1'"
    )


def test_a_misspelt_key_is_told_once() -> None:
    def misspell(data: dict[str, Any]) -> None:
        data["shedule"] = data.pop("schedule")
        data["phases"][1]["epoch"] = data["phases"][1].pop("epochs")
        data["phases"][2].pop("epochs")

    with pytest.raises(UsageError) as caught:
        planned(edited(misspell))
    assert str(caught.value) == (
        "the plan 'p.json' cannot be used: the key 'shedule' is not known; did you mean 'schedule'?; "
        "phase 2: the key 'epoch' is not known; did you mean 'epochs'?; phase 3: the key 'epochs' is missing"
    )


def test_a_plan_that_no_longer_fits_says_where() -> None:
    text = file_of(PLAN).to_json()
    changed = graph("stem", "layer1", "layer2.0", "tail")
    with pytest.raises(PartitionError) as caught:
        planned(text, changed)
    assert str(caught.value) == (
        "the plan 'p.json' cannot be used (it was made for another model than this one): "
        "no operation of the model lies in 'layer3'; did you mean 'layer2' or 'layer1'?"
    )
    overwriting = replace(NET, ops=(*NET.ops[:4], replace(NET.ops[4], mutates=("layer2",)), *NET.ops[5:]))
    with pytest.raises(PartitionError) as caught:
        planned(text, overwriting)
    assert str(caught.value) == (
        "the plan 'p.json' cannot be used: the model cannot be cut before 'layer3': op 'layer3' writes in place into "
        "the value 'layer2' after it; it can be cut before 'layer2' or 'head'"
    )


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ({"from": "layer2", "up_to": "layer1"}, "phase 3 of the plan trains nothing: 'layer1' is not after 'layer2'"),
        ({"from": "layer2", "up_to": "layer2"}, "phase 3 of the plan trains nothing: 'layer2' is not after 'layer2'"),
        ({"from": None, "up_to": "layer3"}, "partition 0 is settled by an earlier phase"),
    ],
)
def test_phases_that_cannot_run(window: dict[str, Any], message: str) -> None:
    with pytest.raises(FxsplitError, match=re.escape(message)) as caught:
        planned(edited(lambda data: data["phases"][2].update(window)))
    assert caught.type is PartitionError


# Comparing


def test_a_plan_does_not_differ_from_itself() -> None:
    assert diff(file_of(PLAN), file_of(PLAN)) == ()


def test_every_difference_is_told() -> None:
    parts = partition(both(NET), at=["layer1.1", "layer2", "layer3", "head"])
    other = Plan(
        schedule="mine",
        preset="l2l",
        partitions=parts,
        phases=(Phase(start=0, stop=5, epochs=7), Phase(start=1, stop=4, epochs=1, fresh_optimizer=True)),
    )
    assert diff(file_of(PLAN), replace(file_of(other), torch="2.15.0")) == (
        Change(what="torch", before="2.14.0", after="2.15.0"),
        Change(what="preset", before="none", after="l2l"),
        Change(what="schedule", before="settle", after="mine"),
        Change(what="cut", before="layer1", after="layer1.1"),
        Change(what="cut", before=None, after="head"),
        Change(
            what="phase 2", before="from layer1, 1 epoch", after="from layer1.1 up to head, 1 epoch, fresh optimizer"
        ),
        Change(what="phase 3", before="from layer2, 4 epochs", after=None),
        Change(
            what="partition stem",
            before={"ops": 1, "parameters": 3, "macs": 1},
            after={"ops": 2, "parameters": 6, "macs": 3},
        ),
        Change(
            what="partition layer3",
            before={"ops": 2, "parameters": 6, "macs": 11},
            after={"ops": 1, "parameters": 3, "macs": 5},
        ),
        Change(what="largest partition", before={"macs": 11}, after={"macs": 6}),
        Change(what="partitions", before=4, after=5),
        Change(what="epochs", before=12, after=8),
    )


def test_figures_that_belong_to_other_cuts_are_not_compared() -> None:
    moved = read(edited(lambda data: data["cuts"].__setitem__(2, "head")), origin="p.json")
    assert moved.derived == ()
    assert diff(file_of(PLAN), moved) == (Change(what="cut", before="layer3", after="head"),)


def test_a_phase_in_words() -> None:
    assert str(NamedPhase(start=None, stop=None, epochs=1)) == "all, 1 epoch"
    assert (
        str(NamedPhase(start="a", stop="b", epochs=2, fresh_optimizer=True))
        == "from a up to b, 2 epochs, fresh optimizer"
    )
    saving = NamedPhase(start=None, stop=None, epochs=1, recompute="c", segmented=True, micro_batches=2)
    assert str(saving) == "all, 1 epoch, recomputes up to c in segments, 2 micro-batches"
