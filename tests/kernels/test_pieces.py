"""Tensors that exceed their share of a memory budget are merged in parts, inputs that fit are read once: same bits."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from cases import ROWS, TRUNCATED, matrix_with, same_bits, spectrum

from r2m_kernels import InvalidInput, MergeConfig, analyze, merge
from r2m_kernels._stream.state_dicts import StateDictSink, StateDictSource
from r2m_kernels._stream.tensors import TensorSpec

METHODS = {
    "R2M": MergeConfig.r2m(),
    "by rows": ROWS,
    "whole": MergeConfig.r2m(rank=1.0, row_power=0.0),
    "by rows, scaled by layer": ROWS.replace(scale="layer"),
    "by rows, scaled by column": ROWS.replace(scale="column"),
    "truncated": TRUNCATED,
    "truncated by rows": ROWS.replace(rank=0.1),
    "average": MergeConfig.weight_average(),
    "TIES": MergeConfig.ties(),
    "DARE": MergeConfig.dare(),
    "TIES by column": MergeConfig.ties().replace(scale="column"),
    "DARE by column": MergeConfig.dare().replace(scale="column"),
    "excluded": ROWS.replace(exclude=("wide",)),
}
BUDGET = 2**20  # a part of any of the large tensors below is one granule


def checkpoints(count: int = 3, dtype: torch.dtype = torch.float32) -> tuple[dict, list[dict]]:
    """A tall, a wide and a four-dimensional matrix of several panels, a long vector, statistics and integers."""
    generator = torch.Generator().manual_seed(0)

    def state(base: dict | None) -> dict:
        shapes = {
            "tall": (4099, 640),
            "wide": (40, 30_011),
            "conv": (700, 130, 3, 3),
            "vector": (1_300_001,),
            "bn.running_var": (600_011,),
        }
        found = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        found["bn.running_var"] = found["bn.running_var"].abs()
        found["ids"] = torch.arange(700_001)
        if base is None:
            return found
        return {k: base[k] + 0.1 * v if v.is_floating_point() else base[k] for k, v in found.items()}

    base = state(None)
    return base, [state(base) for _ in range(count)]


class Counting:
    """A source that a merge has to read, and what it read."""

    def __init__(self, label: str, tensors: dict) -> None:
        self._inner = StateDictSource(label, tensors)
        self.label, self.specs, self.aliases = label, self._inner.specs, self._inner.aliases
        self.read_elements_of: Counter[str] = Counter()
        self.whole: Counter[str] = Counter()
        self.largest = 0

    def read(self, name: str) -> torch.Tensor:
        self.whole[name] += 1
        self.read_elements_of[name] += self.specs[name].numel
        return self._inner.read(name)

    def read_elements(self, name: str, start: int, stop: int) -> torch.Tensor:
        self.read_elements_of[name] += stop - start
        self.largest = max(self.largest, stop - start)
        return self._inner.read_elements(name, start, stop)


@pytest.fixture(scope="module")
def made() -> tuple[dict, list[dict]]:
    return checkpoints()


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("method", METHODS)
def test_the_budget_touches_no_bit(made, method, backend):
    base, experts = made
    whole = merge(base, experts, METHODS[method], backend=backend)
    assert same_bits(merge(base, experts, METHODS[method], backend=backend, memory_budget=BUDGET), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_budget_touches_no_bit_of_other_types(dtype):
    base, experts = checkpoints(2, dtype)
    assert same_bits(merge(base, experts, ROWS, memory_budget=BUDGET), merge(base, experts, ROWS))


def test_large_tensors_are_read_in_parts(made):
    base, experts = made
    sources = [Counting(str(index), tensors) for index, tensors in enumerate([base, *experts])]
    analyze(sources[0], sources[1:], ROWS, memory_budget=BUDGET).merge()
    for source in sources:
        assert not source.whole.keys() & {"tall", "wide", "vector"}
        assert 0 < source.largest <= 2**20 + 2**16  # a panel of the native Gram, or a block of rows


def test_inputs_that_fit_are_read_once(made):
    base, experts = made
    sources = [Counting(str(index), tensors) for index, tensors in enumerate([base, *experts])]
    inputs = sum(spec.nbytes for source in sources for spec in source.specs.values())
    analysis = analyze(sources[0], sources[1:], METHODS["truncated"], memory_budget=2 * inputs)
    merged = analysis.merge()
    matrices = ("tall", "wide", "conv", "vector")
    assert {source.read_elements_of[name] / source.specs[name].numel for source in sources for name in matrices} == {1}
    assert same_bits(merged, merge(base, experts, METHODS["truncated"]))
    steps = {step.step: step.bytes_read for step in analysis.steps}
    assert steps["truncation"] == 0
    assert steps["combination"] < steps["task Gram"] / 5  # statistics and integers


def test_inputs_that_do_not_fit_are_read_once_a_pass(made):
    base, experts = made
    sources = [Counting(str(index), tensors) for index, tensors in enumerate([base, *experts])]
    analyze(sources[0], sources[1:], METHODS["truncated"], memory_budget=2**16).merge()
    assert {source.read_elements_of["vector"] / source.specs["vector"].numel for source in sources} == {2}
    # A truncation from storage has a sketch, two steps and a factor of each expert to make.
    reads = 1 + 3 * 4 + 1
    assert {source.read_elements_of["tall"] / source.specs["tall"].numel for source in sources} == {reads}
    assert not any(source.whole.keys() & {"tall", "wide", "vector"} for source in sources)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_residuals_that_are_too_steep_are_truncated_again_from_storage(backend):
    shape = (1100, 180)
    steep = matrix_with(spectrum("k^-2", 180), *shape).float()
    base, other = torch.zeros(shape), matrix_with(spectrum("linear", 180), *shape, seed=1).float()
    states = {"matrix": base}, [{"matrix": steep}, {"matrix": other}, {"matrix": other + steep}]
    config = MergeConfig.r2m(real_rank=0, rank=0.1)
    whole, stored = (analyze(*states, config, backend=backend, memory_budget=budget) for budget in (None, 2**16))
    assert {one._findings.truncated["matrix"].method for one in (whole, stored)} == {"textbook"}
    assert same_bits(whole.merge(), stored.merge())


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("power", [0.0, 3.0])
def test_a_wide_matrix_comes_in_panels_of_columns_where_its_right_factors_do_not_fit(backend, power):
    generator = torch.Generator().manual_seed(0)
    base, *experts = ({"wide": torch.randn(170, 3100, generator=generator)} for _ in range(4))
    config = MergeConfig.r2m(row_power=power)  # rank 68: components in no order, right factors that are not orthogonal
    runs = []

    class Watched(StateDictSink):
        def write_elements(self, name: str, start: int, elements: torch.Tensor) -> None:
            runs.append(elements.numel())
            super().write_elements(name, start, elements)

    sink, at_once = Watched(), analyze(base, experts, config, backend=backend)
    whole = at_once.merge()
    analysis = analyze(base, experts, config, backend=backend, memory_budget=2**22)
    analysis.write(sink)
    assert analysis.spilled_bytes == 3 * 68 * (170 + 3100) * 4
    # Whole blocks of 1024, the last with what is less than one.
    assert set(runs) == {1024, 3100 - 2 * 1024}
    assert same_bits(sink.state_dict, whole)
    assert analysis.report()["residual"] == at_once.report()["residual"]


def test_a_strided_tensor_is_cut_like_its_copy(made):
    base, experts = made
    strided = {**base, "tall": base["tall"].T.contiguous().T}
    assert not strided["tall"].is_contiguous()
    assert same_bits(merge(strided, experts, ROWS, memory_budget=BUDGET), merge(base, experts, ROWS))


@pytest.mark.parametrize("name", ["tall", "vector", "bn.running_var"])
def test_a_nan_in_a_tensor_in_parts_is_named_and_counted(made, name):
    base, experts = made
    broken = {**experts[1], name: experts[1][name].clone()}
    broken[name].view(-1)[[3, 100, 400_000]] = torch.nan
    size = broken[name].numel()
    with pytest.raises(InvalidInput, match=rf"expert 'b': tensor '{name}' holds NaN or Inf in 3 of {size} elements"):
        merge(base, {"a": experts[0], "b": broken}, ROWS, memory_budget=BUDGET)


def test_a_part_out_of_range_is_named(made):
    base, experts = made
    huge = [{**expert, "tall": expert["tall"].clone()} for expert in experts]
    for expert in huge:
        expert["tall"][4000, 5] = 3e6
    with pytest.raises(InvalidInput, match="tensor 'tall': merged values exceed the range of float16"):
        merge(base, huge, ROWS, memory_budget=BUDGET, dtype=torch.float16)


def test_tied_tensors_are_written_in_parts_and_stay_tied():
    base, experts = checkpoints(2)
    for tensors in (base, *experts):
        tensors["again"] = tensors["tall"]
    merged = merge(base, experts, ROWS, memory_budget=BUDGET)
    assert merged["again"].data_ptr() == merged["tall"].data_ptr()
    assert same_bits(merged, merge(base, experts, ROWS))


def test_a_sink_without_parts_gets_whole_tensors(made):
    base, experts = made

    class Plain:
        def __init__(self) -> None:
            self.tensors: dict[str, torch.Tensor] = {}

        def begin(self, specs: dict[str, TensorSpec]) -> None:
            self.specs = specs

        def write(self, name: str, tensor: torch.Tensor) -> None:
            assert tuple(tensor.shape) == self.specs[name].shape
            self.tensors[name] = tensor

    sink, whole = Plain(), StateDictSink()
    analyze(base, experts, ROWS, memory_budget=BUDGET).write(sink)
    analyze(base, experts, ROWS).write(whole)
    assert same_bits(sink.tensors, whole.state_dict)
