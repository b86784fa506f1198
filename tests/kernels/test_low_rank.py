"""Task vectors that are products of few columns: merges by their factors alone, against the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from random import Random

import pytest
import torch
from cases import ALIKE, distance, same_bits
from torch import Tensor

from r2m_kernels import MergeConfig, analyze, reference
from r2m_kernels.errors import NotFinite
from r2m_kernels.streaming import TensorSpec

BACKENDS = ["torch", "native", "triton"]
BOUND = 2e-5  # of the update, as wherever truncation is exact
SHAPES = {
    "tall.weight": (56, 46),
    "wide.weight": (48, 70),
    "conv.weight": (40, 5, 3, 3),
    "still.weight": (24, 30),
    "bias": (30,),
    "running_mean": (8,),
}
Change = tuple[Tensor, Tensor]


class Adapted:
    """A base with products added, in float32 or wider: whole tensors where they are asked for."""

    aliases: Mapping[str, str] = {}

    def __init__(
        self, label: str, base: Mapping[str, Tensor], changes: Mapping[str, Change], dense: Sequence[str] = ()
    ):
        self.label, self.base, self.changes, self.dense = label, base, changes, dense
        self.reads: list[str] = []
        wide = {name: torch.promote_types(tensor.dtype, torch.float32) for name, tensor in base.items()}
        self.specs = {name: TensorSpec(tuple(tensor.shape), wide[name]) for name, tensor in base.items()}

    def exact(self, name: str) -> Tensor:
        """In float64."""
        theta = self.base[name].double()
        if name not in self.changes:
            return theta
        left, right = self.changes[name]
        return theta + (left.double() @ right.double()).view(theta.shape)

    def read(self, name: str) -> Tensor:
        self.reads.append(name)
        return self.exact(name).to(self.specs[name].dtype)

    def read_elements(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name).reshape(-1)[start:stop]

    def change_rank(self, name: str) -> int | None:
        return None if name in self.dense else self.changes[name][0].shape[1] if name in self.changes else 0

    def read_change(self, name: str) -> Tensor:
        if name in self.changes:
            left, right = self.changes[name]
            return torch.cat([left, right.mT]).to(self.specs[name].dtype)
        m = self.base[name].shape[0]
        return torch.empty(m + self.base[name].numel() // m, 0, dtype=self.specs[name].dtype)


def adapters(
    ranks: Sequence[Mapping[str, int]],
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Tensor], dict[str, Adapted]]:
    """A base, and an expert for each mapping of names to ranks."""
    generator = torch.Generator().manual_seed(len(ranks))

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    base = {name: (0.05 * noise(*shape)).to(dtype) for name, shape in shapes.items()}
    experts = {}
    for number, of_names in enumerate(ranks):
        sizes = {name: (shapes[name][0], math.prod(shapes[name][1:])) for name in of_names}
        changes = {
            name: (0.1 * noise(sizes[name][0], r), 0.1 * noise(r, sizes[name][1])) for name, r in of_names.items()
        }
        experts[f"e{number}"] = Adapted(f"expert {number}", base, changes)
    return base, experts


RANKS = (
    {"tall.weight": 3, "wide.weight": 5, "conv.weight": 2},
    {"tall.weight": 4, "wide.weight": 6},
    {"conv.weight": 7},
)
CONFIGS = {
    "r2m": MergeConfig.r2m(),
    "rows alike": MergeConfig.r2m(**ALIKE),
    "relative": MergeConfig.r2m(eta_mode="relative", eta=0.6, core_mode="mean", rank=2, row_power=0.0),
    "whole": MergeConfig.r2m(rank=1.0, row_power=0.0),
    "own": MergeConfig.r2m(residual="own", real_rank=2, layer_weight="frobenius"),
}
FEW = ("relative", "whole")


@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        # The interpreter takes its time: one case of each way to write there.
        pytest.param(backend, kind, marks=[pytest.mark.slow] if backend == "triton" and kind not in FEW else [])
        for backend in BACKENDS
        for kind in CONFIGS
    ],
)
def test_a_merge_by_factors_is_the_references(backend: str, kind: str) -> None:
    base, experts = adapters(RANKS)
    config = CONFIGS[kind]
    analysis = analyze(base, experts, config, backend=backend)
    merged = analysis.merge()
    factored = {tensor.name for tensor in analysis.plan.tensors if tensor.factored}
    assert factored == {"tall.weight", "wide.weight", "conv.weight", "still.weight", "bias"}
    # Nobody has asked for a whole task vector.
    assert {name for one in experts.values() for name in one.reads} == {"running_mean"}
    whole = [{name: one.exact(name) for name in base} for one in experts.values()]
    options = {name: value for name, value in config.to_dict().items() if name in REFERENCE}
    expected = reference.merge({name: tensor.double() for name, tensor in base.items()}, whole, **options)
    changes = [{name: one[name].double() - base[name] for name in base} for one in (merged, expected)]
    assert distance(*changes) <= BOUND * distance(changes[1], {name: torch.zeros_like(t) for name, t in base.items()})
    for name in ("still.weight", "bias"):
        assert torch.equal(merged[name], base[name])
        assert merged[name] is not base[name]
    # Found as it was written, though step 1 has not read the base.
    for name in factored:
        assert analysis.base_squares[name] == pytest.approx(float(base[name].double().square().sum()), rel=1e-5)
    if config.row_power > 0 and config.eta != 0:
        core = reference.merge({n: t.double() for n, t in base.items()}, whole, **{**options, "eta": 0.0})
        matrices = [tensor.name for tensor in analysis.plan.of("matrix")]
        term = sum(float((expected[name] - core[name]).square().sum()) for name in matrices) ** 0.5
        assert analysis.report()["residual"]["norm"] == pytest.approx(term, rel=1e-4)


REFERENCE = (
    *(
        "real_rank",
        "center",
        "residual",
        "rank",
        "core_scale",
        "core_mode",
        "eta",
        "eta_mode",
        "norm_match",
        "row_power",
    ),
    *("layer_weight", "ranks", "truncate", "rank_rounding", "whole_up_to"),
)


def test_an_analysis_serves_smaller_ranks_and_other_strengths() -> None:
    base, experts = adapters(RANKS)
    for rank, power in ((1.0, 0.0), (8, 0.0), (8, 3.0)):
        analysis = analyze(base, experts, MergeConfig.r2m(rank=rank, row_power=power))
        found = analysis.merge(rank=2, eta=0.5)
        expected = analyze(base, experts, MergeConfig.r2m(rank=2, row_power=power, eta=0.5)).merge()
        for name, tensor in expected.items():
            assert torch.allclose(found[name], tensor, rtol=0, atol=2e-7)


@pytest.mark.parametrize(
    "config", [MergeConfig.ties(), MergeConfig.r2m(scale="column"), MergeConfig.r2m(svd="textbook")]
)
def test_methods_that_need_whole_task_vectors_read_them(config: MergeConfig) -> None:
    base, experts = adapters(RANKS)
    analysis = analyze(base, experts, config)
    assert not any(tensor.factored for tensor in analysis.plan.tensors)
    dense = {name: {key: one.read(key) for key in base} for name, one in experts.items()}
    assert same_bits(analysis.merge(), analyze(base, dense, config).merge())


def test_a_dense_expert_or_too_many_columns_make_a_tensor_dense() -> None:
    base, experts = adapters(({"tall.weight": 10, "wide.weight": 5}, {"tall.weight": 8, "wide.weight": 2}))
    experts["e1"].dense = ["wide.weight"]
    analysis = analyze(base, experts, MergeConfig.r2m())
    # 18 columns are more than a quarter of 46.
    assert {tensor.name for tensor in analysis.plan.tensors if tensor.factored} == {
        *("conv.weight", "still.weight", "bias")
    }


@pytest.mark.parametrize(("name", "count"), [("wide.weight", 3360), ("still.weight", 720), ("bias", 30)])
def test_nan_in_a_base_is_named(name: str, count: int) -> None:
    base, experts = adapters(RANKS)
    base[name].view(-1)[7] = math.nan
    analysis = analyze(base, experts, MergeConfig.r2m())
    for look in (analysis.merge, analysis.report):
        with pytest.raises(NotFinite, match=rf"base: tensor '{name}' holds NaN or Inf in 1 of {count} elements"):
            look()


def test_what_is_the_bases_everywhere_is_passed_on() -> None:
    base, experts = adapters(RANKS, {**SHAPES, "calm.weight": (1030, 1100)})
    base["calm.weight"][0, 0] = -0.0
    analysis = analyze(base, experts, MergeConfig.r2m())
    # Known before anything is written, and the same to the bit.
    squares = dict(analysis.base_squares)
    analysis._findings.base_squares.clear()
    for name, dtype in (
        ("calm.weight", None),
        ("bias", None),
        ("calm.weight", torch.bfloat16),
        ("bias", torch.float64),
    ):
        merged = analysis.merge(dtype=dtype)[name]
        assert same_bits({name: merged}, {name: base[name].to(dtype or base[name].dtype)})
    assert {name: squares[name] for name in analysis.base_squares} == analysis.base_squares
    base["calm.weight"][1029, 1099] = 1e6
    with pytest.raises(NotFinite, match=r"'calm.weight': merged values exceed the range of float16"):
        analysis.merge(dtype="float16")


@pytest.mark.parametrize("kind", ["r2m", "whole", "rows alike"])
def test_threads_order_and_budget_touch_no_bit(kind: str) -> None:
    shapes = {**SHAPES, "large.weight": (500, 1100), "calm.weight": (1030, 1100)}
    base, experts = adapters([{**ranks, "large.weight": 3} for ranks in RANKS], shapes)
    config = CONFIGS[kind]
    expected = analyze(base, experts, config)
    merged, grams = expected.merge(), expected.grams
    turned = dict(reversed(base.items()))
    threads = torch.get_num_threads()
    try:
        for count, budget, origin in ((2, None, base), (1, "40MiB", base), (2, "34MiB", turned)):
            torch.set_num_threads(count)
            analysis = analyze(origin, experts, config, memory_budget=budget)
            assert same_bits(analysis.merge(), merged)
            assert all(torch.equal(grams[name], gram) for name, gram in analysis.grams.items())
            assert analysis.base_squares == expected.base_squares
    finally:
        torch.set_num_threads(threads)
    # Inner products of two experts are the same whoever else is there.
    fewer = analyze(base, {name: experts[name] for name in ("e2", "e0")}, config, backend="native")
    more = analyze(base, experts, config, backend="native")
    assert all(torch.equal(gram, more.grams[name][[2, 0]][:, [2, 0]]) for name, gram in fewer.grams.items())


RANDOM = [pytest.param(number, marks=[pytest.mark.slow] if number >= 4 else []) for number in range(100)]


@pytest.mark.parametrize("number", RANDOM)
def test_random_adapters_among_dense_experts(number: int) -> None:
    draw = Random(f"adapters {number}")
    count = draw.choice([1, 2, 3, 5, 16])
    sizes = (draw.randint(70, 170), draw.randint(70, 170))
    shapes = {"a": sizes, "b": sizes[::-1], "c": (draw.randint(65, 90), 9, 3, 3), "d": (20,)}
    most = (64, 24, 12, 6, 2)[(1, 2, 3, 5, 16).index(count)]
    ranks = [{name: draw.randint(1, most) for name in "abc" if draw.random() < 0.8} for _ in range(count)]
    dtype = draw.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64])
    base, experts = adapters(ranks, shapes, dtype)
    for one in experts.values():
        one.dense = [name for name in "abc" if draw.random() < 0.1]
    rank, backend = draw.choice([0.4, 0.1, 0.02, 8, 1.0]), draw.choice(BACKENDS[:2])
    power = draw.choice([0.0, 3.0])
    config = MergeConfig.r2m(rank=rank, eta=draw.choice([1.0, 0.4]), row_power=power, svd="exact")
    analysis = analyze(base, experts, config, backend=backend)
    merged = analysis.merge(dtype=torch.float64)
    whole = [{name: one.exact(name) for name in base} for one in experts.values()]
    options = {"rank": rank, "eta": config.eta, "row_power": power}
    expected = reference.merge({name: tensor.double() for name, tensor in base.items()}, whole, **options)
    changes = [{name: one[name].double() - base[name].double() for name in base} for one in (merged, expected)]
    nothing = {name: torch.zeros_like(one) for name, one in changes[1].items()}
    drawn = f"{count} experts, {sizes}, {dtype}, {options}, {backend}"
    assert distance(*changes) <= BOUND * distance(changes[1], nothing) + 1e-6 * len(base), drawn
