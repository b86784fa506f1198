"""Residuals that are kept as operands, and products with them: shapes together, tall and wide, aligned and not."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from test_triton_kernels import embedded, inputs, mixing_of, mutant

from r2m_kernels import _triton
from r2m_kernels._interface import Effort, ResidualGroup
from r2m_kernels._stream.blocks import padded
from r2m_kernels._triton import launch, truncate
from r2m_kernels._triton.addresses import SCALE
from r2m_kernels._triton.residual_matmul import matrix_group
from r2m_kernels._triton.residuals import Residuals

# Tall, wide and square; more than a tile of 128 in both directions; and one whose rows are no whole vectors.
ALIGNED = [((136, 72), 9, 2), ((72, 144), 12, 1), ((64, 64), 5, 1)]
ODD = [((75, 133), 7, 1), ((41, 20), 3, 2)]


class Problem:
    """Shapes, ranks and numbers of tensors → their residuals, exact and kept, and vectors on either side."""

    def __init__(self, shapes, count=3, dtype=torch.float32, make=Residuals, offset=0):
        self.count, self.exact, groups, units, generator = count, [], [], [], torch.Generator().manual_seed(5)
        for seed, (shape, _, size) in enumerate(shapes):
            bases, experts, tau = inputs(shape, dtype, count, offset, tensors=size, seed=seed)
            x = torch.einsum("ji,lje->lie", mixing_of(count), tau).unflatten(2, shape)
            norms = x.square().sum((2, 3)).sqrt()
            x = x / norms[..., None, None]
            self.exact.append(x if shape[0] >= shape[1] else x.mT)
            units.append(mixing_of(count) / norms.unsqueeze(1))
            groups.append(matrix_group(bases, experts))
        self.kept = make(groups, [rank for _, rank, _ in shapes])
        self.kept.form(torch.cat(units).to(self.kept.dtype))
        self.scale = SCALE if self.kept.operand == torch.float16 else 1.0
        self.generator = generator

    def vectors(self, blocks, dtype, scale):
        """Random ones of length about 1: as they are given, and what they stand for."""
        given = blocks.vectors(dtype)
        given.fill_(math.nan)  # between the rows
        for rows in blocks.of_sorts(given):
            drawn = torch.randn(rows.shape, generator=self.generator, dtype=torch.float64) / rows.shape[-1] ** 0.5
            rows.copy_(drawn * scale)
        return given, [rows.double().unflatten(0, (-1, self.count)) / scale for rows in blocks.of_sorts(given)]

    def each(self, blocks, vectors):
        return [rows.double().unflatten(0, (-1, self.count)) for rows in blocks.of_sorts(vectors)]

    def energies(self, squares):
        """Of each block, in order."""
        tiles = [row[11] for row in self.kept.table.tolist() for _ in range(row[6], row[13]) for _ in range(self.count)]
        return [float(part.sum()) for part in torch.split(squares, tiles)]


UNIT = {torch.float32: 2.0**-11, torch.bfloat16: 2.0**-11, torch.float64: 2.0**-53}


@pytest.mark.parametrize("shapes", [ALIGNED, ODD], ids=["aligned", "odd"])
@pytest.mark.parametrize(
    ("count", "dtype"), [(3, torch.float32), (6, torch.float32), (2, torch.bfloat16), (3, torch.float64)], ids=str
)
def test_what_is_kept_is_the_residual_rounded_once(shapes, count, dtype):
    problem = Problem(shapes, count, dtype, offset=shapes is ODD)
    for kept, exact in zip(problem.kept.matrices(), problem.exact, strict=True):
        # A rounding, those of N + 1 terms that are larger than their sum, and the least float16.
        bound = 1.01 * UNIT[dtype] * exact.abs() + 64 * min(2.0**-24, UNIT[dtype]) * exact.abs().max() + 2.0**-38
        assert kept.shape == exact.shape
        assert ((kept.double() / problem.scale - exact).abs() <= bound).all()
    problem.kept.forget()
    assert problem.kept.numbers.numel() == 0


@pytest.mark.parametrize("shapes", [ALIGNED, ODD], ids=["aligned", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products_on_both_sides_are_those_of_the_residual(shapes, dtype):
    problem, worst = Problem(shapes, dtype=dtype), 0.0
    kept, scale = problem.kept, problem.scale
    given, exact = problem.vectors(kept.short, kept.operand, scale)
    found, squares = kept.along(given)
    lengths = torch.arange(2.0, 2 + sum(len(x) for x in problem.exact) * 3).view(-1, 3).to(kept.dtype)
    basis, of_basis = problem.vectors(kept.short, kept.dtype, 1.0)
    last, _ = kept.along(basis, lengths)
    wide, of_wide = problem.vectors(kept.long, kept.operand, scale)
    shares = torch.linspace(0.0, 1.2, squares.numel(), dtype=torch.float64)  # some blocks have more than all of it
    energies = torch.tensor(problem.energies(shares), dtype=torch.float64)
    back = kept.across(wide, given, shares, 40.0)
    expected = [v @ x.mT for v, x in zip(exact, problem.exact, strict=True)]
    for rows, product in zip(problem.each(kept.long, found), expected, strict=True):
        worst = max(worst, float((rows / scale - product).abs().max() / product.abs().max()))
    reached = torch.cat([product.square().sum((2, 3)).flatten() for product in expected])
    assert problem.energies(squares) == pytest.approx(reached.tolist(), rel=1e-3 if dtype == torch.float32 else 1e-12)
    first = 0
    for rows, v, x in zip(problem.each(kept.long, last), of_basis, problem.exact, strict=True):
        product, by = v @ x.mT, lengths[first : first + len(x), :, None, None].double()
        worst, first = max(worst, float((rows / by - product).abs().max() / product.abs().max())), first + len(x)
    first = 0
    for rows, v, x, u in zip(problem.each(kept.short, back), of_wide, problem.exact, exact, strict=True):
        blocks = x.shape[0] * x.shape[1]
        shift = (
            40.0 / (x.shape[3] - v.shape[2]) * (1.0 - energies[first : first + blocks]).clamp_min(0).view(-1, 3, 1, 1)
        )
        product, first = v @ x - shift * u, first + blocks
        worst = max(worst, float((rows - product).abs().max() / product.abs().max()))
    assert energies.min() < 0.5 < 1 < energies.max()
    # Operands are rounded, and once only.
    assert (2.0**-16 < worst <= 2.0**-9) if dtype == torch.float32 else worst <= 2.0**-48


def test_the_sketch_is_the_residual_times_random_signs():
    # The residual of one expert over a zero base, with mixing 1, is the expert itself: the identity shows the signs.
    groups = [matrix_group([torch.zeros(192, 192)], [[torch.eye(192)]])]

    def signs(*keys, k=96):
        kept = Residuals(groups * len(keys), [k] * len(keys))
        kept.form(torch.ones(len(keys), 1, 1))
        return [rows[0].double() for rows in kept.short.of_sorts(kept.sketch(torch.tensor(keys)))]

    rows, again, *others = signs(2**40 + 3, 2**40 + 3, 2**40 + 4, 3, 2**41 + 3)
    assert set(rows.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(rows, again)
    assert torch.equal(rows[:16], signs(2**40 + 3, k=16)[0])  # vector c does not depend on how many there are
    for other in others:
        assert abs(float((rows * other).mean())) < 0.03  # 4 standard deviations of 18432 coins
    # Neither rows nor columns favour a sign, or one another: six standard deviations.
    assert float(rows.mean(0).abs().max()) < 6 / math.sqrt(96)
    assert float(rows.mean(1).abs().max()) < 6 / math.sqrt(192)
    products = rows @ rows.T / 192 - torch.eye(96)
    assert float(products.abs().max()) < 6 / math.sqrt(192)


def test_experts_of_a_tensor_share_their_signs_and_tensors_do_not():
    problem = Problem([((40, 24), 8, 2)])
    (rows,) = problem.each(problem.kept.short, problem.kept.sketch(torch.tensor([7, 8])))
    (x,) = problem.exact
    # 40 numbers of a column are what 8 signed sums of it do not determine; the signs of an identity do.
    kept = Residuals([matrix_group([torch.zeros(40, 40)] * 2, [[torch.eye(40)] * 2] * 3)], [8])
    kept.form(torch.eye(3).expand(2, 3, 3).contiguous())
    (signs,) = (r.double().unflatten(0, (2, 3)) for r in kept.short.of_sorts(kept.sketch(torch.tensor([7, 8]))))
    assert torch.equal(signs[0, 0], signs[0, 2])
    assert not torch.equal(signs[0, 0], signs[1, 0])
    assert torch.allclose(rows, signs @ x, rtol=0, atol=2.0**-9 * float(x.abs().sum(2).max()))


def test_more_residuals_than_a_program_forms_and_tiles_than_one():
    # Two tiles of 128 vectors, and of 256 numbers on both sides of one.
    problem = Problem([((144, 136), 130, 1), ((272, 264), 140, 1)], count=5)
    kept = problem.kept
    assert (kept._product.rows, kept._product.columns) == (128, 256)
    given, exact = problem.vectors(kept.short, torch.float16, SCALE)
    found, squares = kept.along(given)
    products = [v @ x.mT for v, x in zip(exact, problem.exact, strict=True)]
    for rows, product in zip(problem.each(kept.long, found), products, strict=True):
        assert (rows / SCALE - product).abs().max() <= 2.0**-9 * product.abs().max()
    reached = torch.cat([product.square().sum((2, 3)).flatten() for product in products])
    assert problem.energies(squares) == pytest.approx(reached.tolist(), rel=1e-3)
    back = problem.each(kept.short, kept.across(found, given, squares, 1.0))
    for rows, product, x, v in zip(back, products, problem.exact, exact, strict=True):
        shift = (1 - product.square().sum((2, 3))).clamp_min(0)[..., None, None] / (x.shape[3] - v.shape[2])
        expected = product @ x - shift * v
        assert (rows - expected).abs().max() <= 2.0**-8 * expected.abs().max()


def test_tiles_are_wide_from_the_first_rank_that_narrow_ones_divide():
    for target in launch.TARGETS:
        narrow, wide = (launch.residual_product(target, torch.float32, True, rank) for rank in (128, 129))
        assert narrow.rows == 128
        assert wide.rows * wide.columns == 2 * narrow.rows * narrow.columns
        few, many = (launch.residual_product(target, torch.float32, False, rank) for rank in (128, 129))
        assert few == many


@pytest.mark.parametrize(
    ("original", "changed"),
    [
        ("mask=(rows < k)[:, None] & (depth < inner)[None, :]", "mask=(rows < k)[:, None] & (depth >= 0)[None, :]"),
        ("inside = tl.where(here, total, 0.0)", "inside = total + 1.0"),
        (
            "tl.trans(kept), mask=(columns < n)[:, None] & (rows < m)[None, :]",
            "tl.trans(kept), mask=(columns < n)[:, None]",
        ),
        ("tl.load(shapes + 8), 16) + block * long * stride", "tl.load(shapes + 8), 16) + block * short * stride"),
        ("first_tensor + tensor) * count * count", "tensor) * count * count"),
    ],
)
def test_a_kernel_that_reads_or_writes_elsewhere_is_caught(tmp_path, original, changed):
    module = mutant(tmp_path, "residuals", original, changed)
    problem = Problem(ALIGNED, make=module.Residuals)
    kept = problem.kept
    given, exact = problem.vectors(kept.short, torch.float16, SCALE)
    wide, of_wide = problem.vectors(kept.long, torch.float16, SCALE)
    found, squares = kept.along(given)
    back = kept.across(wide, given, torch.ones_like(squares), 1.0)

    def right():
        for rows, v, x in zip(problem.each(kept.long, found), exact, problem.exact, strict=True):
            assert (rows / SCALE - v @ x.mT).abs().max() <= 2.0**-9 * (v @ x.mT).abs().max()
        for rows, v, x in zip(problem.each(kept.short, back), of_wide, problem.exact, strict=True):
            assert (rows - v @ x).abs().max() <= 2.0**-9 * (v @ x).abs().max()
        reached = [
            float((v @ x.mT)[at, i].square().sum())
            for v, x in zip(exact, problem.exact, strict=True)
            for at in range(len(x))
            for i in range(3)
        ]
        assert problem.energies(squares) == pytest.approx(reached, rel=1e-3)

    with pytest.raises(AssertionError):
        right()


def test_a_residual_of_an_odd_address_has_the_same_bits(monkeypatch):
    monkeypatch.setattr(truncate, "EXTRA_STEPS", ())
    bases, experts, tau = inputs((40, 24), torch.float32, 3)
    energies = torch.einsum("ji,lje->lie", mixing_of(3), tau).square().sum(2)
    odd = [bases[0], embedded(bases[1], offset=1)]
    one, other = (
        _triton.shifted_truncation(
            [ResidualGroup(some, experts, torch.arange(2), energies, 4)], mixing_of(3), Effort(1, 0, None)
        )[0]
        for some in (bases, odd)
    )
    assert torch.equal(one.left, other.left)
    assert torch.equal(one.right, other.right)


def test_operands_of_the_interpreter_are_those_of_a_gpu():
    assert launch.INTERPRETED
    for target in launch.TARGETS:
        for rank in (16, 410):
            assert launch.residual_product(target, torch.float32, True, rank).precision == "fp16"
            assert launch.residual_product(target, torch.float64, True, rank).precision == "ieee"


def test_residuals_are_given_back_before_others_are_formed(monkeypatch):
    monkeypatch.setattr(truncate, "EXTRA_STEPS", ())
    kept, most = weakref.WeakSet(), []
    form = Residuals.form

    def watched(self, unit):
        form(self, unit)
        kept.add(self)
        most.append(sum(one.numbers.numel() for one in kept))

    monkeypatch.setattr(Residuals, "form", watched)
    groups = []
    for shape, _, size in (*ALIGNED, *ODD):  # the former together, the latter not: vectors of one are whole, short ones
        bases, experts, tau = inputs(shape, torch.float32, 3, tensors=size)
        energies = torch.einsum("ji,lje->lie", mixing_of(3), tau).square().sum(2)
        groups.append(ResidualGroup(bases, experts, torch.arange(size), energies, 1))
    _triton.shifted_truncation(groups, mixing_of(3), Effort(0, 0, None))
    sizes = [
        sum(3 * size * max(shape) * padded(min(shape)) for shape, _, size in some)
        for some in (ALIGNED, ODD[:1], ODD[1:])
    ]
    assert most == sizes
    assert sum(one.numbers.numel() for one in kept) == 0
