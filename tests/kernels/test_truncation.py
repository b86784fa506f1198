"""Truncation errors against the optimum, and what the options of the truncation do."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from cases import matrix_with, spectrum

from r2m_kernels import MergeConfig, _native, _torch, truncation
from r2m_kernels._interface import Effort
from r2m_kernels._stream.budget import effort_of
from r2m_kernels._stream.plan import truncation_rank
from r2m_kernels._torch import gram_start, truncate
from r2m_kernels.truncation import truncate_residuals

BACKENDS = pytest.mark.parametrize("operators", [_torch, _native], ids=["torch", "native"])


def truncated(name, experts, rank, operators=_native, **options):
    """Factors of one tensor whose base is zero and whose residuals are the experts themselves."""
    identity = torch.eye(len(experts), dtype=torch.float64)
    group = ([name], [torch.zeros_like(experts[0])], [[expert] for expert in experts])
    (factors,) = truncate_residuals(*group, identity, rank, MergeConfig(**options), operators)
    return factors


def truncation_error(matrix, rank, **options):
    """‖X − X̂‖ / optimum, or / ‖X‖ where the optimum is rounding."""
    x = matrix.float()
    factors = truncated("x", [x], rank, **options)
    assert factors.left.shape == (1, x.shape[0], rank)
    assert factors.right.shape == (1, rank, x.numel() // x.shape[0])
    error = float((x.double().flatten(1) - factors.left[0].double() @ factors.right[0].double()).norm())
    optimum = float(torch.linalg.svdvals(x.double().flatten(1))[rank:].norm())
    whole = float(x.double().norm())
    return error / optimum if optimum > 1e-6 * whole else error / max(whole, 1e-300)


def test_the_backends_method_is_told_every_residuals_energy_and_a_key_of_each_tensor():
    generator = torch.Generator().manual_seed(0)
    base, *experts = (torch.randn(2, 70, 80, generator=generator) for _ in range(4))
    mixing = torch.randn(3, 3, generator=generator).double()
    told = {}

    def shifted_truncation(groups, mixing, effort):
        told.update(keys=groups[0].keys.tolist(), energies=groups[0].energies)
        return _torch.shifted_truncation(groups, mixing, effort)

    operators = SimpleNamespace(**{**vars(_torch), "shifted_truncation": shifted_truncation})
    group = (["a", "b"], list(base), [list(expert) for expert in experts])
    truncate_residuals(*group, mixing, 7, MergeConfig(), operators)
    tau = torch.stack([expert.double() - base.double() for expert in experts], dim=1)
    residuals = torch.einsum("ji,ljmn->limn", mixing, tau)
    # The Gram is known to 16 roundings of products of lengths, which a mixing of numbers about 1 hardly cancels.
    assert torch.allclose(told["energies"], residuals.square().sum((2, 3)), rtol=1e-4)
    assert len(set(told["keys"])) == 2


@pytest.mark.parametrize("kind", ["linear", "k^-1/2", "k^-1", "16 spikes", "k^-2", "k^-3", "19 spikes"])
@pytest.mark.parametrize("shape", [(512, 1024), (1024, 512), (600, 600)], ids=str)
@BACKENDS
def test_randomized_truncation_is_within_2_per_cent_of_the_optimum(kind, shape, operators):
    matrix = matrix_with(spectrum(kind, min(shape)), *shape)
    assert 0.9999 <= truncation_error(matrix, truncation_rank(0.1, shape), operators=operators) <= 1.02


@BACKENDS
def test_gaussian_noise_is_within_2_1_per_cent(operators):
    noise = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1))
    assert 0.9999 <= truncation_error(noise, 103, operators=operators) <= 1.021


@pytest.mark.parametrize("rank", [8, 16, 30])
@pytest.mark.parametrize("kind", ["linear", "k^-1/2", "k^-1", "16 spikes", "geometric"])
@BACKENDS
def test_small_ranks_are_within_2_per_cent_too(rank, kind, operators):
    matrix = matrix_with(spectrum(kind, 300), 300, 500)
    assert 0.9999 <= truncation_error(matrix, rank, operators=operators) <= 1.02


@pytest.mark.parametrize("kind", ["linear", "k^-1/2", "k^-1", "16 spikes"])
@pytest.mark.parametrize("shape", [(300, 1200), (1200, 300)], ids=str)
@BACKENDS
def test_steps_by_a_gram_find_what_steps_by_the_matrix_find(kind, shape, operators, monkeypatch):
    matrix, counted, turned = matrix_with(spectrum(kind, 300), *shape), [], truncate._turned
    monkeypatch.setattr(Effort, "from_gram", lambda *_: False)
    monkeypatch.setattr(truncate, "_turned", lambda *given: counted.append(1) or turned(*given))
    by_gram = truncation_error(matrix, 120, operators=operators)
    assert len(counted) == 3
    monkeypatch.setattr(Effort, "by_gram", lambda *_: False)
    assert by_gram == pytest.approx(truncation_error(matrix, 120, operators=operators), rel=3e-3)
    assert len(counted) == 3


@pytest.mark.parametrize(("kind", "mild"), [("linear", 1), ("k^-1/2", 1), ("k^-1", 0), ("19 spikes", 0)])
@pytest.mark.parametrize("shape", [(300, 600), (600, 300), (400, 400)], ids=str)
@BACKENDS
def test_a_spectrum_that_falls_slowly_is_truncated_from_its_gram_alone(kind, mild, shape, operators, monkeypatch):
    matrix, found, subspaces = matrix_with(spectrum(kind, min(shape)), *shape), [], gram_start.subspaces
    monkeypatch.setattr(gram_start, "subspaces", lambda *given: found.append(subspaces(*given)) or dict(found[-1]))
    error = truncation_error(matrix, truncation_rank(0.4, shape), operators=operators)
    assert list(map(len, found)) == [mild]
    assert 0.9999 <= error <= (1.02 if mild else 1.04)


@pytest.mark.parametrize("factor", [1.0, 4.0, 0.0, float("nan"), float("inf")])
def test_a_length_that_the_task_gram_knows_to_rounding_alone_is_measured(factor, monkeypatch):
    matrix, sketched, sketch = matrix_with(spectrum("linear", 300), 300, 600).float(), [], truncate.Residuals.sketch
    residuals = truncate.Residuals.of(torch.zeros(300, 600), [matrix], torch.ones(1, 1))
    energies = matrix.double().square().sum().view(1)
    monkeypatch.setattr(
        truncate.Residuals, "sketch", lambda self, *given: sketched.append(self) or sketch(self, *given)
    )
    found = truncate._subspace(residuals, 1, factor * energies, 120, effort_of(MergeConfig()))
    assert found.energy.tolist() == pytest.approx(energies.tolist(), rel=1e-6)
    assert (residuals in sketched) == (factor != 1)
    left, right, trusted, _ = truncate._factors(found, [0], 120)
    least = torch.linalg.svdvals(matrix.double())[120:].norm()
    assert bool(trusted.all())
    assert (left[0].double() @ right[0].double() - matrix).norm() <= 1.02 * least


@pytest.mark.parametrize(("kind", "quick"), [("linear", True), ("k^-1", False)])
def test_the_last_product_is_rounded_only_where_far_more_is_cut_off(kind, quick, monkeypatch):
    used, multiply = [], truncate._multiply
    monkeypatch.setattr(truncate, "_multiply", lambda *given: used.append(given[-1]) or multiply(*given))
    matrix = matrix_with(spectrum(kind, 300), 300, 400).float()
    residuals = truncate.Residuals.of(torch.zeros(300, 400), [matrix], torch.ones(1, 1))
    residuals.fast_dtype = torch.bfloat16
    energies = matrix.double().square().sum().view(1)
    found = truncate._subspace(residuals, 1, energies, 120, effort_of(MergeConfig()))
    found.unit.fast_dtype = torch.bfloat16
    truncate._factors(found, [0], 120)
    assert used == [torch.bfloat16 if quick else torch.float32]


@pytest.mark.parametrize("kind", ["linear", "k^-1", "16 spikes"])
@pytest.mark.parametrize("shape", [(200, 333), (333, 200)], ids=str)
def test_exact_truncation_is_the_optimum(kind, shape):
    matrix = matrix_with(spectrum(kind, min(shape)), *shape)
    assert truncation_error(matrix, 20, svd="exact") == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("kind", ["rank 8", "zero"])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("svd", ["randomized", "textbook", "exact"])
@BACKENDS
def test_what_has_no_more_than_rank_r_is_kept_to_rounding(kind, scale, svd, operators):
    matrix = scale * matrix_with(spectrum(kind, 256), 256, 512)
    assert truncation_error(matrix, 16, svd=svd, operators=operators) <= 4e-6


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@BACKENDS
def test_the_scale_of_a_residual_does_not_matter(scale, operators):
    matrix = matrix_with(spectrum("k^-1/2", 256), 256, 512)
    assert 0.9999 <= truncation_error(scale * matrix, 26, operators=operators) <= 1.02


@pytest.mark.parametrize("rank", [52, 120])
@pytest.mark.parametrize("kind", ["k^-2", "k^-3", "rank 40"])
def test_steep_residuals_go_to_the_textbook_and_low_rank_ones_need_no_step(kind, rank, monkeypatch):
    calls = []
    for name in ("_there_and_back", "_multiply"):
        original = getattr(truncate, name)
        monkeypatch.setattr(truncate, name, lambda *a, f=original, n=name: calls.append(n) or f(*a))
    textbook = truncation.textbook
    monkeypatch.setattr(truncation, "textbook", lambda *a: calls.append("textbook") or textbook(*a))
    truncated("x", [matrix_with(spectrum(kind, 512), 512, 600).float()], rank)
    assert calls == (["_multiply"] if kind == "rank 40" else ["_multiply", "textbook"])


@pytest.mark.parametrize("rank", [52, 205])
@pytest.mark.parametrize("kind", ["linear", "k^-1/2", "k^-1", "16 spikes", "19 spikes"])
@pytest.mark.parametrize("svd", ["randomized", "textbook"])
def test_the_estimated_distance_to_the_optimum_is_of_the_right_size(kind, svd, rank):
    x = matrix_with(spectrum(kind, 512), 512, 1000).float()
    factors = truncated("x", [x], rank, svd=svd)
    error = float((x.double() - factors.left[0].double() @ factors.right[0].double()).square().sum())
    best = float(torch.linalg.svdvals(x.double())[rank:].square().sum())
    gap, energy = float(factors.gap[0]), float(x.double().square().sum())
    if math.isnan(gap):  # what is left to gain is lost in the rounding of steps in bfloat16
        assert rank == 205
        assert error - best < 1e-4 * energy
    else:
        assert (error - best) / 5 <= gap <= 5 * (error - best)


def test_an_exact_truncation_has_no_distance_to_the_optimum():
    factors = truncated("x", [matrix_with(spectrum("linear", 100), 100, 200).float()], 10, svd="exact")
    assert factors.gap.tolist() == [0.0]


def test_small_matrices_are_truncated_exactly():
    # The sketch would span the whole space: there is nothing to gain from it.
    matrix = matrix_with(spectrum("linear", 30), 30, 400)
    assert truncation_error(matrix, 3) == pytest.approx(1.0, abs=1e-6)


def test_more_power_iterations_and_more_oversampling_help():
    matrix = matrix_with(spectrum("linear", 512), 512, 600)
    errors = [truncation_error(matrix, 40, svd="textbook", power_iterations=q) for q in (0, 1, 2)]
    assert errors[0] > errors[1] > errors[2]
    assert truncation_error(matrix, 40, svd="textbook", power_iterations=0, oversampling=100) < errors[0]
    errors = [truncation_error(matrix, 40, power_iterations=q) for q in (0, 2, 4)]  # a shifted step for every two
    assert errors[0] > errors[1] > errors[2]
    assert truncation_error(matrix, 40, power_iterations=0, oversampling=100) < errors[0]


@pytest.mark.parametrize("svd", ["randomized", "textbook"])
def test_tolerance_stops_early_and_a_tight_one_does_not(svd):
    matrix = matrix_with(spectrum("linear", 512), 512, 600)
    first = 4 if svd == "randomized" else 1  # two steps are the first whose growth is known
    one, six = (truncation_error(matrix, 40, svd=svd, power_iterations=q) for q in (first, 6))
    assert six < one
    assert truncation_error(matrix, 40, svd=svd, power_iterations=6, tolerance=0.5) == one
    assert truncation_error(matrix, 40, svd=svd, power_iterations=6, tolerance=0.0) == six


def test_components_come_by_descending_size_so_that_a_smaller_rank_is_a_slice():
    x = matrix_with(spectrum("k^-1", 256), 256, 300).float()
    factors = truncated("x", [x], 20)
    smaller = factors.truncated(5)
    error = (x.double() - smaller.left[0].double() @ smaller.right[0].double()).norm()
    optimum = torch.linalg.svdvals(x.double())[5:].norm()
    assert error <= 1.001 * optimum
    assert factors.truncated(20) is factors


def test_inner_products_come_from_the_factors():
    generator = torch.Generator().manual_seed(0)
    experts = [torch.randn(200, 150, generator=generator) for _ in range(3)]
    factors = truncated("x", experts, 10)
    explicit = (factors.left.double() @ factors.right.double()).flatten(1)
    assert torch.allclose(factors.inner_products(), explicit @ explicit.T, rtol=1e-10)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)], ids=str)
def test_lengths_of_residuals_beside_one_another_need_an_orthogonal_side_alone(shape):
    generator = torch.Generator().manual_seed(0)
    experts = [torch.randn(shape, generator=generator) for _ in range(3)]
    factors = truncated("x", experts, 70)
    assert not factors.ordered
    explicit = (factors.left.double() @ factors.right.double()).flatten(1)
    expected, found = explicit @ explicit.T, factors.inner_products()
    lengths = expected.diag().sqrt()
    # Rows that Cholesky made orthonormal are so to some roundings of float32, and ‖F_i‖² is a sum over them.
    assert ((found - expected).abs() <= 1e-6 * torch.outer(lengths, lengths)).all()
    assert torch.allclose(found.diag(), factors.energies(), rtol=1e-6)


def test_the_test_matrix_depends_on_seed_and_name():
    x = matrix_with(spectrum("linear", 300), 300, 300).float()

    def factors(name, **options):
        return truncated(name, [x], 10, **options).left

    assert torch.equal(factors("a"), factors("a"))
    assert not torch.equal(factors("a"), factors("b"))
    assert not torch.equal(factors("a"), factors("a", seed=1))


@pytest.mark.parametrize(
    ("rank", "shape", "expected"),
    [
        (0.1, (1024, 4096), 103),
        (0.1, (10, 50), 1),
        (0.07, (100, 100), 7),
        (0.05, (2, 768), 1),
        (1.0, (7, 9), 7),
        (1, (7, 9), 1),
        (64, (7, 9), 7),
        (0.1, (48, 5, 3, 3), 5),
        (0.5, (3, 1), 1),
    ],
)
def test_ranks_are_rounded_up_and_capped(rank, shape, expected):
    assert truncation_rank(rank, shape) == expected
