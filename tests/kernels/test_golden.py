"""The merge against the float64 definition, with the bars of the contract."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from cases import ALIKE, TRUNCATED, checkpoints, distance, floating

from r2m_kernels import MergeConfig, analyze, merge, reference
from r2m_kernels.heads import head_names
from r2m_kernels.reference import others

PAPER = TRUNCATED.to_dict()
CONFIGS = {
    "default": {},
    "rows alike": ALIKE,
    "rows": {"rank": 1.0, "row_power": 3.0},
    "truncated": PAPER,
    "centred": {**PAPER, "center": True, "real_rank": 2},
    "own": {**PAPER, "residual": "own"},
    "integer rank": {**PAPER, "rank": 4},
    "full rank": {**PAPER, "rank": 1.0},
    "constant eta": {**PAPER, "eta_mode": "constant", "eta": 1.0},
    "core_norm eta": {**PAPER, "eta_mode": "core_norm", "eta": 5.0},
    "no matching, scaled core": {**PAPER, "norm_match": False, "core_scale": 1.3},
    "frobenius": {**PAPER, "layer_weight": "frobenius", "real_rank": 2, "center": True},
    "excluded": {**PAPER, "exclude": ("conv*", "tall.weight")},
    "ranks by name": {**PAPER, "ranks": [["conv*", 4], ["tall.*", 1.0], ["tall.weight", 2]]},
    "kept and averaged": {**PAPER, "keep": ("tall.*", "encoder.bias"), "average": ("conv.*", "class_token")},
    "restored, relative": {**PAPER, "core_mode": "restored", "core_scale": 1.1},
    "rows, own": {"rank": 1.0, "row_power": 3.5, "residual": "own", "norm_match": False},
    "rows of task vectors": {"rank": 1.0, "row_power": 4, "real_rank": 0, "eta": 1.15},
    "rows, truncated": {"rank": 0.2, "row_power": 3.0, "eta": 0.8, "eta_mode": "sum"},
    "rows, own, truncated": {"rank": 3, "row_power": 3.0, "residual": "own", "core_scale": 1.2, "core_mode": "mean"},
    "layers scaled": {**PAPER, "scale": "layer"},
    "columns scaled": {**PAPER, "scale": "column"},
    "rows, columns scaled": {"rank": 1.0, "row_power": 1.0, "scale": "column"},
    "small matrices whole": {"rank": 0.3, "row_power": 0.0, "whole_up_to": 41, "ranks": (("conv1d*", 2),)},
    "rows, small matrices whole": {"rank": 0.3, "whole_up_to": 41, "row_power": 3.0},
    "some truncated, rounded down": {**PAPER, "truncate": ("enc*", "conv.*"), "rank_rounding": "down", "rank": 0.1},
    "authors' kit": MergeConfig.r2m_paper(rank=0.2, truncate=("enc*", "conv.*"), exclude=("*1d*", "*bias*")).to_dict(),
}
# Other methods: their configuration, and who defines it.
METHODS = {
    "weight average": (MergeConfig.weight_average(), others.weight_average),
    "task arithmetic": (MergeConfig.task_arithmetic(0.4), partial(others.task_arithmetic, scale=0.4)),
    "CART": (MergeConfig.cart(rank=0.2, scale=0.7), partial(others.cart, rank=0.2, scale=0.7)),
    "STAR": (MergeConfig.star(0.4), partial(others.star, share=0.4)),
    "MonoSoup": (MergeConfig.mono_soup(), others.mono_soup),
    "SCORE": (MergeConfig.score(0.7), partial(others.score, scale=0.7)),
    "SWUDI": (MergeConfig.swudi(30, 0.7), partial(others.swudi, descent_steps=30, scale=0.7)),
    "TSV-M": (MergeConfig.tsv_m(0.7), partial(others.tsv_m, scale=0.7)),
    "Iso-C": (MergeConfig.iso_c(0.7), partial(others.iso_c, scale=0.7)),
    "TIES": (MergeConfig.ties(0.3, 0.7), partial(others.ties, density=0.3, scale=0.7)),
    "DARE": (MergeConfig.dare(0.3, 0.7).replace(seed=5), partial(others.dare, density=0.3, scale=0.7, seed=5)),
    "DARE, everything kept": (MergeConfig.dare(1.0, 0.4), partial(others.dare, density=1.0, scale=0.4)),
    "TIES, everything kept": (MergeConfig.ties(1.0, 1.2), partial(others.ties, density=1.0, scale=1.2)),
}
CONFIGS |= {name: config.to_dict() for name, (config, _) in METHODS.items()}
WEIGHTED = (
    "default",
    "rows alike",
    "rows",
    "centred",
    "own",
    "full rank",
    "CART",
    "weight average",
    "STAR",
    "MonoSoup",
    "SCORE",
    "SWUDI",
    "TSV-M",
    "Iso-C",
    "TIES",
    "truncated",
    "rows, truncated",
    "rows of task vectors",
    "layers scaled",
    "columns scaled",
)
ENGINE_ONLY = ("svd", "power_iterations", "oversampling", "tolerance", "seed", "extra", "scale")
DEFAULTS = MergeConfig().to_dict()


def definition(base, experts, options, name=""):
    """What is right: the method of that name, else R²M; and what ``scale`` makes of it."""
    weights = options.get("weights")
    if name in METHODS:
        return METHODS[name][1](base, experts, weights=weights)
    known = inspect.signature(reference.merge).parameters
    unknown = [key for key in options if key not in known and key not in ENGINE_ONLY]
    assert all(options[key] == DEFAULTS[key] for key in unknown)  # R²M has no other options
    given = {key: value for key, value in options.items() if key in known}
    head = head_names({name: tensor.shape for name, tensor in base.items()})
    given["head"] = head if options.get("head", "mean") == "mean" else ()
    merged = reference.merge(base, experts, **given)
    scale = options.get("scale", "none")
    if scale == "layer":
        return others.layers_scaled(base, experts, merged, weights)
    return others.columns_scaled(base, experts, merged, core(base, experts, weights)) if scale == "column" else merged


def core(base, experts, weights):
    """(N,) coefficients of the core with the Real subspace's default."""
    matrices = [name for name, tensor in floating(base).items() if tensor.ndim > 1]
    rows = [torch.cat([(e[name].double() - base[name].double()).flatten() for name in matrices]) for e in experts]
    share = torch.tensor(weights or [1.0] * len(experts), dtype=torch.float64)
    return reference.real_subspace(torch.stack(rows), share / share.sum(), 1, False)[0]


