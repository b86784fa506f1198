"""What must hold whatever the numbers are: identities of the method, as properties."""

from __future__ import annotations

import math

import pytest
import torch
from cases import SHAPES, TRUNCATED, checkpoints, distance, floating
from hypothesis import assume, given
from hypothesis import strategies as st

from r2m_kernels import MergeConfig, TensorSpec, analyze, merge, reference
from r2m_kernels._stream.state_dicts import StateDictSink


def config_of(eta_mode, row_power, **fields):
    return MergeConfig(eta_mode=eta_mode, row_power=0.0 if eta_mode == "relative" else row_power, **fields)


configs = st.builds(
    config_of,
    real_rank=st.sampled_from([1, 2, None]),
    center=st.booleans(),
    residual=st.sampled_from(["core", "own"]),
    rank=st.sampled_from([0.1, 0.3, 3, 1.0]),
    eta=st.sampled_from([0.0, 0.6, 1.0]),
    eta_mode=st.sampled_from(["relative", "constant", "sum"]),
    norm_match=st.booleans(),
    row_power=st.sampled_from([0.0, 3.0]),
    core_mode=st.sampled_from(["mean", "restored"]),
    layer_weight=st.sampled_from(["none", "frobenius"]),
    svd=st.just("exact"),
)
counts = st.integers(1, 4)
seeds = st.integers(0, 1000)


def well_posed(base, experts, config):
    """Whether the projector is determined: without a gap it turns with rounding, and nothing can be said."""
    gap = analyze(base, experts, config).real_subspace.gap
    return gap is None or gap > 0.05


def update_norm(base, merged):
    return distance(merged, base)


@given(config=configs, count=st.integers(2, 4), seed=seeds)
def test_the_order_of_experts_does_not_matter(config, count, seed):
    base, experts = checkpoints(count, seed=seed, dtype=torch.float64)
    assume(well_posed(base, experts, config))
    merged = merge(base, experts, config)
    turned = merge(base, experts[1:] + experts[:1], config)
    assert distance(merged, turned) <= 1e-6 * max(update_norm(base, merged), 1e-3)


@given(seed=seeds, count=counts, svd=st.sampled_from(["exact", "randomized"]), rank=st.sampled_from([0.1, 2, 1.0]))
def test_identical_experts_give_that_expert(seed, count, svd, rank):
    base, experts = checkpoints(1, seed=seed)
    merged = merge(base, experts * count, svd=svd, rank=rank)
    for name, tensor in floating(experts[0]).items():
        assert torch.allclose(merged[name], tensor, rtol=1e-6, atol=1e-7), name


@given(
    seed=seeds,
    count=counts,
    center=st.booleans(),
    residual=st.sampled_from(["core", "own"]),
    real_rank=st.sampled_from([1, 2, None]),
)
def test_full_rank_without_matching_is_the_weight_average(seed, count, center, residual, real_rank):
    # A whole-space projector with own residuals has no residuals at all; the core is then the average by itself.
    base, experts = checkpoints(count, seed=seed)
    merged = merge(
        base,
        experts,
        rank=1.0,
        eta=1.0,
        eta_mode="constant",
        norm_match=False,
        row_power=0.0,
        core_mode="mean",
        center=center,
        residual=residual,
        real_rank=real_rank,
    )
    average = merge(base, experts, MergeConfig.weight_average())
    plain = {name: torch.stack([expert[name].double() for expert in experts]).mean(0) for name in floating(base)}
    assert distance(average, plain) <= 1e-6 * distance(base, plain)
    assert distance(merged, plain) <= 2e-6 * distance(base, plain)


@given(seed=seeds, scale=st.sampled_from([1e-3, 0.5, 2.0, 100.0]), count=counts, config=configs)
def test_scaling_all_task_vectors_scales_the_update(seed, scale, count, config):
    base, experts = checkpoints(count, seed=seed, dtype=torch.float64)
    assume(well_posed(base, experts, config))
    scaled = [
        {name: base[name] + scale * (tensor - base[name]) for name, tensor in floating(expert).items()}
        for expert in experts
    ]
    base = floating(base)
    merged = merge(base, [floating(expert) for expert in experts], config)
    merged_scaled = merge(base, scaled, config)
    expected = {name: base[name] + scale * (merged[name] - base[name]) for name in base}
    assert distance(merged_scaled, expected) <= 1e-6 * max(distance(base, expected), 1e-6)


@given(config=configs, seed=seeds, count=counts, zeros=st.integers(0, 4), rank_deficient=st.booleans())
def test_degenerate_experts_are_finite(config, seed, count, zeros, rank_deficient):
    base, experts = checkpoints(count, seed=seed)
    for index in range(min(zeros, count)):
        experts[index] = {name: tensor.clone() for name, tensor in base.items()}
    if rank_deficient and count > 1:
        experts[-1] = {
            name: base[name] + 2 * (tensor - base[name]) if tensor.is_floating_point() else tensor
            for name, tensor in experts[0].items()
        }
    merged = merge(base, experts, config)
    assert all(torch.isfinite(tensor).all() for tensor in floating(merged).values())
    if min(zeros, count) == count:
        assert distance(merged, base) == 0


def test_one_expert_gives_that_expert_and_centred_gives_the_base():
    base, experts = checkpoints(1)
    merged = merge(base, experts)
    assert distance(merged, experts[0]) <= 1e-6 * distance(base, experts[0])
    centred = merge(base, experts, TRUNCATED, center=True)
    matrices = [name for name, shape in SHAPES.items() if len(shape) > 1]
    assert all(torch.equal(centred[name], base[name]) for name in matrices)  # a core of 0, no residual to match


