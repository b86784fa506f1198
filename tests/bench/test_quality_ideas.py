"""Ideas about single weights, their metric and their coefficients, held to what their formulas imply."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from r2m.demo.networks import new_detector

from bench.quality import element_ideas
from bench.quality.mobilenet import mobilenet
from r2m_kernels import MergeConfig, merge

AVERAGE = MergeConfig.weight_average()


@pytest.fixture(scope="module")
def networks():
    """A MobileNetV2 whose layers differ, and two that moved from it by different lengths."""
    generator = torch.Generator().manual_seed(0)
    base = new_detector(0, mobilenet).state_dict()
    for name, tensor in base.items():
        if name.endswith(("running_mean", "running_var")):
            tensor.uniform_(0.5, 1.5, generator=generator)

    def moved(size):
        return {
            name: tensor + size * torch.randn(tensor.shape, generator=generator) * tensor.abs().mean()
            if tensor.dim() in (2, 4)
            else tensor
            for name, tensor in base.items()
        }

    return dict(sorted(base.items())), [moved(0.01), moved(0.03)]  # in no order, as from a file


def near(one, other):
    return all(torch.allclose(one[name], other[name], rtol=1e-5, atol=1e-7) for name in other)


def test_the_largest_weights_are_a_share_of_each_expert():
    tau = torch.randn(3, 8, 25, generator=torch.Generator().manual_seed(0))
    kept = element_ideas._largest(tau, 0.2)
    assert (kept != 0).sum((1, 2)).tolist() == [40, 40, 40]
    for whole, some in zip(tau, kept, strict=True):
        assert some[some != 0].abs().min() >= whole[some == 0].abs().max()


def test_all_of_every_specialist_is_the_rule_itself(networks):
    base, experts = networks
    (trimmed,) = element_ideas.trimmed(base, experts, density=1.0, then=AVERAGE)
    assert near(trimmed, merge(base, experts, AVERAGE))


def test_a_restored_classifier_is_as_long_as_the_specialists(networks):
    base, experts = networks
    (state,) = element_ideas.head_restored(base, experts, then=AVERAGE)
    lengths = [(one["head.weight"] - base["head.weight"]).norm() for one in (state, *experts)]
    assert float(lengths[0]) == pytest.approx(float(torch.stack(lengths[1:]).mean()), rel=1e-5)
    (plain,) = element_ideas.head_restored(base, experts, then=AVERAGE, scale=1.0)
    assert near(plain, merge(base, experts, AVERAGE))


def test_an_average_is_the_same_in_any_metric_and_others_are_not(networks):
    base, experts = networks
    (average,) = element_ideas.in_metric(base, experts, then=AVERAGE)
    assert near(average, merge(base, experts, AVERAGE))
    iso = MergeConfig.iso_c(1.0)
    (other,) = element_ideas.in_metric(base, experts, then=iso)
    assert not near(other, merge(base, experts, iso))


def test_the_metric_of_a_filter_is_of_its_input_and_its_output(networks):
    base, _ = networks
    before = element_ideas._metric(base)
    assert len(before) == sum(tensor.dim() == 4 for tensor in base.values())
    stem, by_channel, narrowing = list(before)[:3]

    def changed(norm, filters, places):
        louder = {**base, norm: base[norm].clone()}
        louder[norm][5] *= 2  # of one channel
        after = element_ideas._metric(louder)[filters] / before[filters]
        return (after.amax(places) > 1.1).nonzero().flatten().tolist()

    assert changed("backbone.features.0.1.weight", stem, (1, 2, 3)) == [5]  # its output
    assert changed("backbone.features.0.1.weight", by_channel, (1, 2, 3)) == [5]  # its input and its output
    assert changed("backbone.features.1.conv.0.1.weight", narrowing, (0, 2, 3)) == [5]  # an input of all outputs
    assert not changed("backbone.features.0.1.weight", narrowing, (0, 2, 3))  # behind the next normalisation


@pytest.mark.slow
def test_coefficients_start_at_the_average_and_move(networks):
    base, experts = networks
    average = merge(base, experts, AVERAGE)
    start = element_ideas.distilled(base, experts, steps=0, batch=2)
    assert near(start, average)
    assert not near(element_ideas.distilled(base, experts, steps=1, batch=2), average)


def test_dead_leaves_are_pictures_and_the_same_again():
    made = element_ideas.dead_leaves(2, 24, np.random.default_rng(3))
    assert made.shape == (2, 24, 24)
    assert made.dtype == np.float32
    assert 0 <= made.min() < made.max() <= 1
    assert np.array_equal(made, element_ideas.dead_leaves(2, 24, np.random.default_rng(3)))
