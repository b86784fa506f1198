"""Other methods in R²M's form: what defines each, beyond agreement with the reference."""

from __future__ import annotations

import math

import pytest
import torch
from cases import ALIKE, ROWS, TRUNCATED, checkpoints, distance, floating, matrix_with
from hypothesis import given
from hypothesis import strategies as st

from r2m_kernels import InvalidInput, MergeConfig, _torch, analyze, merge
from r2m_kernels._stream.loader import Group
from r2m_kernels._stream.processes import SingleProcess
from r2m_kernels.config import METHODS, make_config
from r2m_kernels.elements import Magnitudes

CONFIGS = {
    **{name: make_config(name, {}) for name in METHODS},
    "R2M, layers scaled": MergeConfig.r2m(scale="layer"),
    "R2M, columns scaled": MergeConfig.r2m(rank=0.2, scale="column"),
}
MAPPED = ("star", "mono_soup", "score", "tsv_m")  # other singular values than the residuals'
# A repeated expert is one of twice the weight; but TSV-M gives each its own directions, and DARE its own mask.
REPEATABLE = {
    "R2M": MergeConfig.r2m(svd="exact"),
    "R2M, centred": TRUNCATED.replace(svd="exact", center=True, residual="own"),
    "R2M, rows alike": MergeConfig.r2m(**ALIKE, svd="exact"),
    "weight average": MergeConfig.weight_average(),
    "CART": MergeConfig.cart(0.2, 0.5).replace(svd="exact", eta_mode="constant"),
    "STAR": MergeConfig.star(),
    "MonoSoup": MergeConfig.mono_soup(),
    "TIES": MergeConfig.ties(0.3, 0.9),
    "SWUDI": MergeConfig.swudi(7),
    "R2M, layers scaled": MergeConfig.r2m(svd="exact", scale="layer"),
    "R2M, columns scaled": MergeConfig.r2m(svd="exact", scale="column"),
}


def change(base, merged, name):
    return (merged[name].double() - base[name].double()).flatten(1)


@pytest.mark.parametrize("name", REPEATABLE)
def test_a_weight_of_two_is_the_expert_twice(name):
    base, (first, second) = checkpoints(2, dtype=torch.float64, scales=[1.0, 1.4])
    config = REPEATABLE[name]
    twice = merge(base, [first, first, second], config)
    weighted = merge(base, [first, second], config, weights=(2, 1))
    equal = merge(base, [first, second], config)
    assert distance(twice, weighted) <= 1e-6 * distance(base, weighted)
    assert distance(twice, equal) > 1e-2 * distance(base, equal)


@given(weights=st.lists(st.floats(0.1, 10), min_size=3, max_size=3), factor=st.floats(0.01, 100))
def test_only_the_ratios_of_weights_matter(weights, factor):
    base, experts = checkpoints(3, dtype=torch.float64)
    one = merge(base, experts, weights=tuple(weights), svd="exact")
    other = merge(base, experts, weights=tuple(factor * weight for weight in weights), svd="exact")
    assert distance(one, other) <= 1e-9 * distance(base, one)


def test_weights_are_one_per_expert():
    base, experts = checkpoints(2)
    with pytest.raises(InvalidInput, match=r"^weights: expected 2, got 3$"):
        merge(base, experts, weights=(1, 1, 1))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_the_order_of_tensors_and_the_number_of_threads_change_no_bit(name, backend):
    base, experts = checkpoints(3)
    turned = [dict(reversed(state.items())) for state in (base, *experts)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = merge(base, experts, CONFIGS[name], backend=backend)
        torch.set_num_threads(2)
        other = merge(turned[0], turned[1:], CONFIGS[name], backend=backend)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one[key], other[key]) for key in base)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_method_takes_16_bit_checkpoints_and_one_expert(name):
    base, experts = checkpoints(1, dtype=torch.bfloat16)
    merged = merge(base, experts, CONFIGS[name])
    assert {key: tensor.dtype for key, tensor in merged.items()} == {key: tensor.dtype for key, tensor in base.items()}
    assert all(torch.isfinite(tensor).all() for tensor in floating(merged).values())


def test_tsv_m_makes_singular_vectors_of_all_experts_orthonormal():
    base, experts = checkpoints(3)
    change_of = change(base, merge(base, experts, MergeConfig.tsv_m().replace(svd="exact")), "encoder.weight")
    rank = 67 // 3
    expected = [torch.linalg.svdvals(change(base, expert, "encoder.weight"))[:rank] for expert in experts]
    found = torch.linalg.svdvals(change_of)[: 3 * rank]
    assert torch.allclose(found, torch.cat(expected).sort(descending=True).values, rtol=1e-4, atol=1e-6)


