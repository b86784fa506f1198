"""Subspaces from Gram matrices of residuals that are kept: these, their products, and what becomes of spectra."""

from __future__ import annotations

import pytest
import torch
from cases import matrix_with, spectrum
from test_triton_kernels import mutant
from test_triton_residuals import ALIGNED, Problem

from r2m_kernels import MergeConfig, _triton, truncation
from r2m_kernels._interface import Effort, ResidualGroup
from r2m_kernels._stream.plan import truncation_rank
from r2m_kernels._triton import gram_start, truncate
from r2m_kernels._triton.addresses import SCALE
from r2m_kernels._triton.gram_start import Grams

SLOW = pytest.mark.slow
# Three rows of tiles and two columns of them, the last ones cut off.
TILED = [((264, 280), 20, 1)]


def formed(problem, make=Grams):
    grams = make(problem.kept)
    grams.form()
    return grams


def exact_grams(problem):
    """AᵀA of what is kept."""
    return [(kept.double() / SCALE).mT @ (kept.double() / SCALE) for kept in problem.kept.matrices()]


@pytest.mark.parametrize(("shapes", "count"), [(ALIGNED, 3), (TILED, 1)], ids=["several", "tiled"])
def test_a_gram_matrix_is_what_is_kept_times_itself_rounded_once(shapes, count):
    problem = Problem(shapes, count)
    for found, exact in zip(formed(problem).matrices(), exact_grams(problem), strict=True):
        assert found.shape == exact.shape
        # A rounding of float16, sums of float32, and half of the least float16.
        assert ((found.double() / SCALE - exact).abs() <= 1.01 * 2.0**-11 * exact.abs() + 2.0**-20).all()
        assert torch.equal(found, found.mT)


def test_products_with_a_gram_matrix_tell_what_a_basis_has_of_the_residual():
    problem = Problem(ALIGNED)
    grams = formed(problem)
    given, exact = problem.vectors(grams.short, torch.float16, SCALE)
    found, reached = grams.along(given, paired=True)
    tiles = [row[11] for row in grams.table.tolist() for _ in range(row[6], row[13]) for _ in range(3)]
    energies = torch.stack([part.sum() for part in torch.split(reached, tiles)])
    expected = [v @ gram for v, gram in zip(exact, exact_grams(problem), strict=True)]
    for rows, product in zip(problem.each(grams.short, found), expected, strict=True):
        assert (rows / SCALE - product).abs().max() <= 2.0**-9 * product.abs().max()
    kept = torch.cat([(v * product).sum((2, 3)).flatten() for v, product in zip(exact, expected, strict=True)])
    assert torch.allclose(energies, kept, rtol=2e-3)
    shifts = grams.shifts(reached * 12, 0.5)  # more than all of some
    open_ = torch.cat([v.new_full((3 * len(v),), v.shape[3] - v.shape[2]) for v in exact])
    left_out = 1 - torch.stack([(part * 12).sum() for part in torch.split(reached, tiles)])
    assert left_out.min() < 0 < left_out.max()
    assert torch.allclose(shifts.double(), (0.5 * left_out / open_).clamp_min(0), rtol=1e-6)


@pytest.mark.parametrize(
    ("original", "changed"),
    [
        ("mask=below)", "mask=below & (columns[None, :] < rows[:, None]))"),
        ("mask=above)", "mask=above & False)"),
        ("in_row = row * ROWS // COLUMNS + 1", "in_row = row + 1"),
        ("block * long * stride", "block * short * stride"),
        ("inside & (rows < short)[None, :]", "inside & (rows < short - 1)[None, :]"),
    ],
)
def test_a_gram_that_reads_or_writes_elsewhere_is_caught(tmp_path, original, changed):
    module = mutant(tmp_path, "gram_start", original, changed)

    def right():
        for shapes, count in ((ALIGNED, 3), (TILED, 1)):
            problem = Problem(shapes, count)
            for found, exact in zip(formed(problem, module.Grams).matrices(), exact_grams(problem), strict=True):
                assert ((found.double() / SCALE - exact).abs() <= 2.0**-10 * exact.abs() + 2.0**-20).all()

    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        right()


