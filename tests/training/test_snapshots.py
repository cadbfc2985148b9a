"""The snapshot ensemble over phases: the mean of probabilities, as it is tested and as a run goes on with it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fxsplit
from fxsplit.data.batch import Batch
from fxsplit.training.accuracy import Accuracy, Snapshots, first_choices
from fxsplit.training.evaluator import Evaluator

LABELS = torch.tensor([0, 1, 1])


def test_the_mean_of_probabilities_decides() -> None:
    snapshots = Snapshots()
    snapshots.keep(0, torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]))
    assert snapshots.top1_pct(LABELS) is None
    snapshots.keep(1, torch.tensor([[0.4, 0.6], [0.3, 0.7], [0.5, 0.5]]))
    # Means 0.65, 0.45 and 0.55 of the first class; each alone has the second or the first image wrong.
    assert snapshots.top1_pct(LABELS) == pytest.approx(200 / 3)
    # A phase that lasts longer than planned is kept as it ended.
    snapshots.keep(1, torch.tensor([[0.4, 0.6], [0.3, 0.7], [0.0, 1.0]]))
    assert snapshots.top1_pct(LABELS) == 100
    other = Snapshots()
    other.load_state_dict(snapshots.state_dict())
    assert other.top1_pct(LABELS) == 100


def test_of_equal_scores_all_take_the_class_that_tests_take() -> None:
    scores = torch.zeros(3, 10)
    accuracy = Accuracy(torch.device("cpu"))
    labels = first_choices(scores)
    accuracy.update(torch.zeros(()), scores, labels)
    accuracy.count(3)
    assert accuracy.read().top1_pct == 100
    snapshots = Snapshots()
    for phase in range(2):
        snapshots.keep(phase, scores)
    assert snapshots.top1_pct(labels) == 100
    network = SimpleNamespace(
        executor=nn.Identity(), device=labels.device, autocast=nullcontext, logits=lambda batch: batch.values[0]
    )
    images = SimpleNamespace(held_out=lambda: [(Batch(values=(scores,), labels=labels, ids=torch.arange(3)), 0)])
    assert Evaluator(network, images).held_out().all()


@pytest.mark.usefixtures("one_thread")
def test_a_run_tests_it_at_the_end_of_phases(tmp_path: Path) -> None:
    options = {"img_size": 8, "train_limit": 64, "device": "cpu", "cache": "off", "prove": False}
    spec = fxsplit.RunSpec(
        model="paper:cnn", output=str(tmp_path), schedule="grow", parts=3, epochs=6, ensemble=True, **options
    )
    report = fxsplit.train(spec)
    ends = [report.plan.first_epoch(index) + phase.epochs for index, phase in enumerate(report.plan.phases)]
    tested = {each.epoch: each.ensemble_top1 for each in report.epochs}
    assert [epoch for epoch, accuracy in tested.items() if accuracy is not None] == ends[1:]
    assert len(ends) == 3
    plain = fxsplit.train(replace(spec, ensemble=False))
    assert all(each.ensemble_top1 is None for each in plain.epochs)
    assert [each.eval_top1 for each in plain.epochs] == [each.eval_top1 for each in report.epochs]