def test_iso_c_makes_singular_values_equal():
    base, experts = checkpoints(3)
    total = sum(change(base, expert, "encoder.weight") for expert in experts)
    found = torch.linalg.svdvals(change(base, merge(base, experts, MergeConfig.iso_c(0.5)), "encoder.weight"))
    assert torch.allclose(found, torch.full_like(found, 0.5 * float(torch.linalg.svdvals(total).mean())), rtol=1e-5)


def test_star_keeps_the_nuclear_norm_in_few_components():
    base, (expert,) = checkpoints(1)
    whole = torch.linalg.svdvals(change(base, expert, "encoder.weight"))
    merged = torch.linalg.svdvals(change(base, merge(base, [expert], MergeConfig.star(0.5)), "encoder.weight"))
    needed = int((whole.cumsum(0) < 0.5 * whole.sum()).sum()) + 1
    assert 1 < needed < len(whole)
    assert int((merged > 1e-4 * merged[0]).sum()) == needed
    assert math.isclose(merged[:needed].sum(), whole.sum(), rel_tol=1e-5)


def test_score_cuts_what_conflicts_in_the_shared_basis_and_keeps_what_is_small():
    """Experts with singular vectors of their own, e1, e2 and e3, e4, each with an entry in the other's block."""
    base = {"w": torch.zeros(4, 4).double()}
    first, second = torch.diag(torch.tensor([10.0, 9.0, 0.0, 0.0])), torch.diag(torch.tensor([0.0, 0.0, 8.0, 7.0]))
    first[2, 3], first[3, 2], second[0, 1] = 0.5, 0.01, -0.4
    # The border of the first is .98 · (.2501/16)^½ = .123, that of the second .98 · .4/4 = .098.
    expected = torch.diag(torch.tensor([10.0, 9.0, 8.0, 7.0]))
    expected[3, 2] = 0.01
    merged = merge(base, [{"w": first.double()}, {"w": second.double()}], MergeConfig.score())
    assert torch.allclose(merged["w"], expected.double(), atol=1e-9)


def test_score_of_one_expert_is_the_expert():
    base, experts = checkpoints(1, dtype=torch.float64)
    merged = merge(base, experts, MergeConfig.score())
    assert distance(experts[0], merged) < 1e-6 * distance(base, merged)


def test_mono_soup_weighs_singular_values_in_two_parts():
    # Eight of one size and 32 of a fifth of it, so that the first beyond is a fifth of the largest.
    values = torch.cat([torch.full((8,), 1.0), torch.full((32,), 0.2)]).double()
    base, expert = {"w": torch.zeros(40, 50).double()}, {"w": matrix_with(values, 40, 50)}
    merged = torch.linalg.svdvals(merge(base, [expert], MergeConfig.mono_soup())["w"])
    shares = [1 / 14.4] * 8 + [0.2 / 14.4] * 32
    rank = math.ceil(math.exp(-sum(share * math.log(share) for share in shares)))
    assert 8 < rank < 40
    low = 0.04 + 0.96 * math.sqrt((40 - rank) * 0.04 / (8 + 32 * 0.04))
    within = torch.arange(40) < rank
    expected = values * torch.where(within, 1 - low, low)
    assert torch.allclose(merged, expected.sort(descending=True).values, rtol=1e-6)


def test_mono_soup_of_a_single_direction_is_the_expert():
    base, expert = {"w": torch.zeros(30, 20)}, {"w": torch.outer(torch.randn(30), torch.randn(20))}
    assert distance(expert, merge(base, [expert], MergeConfig.mono_soup())) < 1e-5 * distance(base, expert)