def group_of(matrix, rank):
    x = matrix.float()
    return ResidualGroup([torch.zeros_like(x)], [[x]], torch.tensor([3]), x.double().square().sum().view(1, 1), rank)


def truncated(matrix, rank, **effort):
    one = torch.eye(1, dtype=torch.float64)
    return _triton.shifted_truncation([group_of(matrix, rank)], one, Effort(2, 0, None, **effort))[0]


def error_of(left, right, matrix):
    return float((matrix.float().double() - left.double() @ right.double()).norm())


# The share of the default. By careful steps as from the Gram matrix: it is the same promise.
@pytest.mark.parametrize("carefully", [False, pytest.param(True, marks=SLOW)])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("linear", (336, 320)),
        *(pytest.param(kind, (528, 512), marks=SLOW) for kind in ("linear", "k^-1/2", "16 spikes")),
        pytest.param("linear", (512, 544), marks=SLOW),
    ],
)
def test_the_share_of_a_default_merge_is_truncated_within_2_per_cent_of_the_optimum(kind, shape, carefully):
    matrix, rank = matrix_with(spectrum(kind, min(shape)), *shape), truncation_rank(MergeConfig().rank, shape)
    found = truncated(matrix, rank, carefully=carefully)
    optimum = float(spectrum(kind, min(shape))[rank:].norm())
    assert bool(found.trusted)
    assert 0.9999 * optimum <= error_of(found.left[0, 0], found.right[0, 0], matrix) <= 1.02 * optimum
    short = found.right[0, 0].double() if shape[0] >= shape[1] else found.left[0, 0].mT.double()
    assert (short @ short.mT - torch.eye(rank)).abs().max() < 1e-5
    explicit = (found.left[0, 0].double() @ found.right[0, 0].double()).square().sum()
    assert float(found.energies) == pytest.approx(float(explicit), rel=1e-5)


@pytest.mark.parametrize("kind", ["k^-1", pytest.param("k^-3", marks=SLOW)])
def test_a_spectrum_too_steep_for_its_gram_matrix_is_truncated_carefully_or_by_the_book(kind):
    """Not trusted, and then within the bound."""
    shape = (128, 136)
    values = spectrum("k^-1", 128) if kind == "k^-1" else torch.arange(1, 129, dtype=torch.float64) ** -3
    matrix, rank = matrix_with(values, *shape), truncation_rank(0.4, shape)
    assert not bool(truncated(matrix, rank).trusted)
    assert bool(truncated(matrix, rank, carefully=True).trusted) == (kind == "k^-1")
    x = matrix.float()
    one = torch.eye(1, dtype=torch.float64)
    given = (["x"], [torch.zeros_like(x)], [[x]], one, rank, MergeConfig(), _triton)
    (factors,) = truncation.truncate_residuals(*given)
    assert factors.method == ("shifted" if kind == "k^-1" else "textbook")
    # 1.04: columns where luck matters; below it, float32 of the input.
    assert error_of(factors.left[0], factors.right[0], matrix) <= 1.04 * float(values[rank:].norm()) + 2e-6


