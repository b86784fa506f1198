"""Whole steps and merges on the Triton backend, in the interpreter: against the definition and the torch backend."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from cases import TRUNCATED, checkpoints, distance, floating, matrix_with, same_bits, spectrum
from interpreter import multiply_in_tf32
from triton.runtime.errors import OutOfResources

from r2m_kernels import (
    BackendUnavailable,
    InvalidInput,
    MergeConfig,
    _backends,
    _triton,
    analyze,
    merge,
    reference,
    truncation,
)
from r2m_kernels._stream.plan import truncation_rank
from r2m_kernels._triton import launch, truncate
from r2m_kernels.truncation import truncate_residuals

SLOW = pytest.mark.slow
# Two shapes with two tensors each make groups; tall, wide and one row length that is no multiple of a vector.
SHAPES = {"a.weight": (72, 66), "b.weight": (72, 66), "c.weight": (66, 70), "d.weight": (66, 70), "e.weight": (40, 131)}
SHAPES |= {"a.bias": (80,), "b.bias": (80,), "norm.running_var": (16,), "token": (1, 1, 33), "temperature": ()}

# The same groups where the size does not matter.
SMALL = {name: tuple(-(-size // 3) for size in shape) for name, shape in SHAPES.items()}


def factors_of(matrix, rank, name="x", **options):
    x = matrix.float()
    group = ([name], [torch.zeros_like(x)], [[x]])
    (factors,) = truncate_residuals(*group, torch.eye(1, dtype=torch.float64), rank, MergeConfig(**options), _triton)
    return factors


def error_of(factors, matrix):
    exact = matrix.float().double()
    return float((exact - factors.left[0].double() @ factors.right[0].double()).norm())


WIDE, TALL = (512, 528), (520, 512)
# Minutes in the interpreter: one small case, then each spectrum once, tall or wide.
QUALITY = [("k^-1/2", (320, 336))] + [
    pytest.param(*case, marks=SLOW)
    for case in (("k^-1/2", WIDE), ("linear", WIDE), ("k^-1", TALL), ("16 spikes", TALL), (1.3e-3, TALL))
]


def spikes_before(share, size, rank):
    """Singular values of which the optimum leaves out a share of the energy: spikes, and a bulk a fifth as long."""
    index, spikes = torch.arange(1, size + 1, dtype=torch.float64), rank * 3 // 4
    values = torch.where(index <= spikes, 1 + (spikes + 1 - index) / spikes, torch.linspace(0.2, 0.01, size).double())
    rest, bulk = values[rank:].square().sum(), values[spikes:].square().sum()
    values[:spikes] *= ((rest / share - bulk) / values[:spikes].square().sum()).sqrt()
    return values


@pytest.mark.parametrize(("kind", "shape"), QUALITY)
def test_truncation_is_within_2_per_cent_of_the_optimum(monkeypatch, kind, shape):
    multiply_in_tf32(monkeypatch)
    rank = truncation_rank(0.1, shape)
    values = spectrum(kind, min(shape)) if isinstance(kind, str) else spikes_before(kind, min(shape), rank)
    matrix = matrix_with(values, *shape)
    factors = factors_of(matrix, rank)
    assert factors.method == "shifted"
    assert factors.left.shape == (1, shape[0], rank)
    assert factors.right.shape == (1, rank, shape[1])
    optimum = float(values[rank:].norm())
    assert 0.9999 * optimum <= error_of(factors, matrix) <= 1.02 * optimum
    # What came with the factors is what they say, and their order can be had.
    explicit = (factors.left[0].double() @ factors.right[0].double()).square().sum()
    assert float(factors.inner_products()) == pytest.approx(float(explicit), rel=1e-9)
    smaller = factors.truncated(rank // 2)
    assert error_of(smaller, matrix) <= 1.02 * float(values[rank // 2 :].norm())


def steep(kind, size):
    index = torch.arange(1, size + 1, dtype=torch.float64)
    if kind == "19 spikes":
        return torch.where(index <= 19, 140 * (20.0 - index) / 19 + 1, torch.linspace(1.0, 0.05, size).double())
    return spectrum(kind, size) if kind in ("rank 8", "zero") else index ** -float(kind.removeprefix("k^-"))


@pytest.mark.parametrize(
    "kind", ["19 spikes", "zero", *(pytest.param(kind, marks=SLOW) for kind in ("k^-3", "rank 8"))]
)
def test_steep_spectra_are_left_to_the_careful_method(monkeypatch, kind):
    multiply_in_tf32(monkeypatch)
    values = steep(kind, 120)
    matrix = matrix_with(values, 130, 120)
    error = error_of(factors_of(matrix, 24), matrix)
    # 1.05: fewer columns than the 50 of the contract, where luck matters more; below it, float32 of the input.
    assert error <= 1.05 * float(values[24:].norm()) + 2e-6 * float(values.norm())


# Operands that were cut off after so many bits, as tf32's are, lost 8 per cent at 1.15e-3, and 2 at 2.4e-3.
@pytest.mark.parametrize(
    ("share", "method"),
    [(1e-5, "textbook"), (5e-4, "shifted"), *(pytest.param(at, "shifted", marks=SLOW) for at in (1.3e-3, 5e-3))],
)
def test_nearly_steep_spectra_are_within_the_bound_too(monkeypatch, share, method):
    multiply_in_tf32(monkeypatch)
    monkeypatch.setattr(truncate, "EXTRA_STEPS", ())
    values = spikes_before(share, 120, 12)
    matrix = matrix_with(values, 130, 120)
    factors = factors_of(matrix, 12)
    assert factors.method == method
    # 1.05: fewer columns than the 50 of the contract, where luck matters more; below it, float32 of the input.
    assert error_of(factors, matrix) <= 1.05 * float(values[12:].norm()) + 2e-6 * float(values.norm())


@pytest.mark.parametrize(("tail", "method"), [(0.0, "shifted"), pytest.param(1e-7, "textbook", marks=SLOW)])
def test_residuals_of_few_directions_are_truncated_by_one_sketch_and_others_are_not(monkeypatch, tail, method):
    multiply_in_tf32(monkeypatch)
    monkeypatch.setattr(truncate, "EXTRA_STEPS", ())
    values = torch.full((66,), (tail / 60) ** 0.5, dtype=torch.float64)
    values[:3] = torch.tensor([1.0, 0.1, 1e-3])
    matrix = 40 * matrix_with(values / values.norm(), 72, 66)
    factors = factors_of(matrix, 9)
    assert factors.method == method
    # 2e-6: float32 of the input and of both factors.
    assert error_of(factors, matrix) <= 40 * (1.05 * float(values[9:].norm()) + 2e-6)


@pytest.mark.slow
def test_truncation_does_not_depend_on_the_scale():
    matrix = matrix_with(spectrum("linear", 80), 80, 96)
    optimum, ordinary = float(spectrum("linear", 80)[8:].norm()), error_of(factors_of(matrix, 8), matrix)
    for scale in (1e-12, 1e12):
        error = error_of(factors_of(scale * matrix, 8), scale * matrix) / scale
        assert error == pytest.approx(ordinary, rel=1e-3)
        assert error <= 1.02 * optimum


@pytest.mark.slow
def test_more_steps_help_and_a_tolerance_is_kept():
    matrix = matrix_with(spectrum("linear", 100), 100, 112)
    errors = [error_of(factors_of(matrix, 10, power_iterations=q), matrix) for q in (0, 3)]
    assert errors[1] < errors[0]
    assert factors_of(matrix, 10, tolerance=0.1).ordered  # each tensor on its own, by the textbook's method


# Types differ in how elements are read and rounded, whatever the rest: each once with factors, by the slow way.
EXACT = [(torch.float32, count, power) for count, power in ((1, None), (1, 0.0), (1, 3.0), (3, None), (3, 3.0))]
EXACT += [(dtype, 3, None) for dtype in (torch.bfloat16, torch.float16)]
FACTORS = [pytest.param(torch.bfloat16, 3, 3.0, marks=SLOW), (torch.float16, 1, 0.0)]
FACTORS += [pytest.param(torch.float32, 3, 0.0, marks=SLOW)]


@pytest.mark.parametrize(("dtype", "count", "power"), [*EXACT, *FACTORS], ids=str)
def test_an_exact_merge_is_as_near_to_the_definition_as_torchs(dtype, count, power):
    base, experts = checkpoints(count, dtype=dtype, shapes=SMALL, seed=count, scales=[1.0, 1.5, 0.7][:count])
    options = {} if power is None else {"rank": 0.1, "row_power": power, "whole_up_to": 0}
    expected = reference.merge(base, experts, **options)
    rounded = {key: tensor.to(dtype) for key, tensor in floating(expected).items()}
    bound = 1.05 * distance(rounded, floating(expected)) + 2e-5 * distance(base, expected)
    for backend in ("torch", "triton"):
        merged = merge(base, experts, svd="exact", backend=backend, **options)
        assert distance(merged, floating(expected)) <= bound
        assert all(merged[key].dtype == base[key].dtype and merged[key].shape == base[key].shape for key in base)


# `make test` holds the default to its definition, in test_default.py, and a group's tensors to what each is alone.
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_randomized_merge_is_near_the_definition_where_the_spectrum_has_a_gap(dtype):
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base = {name: 0.02 * randn(96, 88) for name in ("a", "b")}
    common = {name: randn(96, 3) @ randn(3, 88) for name in base}
    experts = [
        {
            name: (t + 1e-2 * (common[name] + randn(96, 3) @ randn(3, 88) + 1e-3 * randn(96, 88))).to(dtype)
            for name, t in base.items()
        }
        for _ in range(2)
    ]
    base = {name: tensor.to(dtype) for name, tensor in base.items()}
    options = {"rank": 9, "dtype": torch.float32}  # what both have of rank 9: a gap, rounding of the inputs apart
    exact = merge(base, experts, TRUNCATED, svd="exact", **options)
    ours = merge(base, experts, TRUNCATED, backend="triton", **options)
    assert distance(ours, exact) <= (2e-2 if dtype == torch.float32 else 6e-2) * distance(base, exact)


@pytest.fixture
def fewer_steps(monkeypatch):
    """Without the extra steps at small ranks: they make a result more accurate, and a test of bits twice as slow."""
    monkeypatch.setattr(truncate, "EXTRA_STEPS", ())


@pytest.mark.usefixtures("fewer_steps")
def test_the_same_bits_twice_in_any_order_group_and_memory(tmp_path):
    base, experts = checkpoints(2, shapes={"a": (68, 66), "b": (68, 66), "wide": (65, 72), "bias": (68,)})
    expected = merge(base, experts, TRUNCATED, backend="triton")
    names = list(base)[::-1]
    turned = merge(
        {n: base[n] for n in names}, [{n: e[n] for n in names} for e in experts], TRUNCATED, backend="triton"
    )
    assert same_bits(expected, {n: turned[n] for n in base})
    analysis = analyze(base, experts, TRUNCATED, backend="triton", memory_budget="16KiB", spill_directory=tmp_path)
    assert analysis.spilled_bytes > 0
    assert same_bits(expected, analysis.merge())
    config = MergeConfig.cart(rank=0.1, scale=1.0)  # no number of this configuration joins tensors
    pair, alone = (
        merge({n: base[n] for n in names}, [{n: e[n] for n in names} for e in experts], config, backend="triton")
        for names in ("ab", "b")
    )
    assert torch.equal(pair["b"], alone["b"])


def test_an_analysis_merges_at_smaller_ranks_and_says_who_computed():
    base, experts = checkpoints(2, shapes={"tall": (72, 66), "wide": (66, 72), "bias": (72,)})
    analysis = analyze(base, experts, TRUNCATED, backend="triton", rank=0.3)
    report = analysis.report()
    assert report["backend"] == {"name": "triton", "reason": "asked for by name", "device": "cpu"}
    smaller, exact = (
        {row["name"]: row.get("kept_energy") for row in found.report(found.config.replace(rank=0.1))["tensors"]}
        for found in (analysis, analyze(base, experts, TRUNCATED, svd="exact", rank=0.3))
    )
    for name, kept in exact.items():
        if kept is not None:
            lost, least = ([1 - one for one in row.values()] for row in (smaller[name], kept))
            # 1.02 of the norm is 1.04 of the energy.
            assert all(a <= 1.04 * b + 1e-6 for a, b in zip(lost, least, strict=True))
    assert distance(analysis.merge(rank=0.1), analysis.merge()) > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_in_a_group_is_named_by_expert_and_tensor(bad):
    base, experts = checkpoints(3, shapes=SHAPES)
    experts[1]["d.weight"][3, 4] = bad
    with pytest.raises(InvalidInput, match=r"'expert1'.*'d.weight' holds NaN or Inf in 1 of 4620 elements"):
        merge(base, experts, backend="triton")


def test_auto_takes_triton_on_gpus_and_gives_a_reason_elsewhere(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(_backends, "_tried", lambda device: "")
    chosen = _backends.choose("auto", gpu)
    assert (chosen.name, chosen.reason) == ("triton", "the fastest one this version has for cuda")
    assert _backends.choose("auto", torch.device("cpu")).name == "native"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    chosen = _backends.choose("auto", gpu)
    assert chosen.name == "torch"
    assert chosen.reason == "the Triton backend needs a GPU of compute capability 8.0 or newer"
    with pytest.raises(
        BackendUnavailable, match=r"backend 'triton' needs a GPU of compute capability 8\.0 or newer; use"
    ):
        _backends.choose("triton", gpu)
    with pytest.raises(BackendUnavailable, match="backend 'triton' runs on CUDA and ROCm GPUs and not on 'mps'"):
        _backends.choose("triton", torch.device("mps"))


def test_amd_gpus_for_which_nothing_was_compiled_are_not_tried(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(_backends, "_tried", lambda device: "")
    properties = mock.Mock(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    chosen = _backends.choose("auto", gpu)
    assert (chosen.name, chosen.reason) == ("triton", "the fastest one this version has for cuda")
    properties.gcnArchName = "gfx1100"
    chosen = _backends.choose("auto", gpu)
    assert (chosen.name, chosen.reason) == (
        "torch",
        "the Triton backend is compiled for AMD's gfx942 and not for gfx1100",
    )
    with pytest.raises(BackendUnavailable, match=r"^backend 'triton' is compiled for AMD's gfx942 and no"):
        _backends.choose("triton", gpu)


@pytest.mark.parametrize(("capability", "slow"), [((8, 0), False), ((8, 9), True), ((9, 0), False), ((12, 0), True)])
def test_a_gpu_that_is_slow_in_float64_is_told(monkeypatch, capability, slow):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(_backends, "_tried", lambda device: "")
    assert _backends.choose("triton", torch.device("cuda")).reason.endswith("orthonormalized") == slow


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore"),
        PermissionError(13, "Permission denied", "/root/.triton/cache"),
        OutOfResources(232448, 101376, "shared memory"),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
)
def test_where_triton_cannot_compile_or_launch_auto_takes_torch_and_says_why(error, monkeypatch):
    def fails(*_, **__):
        raise error

    gpu = torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("r2m_kernels._triton.sums.sum_rows", fails)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: None)
    _backends._tried.cache_clear()
    chosen = _backends.choose("auto", gpu)
    assert chosen.name == "torch"
    first = str(error).splitlines()[0]
    assert chosen.reason.startswith(f"the Triton backend cannot compile or launch a kernel on 'cuda:3' ({first})")
    assert "\n" not in chosen.reason
    with pytest.raises(BackendUnavailable, match=r"^backend 'triton' cannot compile or launch .*backend='torch'"):
        _backends.choose("triton", gpu)
    _backends._tried.cache_clear()


def test_a_kernel_that_a_gpu_cannot_run_is_named_in_one_sentence(monkeypatch):
    def fails(*_, **__):
        raise OutOfResources(232448, 101376, "shared memory")

    with pytest.raises(BackendUnavailable) as caught:
        launch.start({(1,): fails}, (1,), launch.sums(), torch.ones(1))
    assert str(caught.value).startswith("backend 'triton' cannot run a kernel on 'cpu': out of resource: shared memory")
    assert str(caught.value).endswith("backend='torch' (--backend torch) needs no compiler")
    assert "\n" not in str(caught.value)


def test_steep_residuals_of_a_group_are_truncated_again_and_the_others_stay():
    shape, kinds = (100, 90), {"a": "linear", "b": "k^-3", "c": "linear", "d": "k^-3"}
    values = {name: steep("k^-3", 90) if kind == "k^-3" else spectrum(kind, 90) for name, kind in kinds.items()}
    base = {name: torch.zeros(shape) for name in kinds}
    expert = {name: matrix_with(values[name], *shape).float() for name in kinds}
    options = {"rank": 9, "real_rank": 0, "row_power": 0.0}  # by row lengths are known alone
    analysis = analyze(base, [expert], backend="triton", **options)
    methods = {name: one.method for name, one in analysis._findings.truncated.items()}
    assert methods == {"a": "shifted", "b": "textbook", "c": "shifted", "d": "textbook"}
    for name in kinds:
        alone = analyze({name: base[name]}, [{name: expert[name]}], backend="triton", **options)
        for side in ("left", "right"):
            assert torch.equal(*(getattr(one._run.factors.get(name), side) for one in (analysis, alone)))
        assert torch.equal(*(one._findings.truncated[name].products for one in (analysis, alone)))


@pytest.mark.usefixtures("fewer_steps")
def test_spectra_of_a_group_with_a_steep_residual_are_mapped_each_for_itself(monkeypatch):
    monkeypatch.setattr(truncation, "EXACT_UP_TO", 8)
    shape, kinds = (30, 26), {"a": "linear", "b": "k^-6", "c": "linear"}
    base = {name: torch.zeros(shape) for name in kinds}
    values = {name: steep(kind, 26) if kind == "k^-6" else spectrum(kind, 26) for name, kind in kinds.items()}
    experts = [{name: matrix_with(values[name], *shape, seed=seed).float() for name in kinds} for seed in (1, 2)]
    whole = merge(base, experts, MergeConfig.tsv_m(), backend="triton")
    for name in kinds:
        of_one = ({name: base[name]}, [{name: expert[name]} for expert in experts])
        assert torch.equal(merge(*of_one, MergeConfig.tsv_m(), backend="triton")[name], whole[name])