@pytest.mark.parametrize("shape", [(9, 40), (40, 12)], ids=["wide", "tall"])
def test_swudi_descends_to_the_sum_where_experts_have_inputs_of_their_own(shape):
    base, half = {"w": torch.zeros(shape).double()}, shape[1] // 2
    first, second = (matrix_with(torch.linspace(1, 0.6, min(half, *shape)).double(), shape[0], half) for _ in range(2))
    nothing = torch.zeros(shape[0], half).double()
    experts = [{"w": torch.cat([first, nothing], 1)}, {"w": torch.cat([nothing, 2 * second], 1)}]
    total = {"w": torch.cat([first, 2 * second], 1)}
    errors = [distance(total, merge(base, experts, MergeConfig.swudi(steps))) for steps in (1, 4, 16, 64, 512)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.2 * distance(base, total)
    assert errors[-1] < 1e-6 * distance(base, total)


@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    density=st.floats(0.01, 1.0),
    ties=st.booleans(),
    seed=st.integers(0, 99),
)
def test_thresholds_are_the_exact_order_statistic_over_all_tensors(sizes, density, ties, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(2, size, generator=generator) for size in sizes]
    if ties:
        tensors = [(2 * tensor).round() / 2 for tensor in tensors]
    elements = sum(sizes)
    magnitudes = Magnitudes(elements, density, 2)
    for _ in range(2):
        for tensor in tensors:
            experts = [[expert] for expert in tensor]
            magnitudes.count(_torch, Group([], [torch.zeros(tensor.shape[1])], experts))
        magnitudes.gather(SingleProcess())
        if magnitudes._upper is None:
            magnitudes.narrow()
    expected = torch.cat(tensors, dim=1).abs().sort(dim=1).values[:, max(1, elements - int(elements * density)) - 1]
    assert torch.equal(magnitudes.thresholds(), expected)


def test_dare_keeps_its_share_and_is_right_on_average():
    shape = {"w": (200, 300)}
    base, experts = checkpoints(2, shapes=shape, dtype=torch.float64)
    full = merge(base, experts, MergeConfig.task_arithmetic(0.5))["w"] - base["w"]
    total, seeds = torch.zeros_like(full), 200
    for seed in range(seeds):
        total += merge(base, experts, MergeConfig.dare(0.25, 0.5).replace(seed=seed))["w"] - base["w"]
    one = merge(base, experts[:1], MergeConfig.dare(0.25, 0.5))["w"] - base["w"]
    kept = float((one != 0).double().mean())
    assert abs(kept - 0.25) < 4 * math.sqrt(0.25 * 0.75 / one.numel())
    # Each element's variance is (1/d − 1) Σ τ²·scale²; the mean of 200 seeds is off by a root of 200 less.
    spread = 0.5 * sum((expert["w"] - base["w"]).square() for expert in experts).sqrt() * math.sqrt(3 / seeds)
    error = (total / seeds - full) / spread
    assert abs(float(error.square().mean()) - 1) < 0.05


def test_dare_drops_other_elements_of_every_expert_and_tensor():
    base, (expert, _) = checkpoints(2, shapes={"a": (50, 60), "b": (50, 60)})
    config = MergeConfig.dare(0.5, 1.0)
    both = merge(base, [expert, expert], config)
    counts = ((both["a"] - base["a"]) / (expert["a"] - base["a"])).round().unique()
    assert counts.tolist() == [0.0, 2.0, 4.0]
    one = merge(base, [expert], config)
    assert not torch.equal(one["a"] == base["a"], one["b"] == base["b"])


@pytest.mark.parametrize("name", MAPPED)
def test_a_mapped_analysis_has_one_rank(name):
    base, experts = checkpoints(3)
    analysis = analyze(base, experts, CONFIGS[name])
    assert floating(analysis.merge(eta=0.5)).keys() == floating(base).keys()
    with pytest.raises(InvalidInput, match=r"^rank: (this analysis was made with|spectrum='reweigh' keeps all)"):
        analysis.merge(rank=0.05)


@pytest.mark.parametrize(
    "name", sorted(CONFIGS.keys() - {"r2m_centred", "r2m_paper"})
)  # which find little in common or add little, and say so
def test_reports_of_other_methods_hold_no_warnings_about_what_they_do_not_do(name):
    base, experts = checkpoints(3)
    report = analyze(base, experts, CONFIGS[name]).report()
    assert report["warnings"] == []
    for row in report["tensors"]:
        if row["role"] == "matrix" and name in MAPPED:
            assert row["kept_energy"] is None


def test_ties_ignores_what_is_small_and_what_disagrees():
    base = {"w": torch.zeros(2, 5)}
    first = {"w": torch.tensor([[4.0, 0.1, -3.0, 1.0, 0.0], [0.2, 2.0, 0.3, 0.1, 0.0]])}
    second = {"w": torch.tensor([[2.0, 0.2, 5.0, 0.1, 0.1], [0.2, -0.1, 0.2, 3.0, 0.1]])}
    # Half stays, counted as the authors do: elements from the (10 − 5)-th smallest on, 0.2 in both.
    expected = torch.tensor([[3.0, 0.2, 5.0, 1.0, 0.0], [0.2, 2.0, 0.25, 3.0, 0.0]])
    assert torch.allclose(merge(base, [first, second], MergeConfig.ties(0.5, 1.0))["w"], expected)