# Experts of any number in float64 are among test_random_cases.py.
@pytest.mark.parametrize(("dtype", "count"), [*((torch.float32, n) for n in (1, 2, 3, 5)), (torch.float64, 3)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_exact_svd_is_within_2e_5_of_the_definition(name, dtype, count):
    base, experts = checkpoints(count, dtype=dtype, seed=count, scales=[1.0, 1.5, 0.7, 1.2, 0.9][:count])
    options = {**CONFIGS[name], "svd": "exact"}
    expected = definition(base, experts, options, name)
    merged = merge(base, experts, **options)
    assert distance(merged, expected) <= 2e-5 * distance(base, expected)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("name", WEIGHTED)
def test_weighted_experts_are_within_2e_5_of_the_definition_too(name, count):
    base, experts = checkpoints(count, seed=count)
    options = {**CONFIGS[name], "svd": "exact", "weights": (2.0, 1.0, 0.5, 3.0, 1.5)[:count]}
    expected = definition(base, experts, options, name)
    assert distance(merge(base, experts, **options), expected) <= 2e-5 * distance(base, expected)


@pytest.mark.parametrize("options", [{"center": True}, {}, {"center": True, "residual": "own"}], ids=str)
def test_exact_svd_is_as_near_where_the_subspace_is_barely_determined(options):
    options = {**PAPER, **options, "svd": "exact"}
    # Three unrelated specialists: eigenvalues of the Gram nearly agree, and its rounding would turn the projector.
    generator = torch.Generator().manual_seed(0)
    base = {"w": 1e-3 * torch.randn(300, 400, generator=generator)}
    experts = [{"w": base["w"] + 0.01 * torch.randn(300, 400, generator=generator)} for _ in range(3)]
    analysis = analyze(base, experts, **options)
    assert analysis.real_subspace.gap < 0.02
    rows = torch.stack([expert["w"].double() - base["w"].double() for expert in experts]).flatten(1)
    assert torch.allclose(analysis.gram, rows @ rows.T, rtol=1e-12, atol=1e-12)
    for rank in (1.0, options["rank"]):
        options["rank"] = rank
        expected = definition(base, experts, options)
        assert distance(merge(base, experts, **options), expected) <= 2e-5 * distance(base, expected)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name", ["default", "rows", "truncated", "centred", "own", "full rank", "rows, truncated", "CART"]
)
def test_16_bit_outputs_are_rounded_once(name, dtype, count):
    base, experts = checkpoints(count, dtype=dtype, seed=count)
    options = {**CONFIGS[name], "svd": "exact"}
    expected = definition(base, experts, options, name)
    rounded = {key: tensor.to(dtype) for key, tensor in floating(expected).items()}
    merged = merge(base, experts, **options)
    bound = 1.05 * distance(rounded, floating(expected)) + 2e-5 * distance(base, expected)
    assert distance(merged, floating(expected)) <= bound


def test_dtypes_may_be_mixed_between_experts():
    base, experts = checkpoints(4)
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    mixed = [
        {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in expert.items()}
        for expert, dtype in zip(experts, dtypes, strict=True)
    ]
    expected = reference.merge(base, mixed)
    merged = merge(base, mixed, svd="exact")
    assert distance(merged, expected) <= 2e-5 * distance(base, expected)
    assert all(merged[key].dtype == base[key].dtype for key in base)


@pytest.mark.parametrize(
    ("options", "bar"),
    [({}, 2e-2), ({"center": True, "real_rank": 2}, 5e-2), ({"residual": "own"}, 2e-2)],
    ids=["default", "centred", "own"],
)
def test_randomized_truncation_is_near_the_definition_where_the_spectrum_has_a_gap(options, bar):
    # A common and three own parts of rank 6 over a bulk 10⁴ times smaller: a residual mixes the four, the gap is at 24.
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shapes = {"a": (300, 260), "b": (256, 40, 9)}
    base = {name: 0.02 * randn(*shape) for name, shape in shapes.items()}
    common = {name: randn(shape[0], 6) @ randn(6, base[name].numel() // shape[0]) for name, shape in shapes.items()}
    experts = []
    for j in range(3):
        expert = {}
        for name, tensor in base.items():
            m, n = tensor.shape[0], tensor.numel() // tensor.shape[0]
            own = randn(m, 6) @ randn(6, n)
            expert[name] = (
                tensor + 1e-3 * (common[name] + (0.5 + 0.3 * j) * own + 1e-4 * randn(m, n)).reshape(tensor.shape)
            ).float()
        experts.append(expert)
    base = {name: tensor.float() for name, tensor in base.items()}
    options = {**PAPER, **options, "svd": "randomized", "rank": 24}
    mixing = analyze(base, experts, **options).real_subspace.mixing
    for name in base:
        task_matrix = torch.stack([(expert[name] - base[name]).double().flatten() for expert in experts])
        residuals = (mixing.T @ task_matrix).reshape(3, base[name].shape[0], -1)
        values = torch.linalg.svdvals(residuals)
        assert (values[:, 23] >= 2 * values[:, 24]).all()
    expected = definition(base, experts, options)
    merged = merge(base, experts, **options)
    assert distance(merged, expected) <= bar * distance(base, expected)


def test_names_shapes_dtypes_and_order_are_the_bases_and_inputs_stay_as_they_were():
    base, experts = checkpoints(3)
    before = [{key: tensor.clone() for key, tensor in state.items()} for state in (base, *experts)]
    merged = merge(base, experts)
    assert list(merged) == list(base)
    assert all(merged[key].shape == base[key].shape and merged[key].dtype == base[key].dtype for key in base)
    assert merged["steps"] == 7  # integers are the base's
    for state, copy in zip((base, *experts), before, strict=True):
        assert all(torch.equal(state[key], copy[key]) for key in copy)
    assert not any(merged[key].data_ptr() == base[key].data_ptr() for key in base)


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
def test_merged_tensors_are_contiguous_whatever_the_bases_layout(backend):
    base = {"turned": torch.randn(12, 20).T, "conv": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)}
    experts = [{name: tensor + 0.1 for name, tensor in base.items()}, dict(base)]
    merged = merge(base, experts, backend=backend)
    plain = merge({n: t.contiguous() for n, t in base.items()}, experts, backend=backend)
    assert not base["turned"].is_contiguous()
    assert all(tensor.is_contiguous() for tensor in merged.values())
    assert all(torch.equal(merged[name], plain[name]) for name in base)


def test_statistics_are_plain_means_and_never_negative():
    base, experts = checkpoints(3)
    merged = merge(base, experts, eta=50.0, eta_mode="constant", core_scale=7.0)
    for name in ("norm.running_mean", "norm.running_var"):
        mean = torch.stack([expert[name].double() for expert in experts]).mean(0)
        assert torch.allclose(merged[name].double(), mean, rtol=0, atol=1e-7)
    assert (merged["norm.running_var"] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_variance_far_below_the_bases_stays_positive(dtype):
    base = {"w": torch.zeros(3, 3), "bn.running_var": torch.full((4,), 6e4, dtype=dtype)}
    experts = [{"w": torch.randn(3, 3), "bn.running_var": torch.full((4,), v, dtype=dtype)} for v in (1e-5, 2e-5, 3e-5)]
    merged = merge(base, experts)["bn.running_var"]
    assert torch.allclose(merged.double(), torch.full((4,), 2e-5, dtype=torch.float64), rtol=0.02)


def test_modules_and_named_experts_are_taken_as_they_are():
    torch.manual_seed(0)
    base = torch.nn.Linear(6, 5)
    experts = {name: torch.nn.Linear(6, 5) for name in ("fs", "fr")}
    merged = merge(base, experts)
    plain = merge(base.state_dict(), [expert.state_dict() for expert in experts.values()])
    assert distance(merged, plain) == 0
    base.load_state_dict(merged, strict=True)
    assert not any(tensor.requires_grad for tensor in merged.values())


def test_output_dtype_can_be_asked_for():
    base, experts = checkpoints(2)
    merged = merge(base, experts, dtype=torch.bfloat16)
    assert all(tensor.dtype == torch.bfloat16 for tensor in floating(merged).values())
    assert merged["steps"].dtype == torch.int64
    full = merge(base, experts)
    assert all(torch.equal(merged[key], full[key].bfloat16()) for key in floating(full))