@pytest.mark.parametrize("rank", [0.2, 1.0])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_the_rounding_of_an_expert_between_the_others_is_not_blown_up(backend, rank):
    base, experts = checkpoints(2)
    middle = {name: torch.lerp(*(one[name].double() for one in experts), 0.5).to(base[name].dtype) for name in base}
    # The core is the mean, which it is itself: what differs is the last bit of float32.
    options = {"real_rank": None, "rank": rank}
    expected = reference.merge(base, [*experts, middle], **options)
    merged = merge(base, [*experts, middle], backend=backend, svd="exact", **options)
    assert distance(merged, expected) <= 2e-5 * distance(base, expected)


def test_relative_eta_is_the_residual_terms_share():
    base, experts = checkpoints(3)
    with_term, without = merge(base, experts, TRUNCATED), merge(base, experts, TRUNCATED, eta=0.0)
    matrices = [name for name, shape in SHAPES.items() if len(shape) > 1]
    term = math.sqrt(sum(float((with_term[n].double() - without[n].double()).square().sum()) for n in matrices))
    core = math.sqrt(sum(float((without[n].double() - base[n].double()).square().sum()) for n in matrices))
    assert term / core == pytest.approx(0.6, rel=1e-3)


def test_norm_matching_makes_residual_norms_equal():
    base, experts = checkpoints(3, scales=[0.5, 1.0, 3.0])
    residuals = analyze(base, experts).residuals()
    matched = residuals.scales * residuals.norms
    assert matched.tolist() == pytest.approx([float(residuals.norms.mean())] * 3)
    assert residuals.norms.max() > 1.5 * residuals.norms.min()


def test_ranks_beyond_the_matrix_and_empty_tensors_are_fine():
    base = {"a": torch.randn(3, 4), "none": torch.empty(0, 5), "scalar": torch.tensor(2.0)}
    experts = [{name: tensor + 0.1 for name, tensor in base.items()} for _ in range(2)]
    merged = merge(base, experts, rank=50)
    assert merged["none"].shape == (0, 5)
    assert torch.allclose(merged["a"], base["a"] + 0.1)
    assert torch.allclose(merged["scalar"], torch.tensor(2.1))


def test_an_analysis_at_full_rank_can_be_merged_at_a_smaller_one():
    # Such as a two-logit head, of rank 2 at a ratio above a half and of rank 1 below.
    base, experts = checkpoints(3, shapes={"head": (2, 30), "body": (70, 90)})
    config = MergeConfig.r2m(svd="exact", whole_up_to=0, head="merge")
    for largest, rank in ((0.6, 0.3), (1.0, 0.1), (1.0, 1), (70, 16)):
        late = analyze(base, experts, config, rank=largest).merge(rank=rank)
        assert distance(late, merge(base, experts, config, rank=rank)) <= 1e-6 * distance(base, late)
    # So can one that left small matrices whole.
    for before, after in ((2, 0), (70, 2), (70, 0)):
        late = analyze(base, experts, config, whole_up_to=before).merge(whole_up_to=after)
        assert distance(late, merge(base, experts, config, whole_up_to=after)) <= 1e-6 * distance(base, late)


def test_excluding_one_name_of_a_tied_tensor_excludes_it():
    base, experts = checkpoints(2, shapes={"embed": (40, 30), "other": (20, 10)})
    for state in (base, *experts):
        state["head"] = state["embed"]
    roles = {row["name"]: row["role"] for row in analyze(base, experts, exclude="head").report()["tensors"]}
    assert roles == {"embed": "vector", "other": "matrix", "steps": "copied"}


def test_a_long_vector_does_not_hide_a_small_residual_of_matrices():
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(30, 40), "b": torch.zeros(5000)}
    experts = [
        {"w": 1e-6 * torch.randn(30, 40, generator=generator), "b": torch.full((5000,), 100.0 + i)} for i in range(3)
    ]
    assert analyze(base, experts, TRUNCATED).residuals().strength.eta > 0


def test_tied_weights_stay_tied_where_the_output_is_moved_to_another_device():
    elsewhere = torch.device("meta")
    sink = StateDictSink({"embed": elsewhere, "head": elsewhere}, {"head": "embed"})
    sink.begin({name: TensorSpec((2,), torch.float32) for name in ("embed", "head")})
    for name in ("embed", "head"):
        sink.write(name, torch.ones(2))
    assert sink.state_dict["head"] is sink.state_dict["embed"]
    assert sink.state_dict["head"].device == elsewhere


def test_tied_weights_stay_tied_and_count_once():
    base, experts = checkpoints(2, shapes={"embed": (40, 30), "other": (20, 10)})
    plain = merge(base, experts)
    for state in (base, *experts):
        state["head"] = state["embed"]
    tied = merge(base, experts)
    assert list(tied) == ["embed", "other", "steps", "head"]
    assert tied["head"].data_ptr() == tied["embed"].data_ptr()
    assert torch.equal(tied["embed"], plain["embed"])
    experts[1]["head"] = experts[1]["embed"].clone() + 0.01  # untied in one expert: two tensors
    assert merge(base, experts)["head"].data_ptr() != merge(base, experts)["embed"].data_ptr()