def test_row_power_gives_every_row_to_the_expert_that_changed_it():
    base = {"w": torch.zeros(3, 2), "b": torch.zeros(3)}
    first = {"w": torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), "b": torch.tensor([1.0, 0.0, 0.0])}
    second = {"w": torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 0.0]]), "b": torch.zeros(3)}
    # No subspace: residuals are the task vectors. Lengths 2 and 1 squared are 4 to 1; a row that nobody changed stays.
    config = MergeConfig(real_rank=0, rank=1.0, row_power=2.0, core_mode="mean", norm_match=False)
    merged = merge(base, [first, second], config)
    assert torch.allclose(merged["w"], torch.tensor([[1.6, 0.2], [0.0, 1.0], [0.0, 0.0]]))
    assert torch.allclose(merged["b"], torch.tensor([0.5, 0.0, 0.0]))
    # Norms over all tensors, 5^½ and ½ for the bias's deviations from their mean: matching divides the lengths by them.
    ratio = (2 * math.sqrt(2.25)) ** 2 / (1 * math.sqrt(5.25)) ** 2
    matched = merge(base, [first, second], config, norm_match=True)
    assert torch.allclose(matched["w"][0], torch.tensor([2 * ratio, 1.0]) / (ratio + 1))


@pytest.mark.parametrize("power", [1.0, 40.0, 1e6])
def test_no_power_leaves_the_range_of_numbers(power):
    base, experts = checkpoints(3, scales=[1e-12, 1.0, 1e3])
    merged = merge(base, experts, ROWS, row_power=power, norm_match=False)
    assert all(torch.isfinite(tensor).all() for tensor in floating(merged).values())


def test_scaled_columns_are_as_long_as_the_experts_own():
    base, experts = checkpoints(3)
    analysis = analyze(base, experts, TRUNCATED, scale="column")
    lengths = torch.stack([change(base, expert, "encoder.weight").norm(dim=0) for expert in experts])
    core = analysis.real_subspace.core.abs()
    found = change(base, analysis.merge(), "encoder.weight").norm(dim=0)
    assert torch.allclose(found, core @ lengths / core.sum(), rtol=1e-4)


def test_layers_are_scaled_by_half_of_what_averaging_lost():
    base, experts = checkpoints(3, shared=0.0)
    plain = change(base, merge(base, experts, MergeConfig.weight_average()), "encoder.weight")
    scaled = change(base, merge(base, experts, MergeConfig.weight_average(), scale="layer"), "encoder.weight")
    lengths = torch.stack([change(base, expert, "encoder.weight").norm() for expert in experts])
    assert torch.allclose(scaled, (lengths.mean() / plain.norm()).sqrt() * plain, rtol=1e-5, atol=1e-7)
    assert scaled.norm() > 1.1 * plain.norm()


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_columns_without_a_core_stay_as_they_are(backend):
    base, experts = checkpoints(2)
    for options, some in (({"real_rank": 0}, experts), ({"center": True}, experts[:1])):
        plain, scaled = (merge(base, some, backend=backend, scale=mode, **options) for mode in ("none", "column"))
        assert distance(base, plain) > 0
        assert distance(plain, scaled) == 0


@pytest.mark.parametrize("mode", ["layer", "column"])
def test_experts_that_cancel_are_not_blown_up(mode):
    base, (first,) = checkpoints(1, shapes={"w": (40, 30)})
    second = {"w": 2 * base["w"] - first["w"] * (1 + 1e-6)} | {"steps": base["steps"]}
    merged = merge(base, [first, second], MergeConfig.weight_average(), scale=mode)
    assert distance(base, merged) < 1e-5 * distance(base, first) * 2


def test_a_restored_core_is_longer_by_half_of_what_averaging_lost():
    base, experts = checkpoints(3, shared=0.0, dtype=torch.float64)
    core, restored = (merge(base, experts, eta=0.0, core_mode=mode) for mode in ("mean", "restored"))
    names = [name for name, tensor in floating(base).items() if tensor.ndim > 1]
    taus = torch.stack([torch.cat([change(base, expert, name).flatten() for name in names]) for expert in experts])
    expected = float((taus.norm(dim=1).mean() / taus.mean(0).norm()) ** 0.5)
    assert 1.2 < expected < 1.4  # three nearly orthogonal task vectors: the fourth root of three
    for name in ("encoder.weight", "encoder.bias"):
        assert torch.allclose(restored[name] - base[name], expected * (core[name] - base[name]), atol=1e-12)


