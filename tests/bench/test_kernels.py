"""Operators over sizes: both sides compute the same, what is wrong is seen, and the page is what was measured."""

from __future__ import annotations

import json

import pytest
import torch

from bench import kernels
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
    content = json.loads((RESULTS / "kernels_cpu.json").read_text())
    assert (ROOT / "docs" / "kernels.md").read_text() == kernels.page(content), kernels.COMMAND
    assert (RESULTS / "kernels_cpu.csv").read_text() == kernels.csv_of(content)
    assert not [one for one in content["wrong"] if one.startswith("r2m")]
    measured = {(one["operator"], one["provider"]) for one in content["rows"]}
    assert measured == {(one.name, provider) for one in kernels.OPERATORS for provider in kernels.PROVIDERS}
    assert torch.tensor([one["share_of_roof"] for one in content["rows"]]).gt(0).all()