def test_a_residual_that_is_nothing_stays_nothing_beside_others():
    matrix = torch.stack([matrix_with(spectrum("linear", 80), 88, 80).float(), torch.zeros(88, 80)])
    energies = matrix.double().square().sum((1, 2)).view(2, 1)
    group = ResidualGroup([torch.zeros(88, 80)] * 2, [list(matrix)], torch.arange(2), energies, 32)
    found = _triton.shifted_truncation([group], torch.eye(1, dtype=torch.float64), Effort(1, 0, None))[0]
    assert found.trusted.tolist() == [[True], [True]]
    assert not found.left[1].any()
    explicit = (found.left @ found.right).square().sum((2, 3))
    assert torch.allclose(found.energies.float(), explicit, rtol=1e-5, atol=0.0)
    alone = _triton.shifted_truncation(
        [
            group._replace(
                bases=group.bases[:1], experts=[list(matrix[:1])], keys=torch.arange(1), energies=energies[:1]
            )
        ],
        torch.eye(1, dtype=torch.float64),
        Effort(1, 0, None),
    )[0]
    assert torch.equal(found.left[0], alone.left[0])
    assert torch.equal(found.right[0], alone.right[0])


def test_a_residual_has_the_bits_it_has_beside_one_of_a_rank_with_other_tiles():
    groups = [
        group_of(matrix_with(spectrum("linear", min(shape)), *shape), rank)
        for shape, rank in (((80, 72), 66), ((144, 152), 130))
    ]
    one, effort = torch.eye(1, dtype=torch.float64), Effort(0, 0, None)
    together = _triton.shifted_truncation(groups, one, effort)
    for group, beside in zip(groups, together, strict=True):
        (alone,) = _triton.shifted_truncation([group], one, effort)
        for name in ("left", "right", "energies"):
            assert torch.equal(getattr(beside, name), getattr(alone, name))


@pytest.mark.parametrize(
    ("short", "rank", "by_gram", "steps"),
    [
        (1024, 410, True, 2),
        (1024, 410, False, 3),
        (512, 205, True, 3),
        (1024, 103, True, 2),
        (1024, 16, False, 6),
        (72, 8, False, 6),
    ],
)
def test_more_steps_are_taken_where_more_is_kept_or_luck_evens_out_less(short, rank, by_gram, steps):
    assert truncate._steps(Effort(2, 0, None), rank, short, by_gram) == steps
    assert gram_start.worth_it(short, rank) == (rank > 16)
    assert not gram_start.worth_it(60_000, 40_000)  # places in a block of vectors have 32 bits


def test_what_is_left_to_gain_is_not_told_from_bases_that_are_far_from_orthonormal(monkeypatch):
    monkeypatch.setattr(truncate, "EXTRA_STEPS", ())
    told = {}
    for kind in ("linear", "16 spikes"):
        matrix = matrix_with(spectrum(kind, 160), 168, 160)
        (two, three) = (
            _triton.shifted_truncation(
                [group_of(matrix, 24)], torch.eye(1, dtype=torch.float64), Effort(steps, 0, None)
            )[0]
            for steps in (2, 3)
        )
        assert bool(two.trusted)
        told[kind] = [not bool(one.gap.isnan()) for one in (two, three)]
    assert told == {"linear": [True, True], "16 spikes": [False, True]}


@pytest.mark.parametrize("shape", [(96, 88), (88, 96)])
def test_energies_of_a_steep_residual_are_its_own_whoever_else_is_in_the_group(shape):
    matrices = [matrix_with(spectrum("k^-1", min(shape)), *shape, seed=seed).float() for seed in range(3)]
    one, effort = torch.eye(1, dtype=torch.float64), Effort(2, 0, None, carefully=True)

    def group(some):
        energies = torch.stack([matrices[place].double().square().sum() for place in some]).view(-1, 1)
        chosen = [matrices[place] for place in some]
        return ResidualGroup([torch.zeros(shape)] * len(some), [chosen], torch.tensor(some), energies, 30)

    (together,) = _triton.shifted_truncation([group([0, 1, 2])], one, effort)
    explicit = (together.left.double() @ together.right.double()).square().sum((2, 3))
    assert torch.allclose(together.energies, explicit, rtol=1e-5)
    (alone,) = _triton.shifted_truncation([group([1])], one, effort)
    for name in ("left", "right", "energies"):
        assert torch.equal(getattr(together, name)[1:2], getattr(alone, name))