def test_kept_tensors_stay_the_bases_and_need_not_be_there():
    base, experts = checkpoints(3)
    del experts[1]["tall.weight"]
    experts[2]["conv.weight"] = experts[2]["conv.weight"][:, :2]
    merged = merge(base, experts, keep=("tall.*", "conv.*"))
    for name in ("tall.weight", "conv.weight"):
        assert torch.equal(merged[name], base[name])
        assert merged[name].data_ptr() != base[name].data_ptr()
    with pytest.raises(InvalidInput, match=r"missing: 'tall.weight'"):
        merge(base, experts, keep=("conv.*",))
    # They take no part in the subspace either.
    rest = [
        {name: tensor for name, tensor in state.items() if name not in ("tall.weight", "conv.weight")}
        for state in experts
    ]
    alone = merge({name: base[name] for name in rest[0]}, rest)
    assert all(torch.equal(merged[name], tensor) for name, tensor in alone.items())


def test_averaged_tensors_are_the_plain_mean():
    base, experts = checkpoints(3, scales=[1.0, 2.0, 0.5])
    merged = merge(base, experts, average=("tall.*", "encoder.bias"), weights=(1, 1, 2))
    for name in ("tall.weight", "encoder.bias"):
        mean = sum(weight * expert[name].double() for weight, expert in zip((1, 1, 2), experts, strict=True)) / 4
        assert torch.equal(merged[name], mean.float())
    assert not torch.equal(merged["conv.weight"], merge(base, experts, weights=(1, 1, 2))["conv.weight"])


def test_a_rank_for_some_names_is_that_rank_for_them_alone():
    base, experts = checkpoints(3)
    # Without what joins the tensors each is merged as if it were alone.
    single = TRUNCATED.replace(norm_match=False, eta=1.0, eta_mode="constant", real_rank=None)
    config = single.replace(ranks=(("conv*", 5), ("conv.*", 1), ("tall.*", 1.0)))
    merged = merge(base, experts, config)
    expected = {"encoder.weight": 0.1, "conv.weight": 5, "conv1d.weight": 5, "tall.weight": 1.0}
    for name, rank in expected.items():
        assert torch.equal(merged[name], merge(base, experts, single.replace(rank=rank))[name]), name
    analysis = analyze(base, experts, config)
    assert {row["name"]: row["rank"] for row in analysis.report()["tensors"] if row["role"] == "matrix"} | {
        "class_token": 1
    } == {
        "encoder.weight": 7,
        "conv.weight": 5,
        "conv1d.weight": 5,
        "tall.weight": 41,
        "class_token": 1,
    }
    smaller = analysis.merge(ranks=(("conv*", 3),))
    again = analyze(base, experts, single.replace(ranks=(("conv*", 3),), svd="exact")).merge()
    assert distance(smaller, again) <= 0.02 * distance(base, again)
    with pytest.raises(
        InvalidInput, match=r"rank: tensor 'conv.weight' was analyzed at rank 5 and cannot be merged at 6"
    ):
        analysis.merge(ranks=(("conv.*", 6),))


@pytest.mark.parametrize(
    ("ranks", "sentence"),
    [
        ("conv=3", "ranks: expected pairs of a name pattern and a rank, such as"),
        ([("conv", 3, 4)], r"got \('conv', 3, 4\)"),
        ([(3, 3)], r"got \(3, 3\)"),
        ([("conv", 0)], "rank: expected a ratio in"),
    ],
)
def test_ranks_that_are_none(ranks, sentence):
    with pytest.raises(InvalidInput, match=sentence):
        MergeConfig.r2m(ranks=ranks)
    with pytest.raises(InvalidInput, match="ranks: spectrum='rescale' has a share of the nuclear norm, expected none"):
        MergeConfig.star().replace(ranks=[("a", 3)])


@pytest.mark.parametrize("shape", [(70, 200), (200, 70)], ids=str)
@pytest.mark.parametrize("method", ["star", "tsv_m", "score", "mono_soup"])
def test_lengths_of_mapped_residuals_are_the_same_by_row(method, shape):
    generator = torch.Generator().manual_seed(0)
    experts = {name: {"w": torch.randn(shape, generator=generator)} for name in "abc"}
    alike, by_row = (
        analyze({"w": torch.zeros(shape)}, experts, getattr(MergeConfig, method)().replace(row_power=power)).residuals()
        for power in (0.0, 3.0)
    )
    assert torch.allclose(alike.norms, by_row.norms, rtol=1e-5)
