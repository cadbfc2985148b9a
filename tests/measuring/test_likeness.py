"""How far images lie from those of a pretraining, beside the same numbers worked out by hand."""

from __future__ import annotations

import math

import torch
from torch import nn

from fxsplit.measuring.likeness import divergence


def test_the_divergence_is_that_of_two_normal_distributions() -> None:
    """By quadrature, channel by channel; the median of three channels, and the mean of two norms."""
    torch.manual_seed(0)
    first, second, unused = nn.BatchNorm2d(3, eps=0.0), nn.BatchNorm1d(3, eps=0.0), nn.BatchNorm2d(3)
    net = nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), second)
    for norm in (first, second):
        norm.running_mean = torch.tensor([0.5, -1.0, 0.1])
        norm.running_var = torch.tensor([0.3, 2.0, 0.7])
    images = torch.randn(16, 3, 4, 4) * torch.tensor([1.0, 2.0, 0.5])[:, None, None] + 0.2
    net.eval()
    reached = images.transpose(0, 1).flatten(1), net[:4](images).detach().T
    x = torch.linspace(-30, 30, 60001, dtype=torch.float64)
    medians = []
    for values in reached:
        channels = []
        for value, known, spread in zip(values, first.running_mean, first.running_var, strict=True):
            here = torch.distributions.Normal(value.double().mean(), value.double().std(correction=0)).log_prob(x)
            there = torch.distributions.Normal(known.double(), spread.double().sqrt()).log_prob(x)
            channels.append(float(torch.trapezoid(here.exp() * (here - there), x)))
        medians.append(sorted(channels)[1])
    net.train()
    found = divergence(net, [first, second, unused], images)
    assert found is not None
    assert math.isclose(found, sum(medians) / 2, rel_tol=1e-4)
    assert divergence(net, [unused], images) is None


def test_the_model_stays_as_it_is() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    net[2].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    divergence(net, [net[1]], torch.ones(2, 3, 5, 5))
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in net.modules()] == [True, True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not net[1]._forward_pre_hooks
