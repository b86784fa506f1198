"""Operators over sizes: both sides compute the same, what is wrong is seen, and the page is what was measured."""

from __future__ import annotations

import sys

import pytest
import torch

from bench import calls, kernels
from bench.machine import RESULTS, ROOT


@pytest.mark.parametrize("operator", kernels.OPERATORS, ids=lambda one: one.name)
def test_both_sides_are_right_and_a_mistake_is_seen(operator):
    x = kernels.Inputs.of(48, "cpu")
    assert kernels.wrong(operator, operator.ours, x) == kernels.wrong(operator, operator.plain, x) == ""
    assert "off by" in kernels.wrong(operator, lambda x: operator.ours(x) * 1.001, x)


def test_nobody_is_under_the_floor_of_bytes_and_products():
    x = kernels.Inputs.of(48, "cpu")
    for operator in kernels.OPERATORS:
        moved, least = kernels.floor(operator, x, 1e9, 1e9)
        assert least >= moved / 1e9 > 0


def test_the_page_is_what_was_measured():
    content, of_calls = kernels.last()
    assert (ROOT / "docs" / "kernels.md").read_text() == kernels.page(content, of_calls), kernels.COMMAND
    assert (RESULTS / "kernels_cpu.csv").read_text() == kernels.csv_of(content)
    assert not [one for one in content["wrong"] if one.startswith("r2m")]
    measured = {(one["operator"], one["provider"]) for one in content["rows"]}
    assert measured == {(one.name, provider) for one in kernels.OPERATORS for provider in kernels.PROVIDERS}
    assert torch.tensor([one["share_of_roof"] for one in content["rows"]]).gt(0).all()


def functions_called(call):
    """How many functions, of Python and C, a call goes through: what it takes, without a clock."""
    count = 0

    def seen(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    call()  # what is done once
    sys.setprofile(seen)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("backend", calls.BACKENDS)
def test_a_call_goes_through_few_functions_beyond_the_backends(backend):
    beyond = {
        name: functions_called(ours) - functions_called(raw) for name, (raw, ours) in calls.pairs(backend).items()
    }
    assert beyond.pop(calls.NOTHING) < 10  # with PyTorch's own ways, by register_autograd, the others were 40 to 126
    assert len(beyond) == 10
    assert max(beyond.values()) <= 60, beyond


def test_what_calls_cost_is_measured_for_every_operator():
    _, of_calls = kernels.last()
    measured = {(row["operator"], row["backend"]) for row in of_calls["rows"]}
    assert measured == {(name, backend) for backend in calls.BACKENDS for name in calls.pairs(backend)}
