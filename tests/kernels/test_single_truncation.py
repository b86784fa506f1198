"""Truncations of single experts that are kept: with them, in any order of coming and going, the bits are the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from r2m_kernels import MergeConfig, analyze
from r2m_kernels.streaming import Factors, choose_backend, depends_on_others

SHAPES = {"tall": (130, 70), "wide": (70, 150), "square": (96, 96), "small": (40, 90), "conv": (24, 5, 3, 3), "b": (9,)}
METHODS = {
    "star": MergeConfig.star(),
    "mono_soup": MergeConfig.mono_soup(),
    "by rows": MergeConfig.r2m(real_rank=0),
    "a tenth": MergeConfig.r2m(real_rank=0, rank=0.1, row_power=0, whole_up_to=0),
    "textbook": MergeConfig.r2m(real_rank=0, svd="textbook", row_power=0),
    "exact": MergeConfig.r2m(real_rank=0, svd="exact", weights=(1, 2, 3, 4)),
}


class Kept:
    """In memory, with what was asked and put."""

    def __init__(self) -> None:
        self.there: dict[tuple[str, str], Factors] = {}
        self.put_names: list[tuple[str, str]] = []

    def get(self, tensor: str, expert: str) -> Factors | None:
        return self.there.get((tensor, expert))

    def put(self, tensor: str, expert: str, factors: Factors) -> None:
        self.put_names.append((tensor, expert))
        self.there[tensor, expert] = factors


def specialists(steep: str = "", dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Four, one of which may have task vectors that are too steep for the fast truncation."""
    generator = torch.Generator().manual_seed(3)
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    experts = {}
    for name in "abcd":
        change = {key: 0.1 * torch.randn(one.shape, generator=generator) for key, one in base.items()}
        if name == steep:
            u, s, v = torch.linalg.svd(change["square"])
            change["square"] = u @ (10.0 ** -torch.linspace(0, 9, len(s)) * v.T).T
        experts[name] = {key: (one.float() + change[key]).to(dtype) for key, one in base.items()}
    return base, experts


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "method", [name if name in ("star", "by rows") else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_they_come_in_any_order_and_go(method: str) -> None:
    base, experts = specialists()
    config, kept = METHODS[method], Kept()

    def weighted(names: tuple[str, ...]) -> MergeConfig:
        if config.weights is None:
            return config
        return config.replace(weights=tuple(config.weights["abcd".index(name)] for name in names))

    sets = [("c",), ("c", "a"), ("c", "a", "d", "b"), ("a", "d", "b"), ("d", "b"), ("b", "c", "d")]
    for names in sets:
        some = {name: experts[name] for name in names}
        alone = analyze(base, some, weighted(names), backend="native")
        taken = analyze(base, some, weighted(names), backend="native", kept=kept)
        assert same(alone.merge(), taken.merge()), names
        one, two = (analysis.report(weighted(names)) for analysis in (alone, taken))
        assert (one["residual"], one["tensors"]) == (two["residual"], two["tensors"])
    assert len(kept.put_names) == len(set(kept.put_names)) == 4 * len({name for name, _ in kept.put_names}) > 0


@pytest.mark.slow
def test_one_by_one_in_all_orders_is_the_merge_of_the_set() -> None:
    base, experts = specialists()
    for order in itertools.permutations("abc"):
        kept = Kept()
        for count in range(1, 4):
            some = {name: experts[name] for name in order[:count]}
            found = analyze(base, some, MergeConfig.star(), backend="native", kept=kept).merge()
        assert same(found, analyze(base, some, MergeConfig.star(), backend="native").merge())
        assert len(kept.put_names) == 3 * len({name for name, _ in kept.put_names})


@pytest.mark.parametrize("first", ["steep first", "steep last"])
def test_one_that_is_too_steep_takes_all_of_its_tensor_along(first: str) -> None:
    base, experts = specialists(steep="b")
    kept, config = Kept(), MergeConfig.r2m(real_rank=0, rank=0.3, row_power=0)
    orders = ("ba", "ca", "cab") if first == "steep first" else ("ca", "cab", "ca")
    for order in orders:
        some = {name: experts[name] for name in order}
        alone, taken = (analyze(base, some, config, backend="native", kept=one) for one in (None, kept))
        assert same(alone.merge(), taken.merge())
        assert alone.report(config)["tensors"] == taken.report(config)["tensors"]
    assert ("square", "b") not in kept.there
    assert ("tall", "b") in kept.there


def test_factors_of_another_type_or_shape_count_as_none() -> None:
    base, experts = specialists()
    kept, config = Kept(), MergeConfig.star()
    analyze(base, experts, config, backend="native", kept=kept)
    wide = {**experts, "d": {name: one.double() for name, one in experts["d"].items()}}
    found = analyze(base, wide, config, backend="native", kept=kept).merge()
    assert same(found, analyze(base, wide, config, backend="native").merge())
    kept.there = {(name, expert): kept.there["wide", expert] for name, expert in kept.there}
    found = analyze(base, experts, config, backend="native", kept=kept).merge()
    assert same(found, analyze(base, experts, config, backend="native").merge())


@pytest.mark.parametrize(
    ("config", "backend", "clause"),
    [
        (MergeConfig.r2m(), "native", "its residuals all change with every expert that comes"),
        (MergeConfig.weight_average(), "native", "this method truncates nothing"),
        (MergeConfig.tsv_m(), "native", "its ranks, and its bases, change with the number of experts"),
        (MergeConfig.score(), "native", "its ranks, and its bases, change with the number of experts"),
        (
            MergeConfig.r2m(real_rank=0, tolerance=0.1),
            "native",
            "with a tolerance all experts of a tensor stop together",
        ),
        (MergeConfig.star(), "torch", "only the native backend makes of an expert the same bits"),
        (MergeConfig.star(), "native", ""),
    ],
)
def test_what_cannot_be_kept_says_why(config: MergeConfig, backend: str, clause: str) -> None:
    operators = choose_backend(backend, torch.device("cpu")).operators
    said = depends_on_others(config, operators)
    assert said.startswith(clause)
    assert bool(said) is bool(clause)
    if clause:
        base, experts = specialists()
        kept = Kept()
        analyze(base, experts, config, backend=backend, kept=kept)
        assert not kept.there
