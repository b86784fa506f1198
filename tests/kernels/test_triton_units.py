"""Blocks of rows of length 1, rounded to float16, and quick passes that make them orthonormal."""

from __future__ import annotations

import math

import pytest
import torch
from interpreter import sum_alike_wherever_it_lies

from r2m_kernels._triton import units
from r2m_kernels._triton.addresses import SCALE
from r2m_kernels._triton.orthonormalize import Blocks

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")

CPU = torch.device("cpu")
# More than two tiles of 64 rows and of 128; a length that is no whole vector; one block of another sort, and two.
SORTS = [(2, 70, 160), (1, 140, 400), (2, 5, 37)]
ROUNDED = 2.0**-11  # a number's, relative to it


def laid(blocks, of_sorts, dtype=torch.float32):
    """Vectors as :class:`Blocks` lays them, NaN between them."""
    vectors = blocks.vectors(dtype).fill_(math.nan)
    for there, given in zip(blocks.of_sorts(vectors), of_sorts, strict=True):
        there.copy_(given)
    return vectors


def drawn(sorts, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*sort, generator=generator).to(dtype) for sort in sorts]


def exact(blocks, rows):
    """What float16 rows stand for, (blocks, k, length) float64 of each sort."""
    return [of.double() / SCALE for of in blocks.of_sorts(rows)]


def unit(rows):
    return rows / rows.norm(dim=-1, keepdim=True)


def beside_identity(rows):
    gram = rows.double() @ rows.double().mT
    return float(torch.linalg.matrix_norm(gram - torch.eye(len(gram[0]), dtype=torch.float64), 2).max())


def beside_span(rows, basis):
    """The longest part of a unit row that the basis does not have."""
    basis = torch.linalg.qr(basis.double().mT)[0]
    return float((rows - (rows @ basis) @ basis.mT).norm(dim=-1).max())


def assert_rows(blocks, found, expected):
    for one, given in zip(exact(blocks, found), expected, strict=True):
        # Of a number near 1 / √length; what is shorter than float16's normal ones by as much as those.
        bound = ROUNDED * given.abs() * 1.01 + 2.0**-25 / SCALE + 1e-6 / given.shape[-1] ** 0.5
        assert bool(((one - given).abs() <= bound).all())
    assert bool(found.isfinite().all())  # between the rows too


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("length", [152, 37, 2500])  # 2500: more than a program has in registers, and no whole vector
def test_rows_have_length_1_whatever_they_had(length, dtype):
    blocks = Blocks([(2, 3, length), (1, 9, 40)], CPU)
    given = drawn(blocks.sorts, dtype=dtype)
    given[0][0] *= 1e-3
    given[0][1] *= 100
    if dtype == torch.float32:
        given[1] *= 10.0 ** torch.arange(-13, 14, 3).unsqueeze(1)
    found = units.unit_rows(blocks, laid(blocks, given, dtype))
    assert_rows(blocks, found, [unit(of.double()) for of in given])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_are_less_what_is_subtracted(dtype):
    blocks, scale = Blocks([(2, 9, 152), (3, 5, 37)], CPU), 256.0
    given, others = drawn(blocks.sorts, dtype=dtype), [unit(of.double()) for of in drawn(blocks.sorts, 1)]
    amounts = torch.tensor([0.5, -0.25, 3.0, 0.0, 1e-3])
    subtracted = laid(blocks, [of * SCALE for of in others], torch.float16)
    found = units.unit_rows(blocks, laid(blocks, given, dtype), amounts, subtracted, scale)
    expected = [
        unit(of.double() / scale - amount.double()[:, None, None] * other)
        for of, amount, other in zip(given, amounts.split([2, 3]), exact(blocks, subtracted), strict=True)
    ]
    assert_rows(blocks, found, expected)


def test_rows_too_short_for_their_squares_are_zero_and_too_long_ones_no_numbers():
    blocks = Blocks([(1, 4, 24), (1, 2, 24)], CPU)
    given = [torch.ones(1, 4, 24), torch.ones(1, 2, 24)]
    given[0][0] *= torch.tensor([0.0, 1e-17, 1.0, 1e-37]).unsqueeze(1)
    given[1][0, 1] *= 1e30
    found = units.unit_rows(blocks, laid(blocks, given))
    zero, of_length_1 = torch.zeros(24, dtype=torch.float64), torch.full((24,), 24**-0.5, dtype=torch.float64)
    rows, long = exact(blocks, found)
    for place, expected in enumerate([zero, zero, of_length_1, zero]):
        assert torch.allclose(rows[0, place], expected, rtol=ROUNDED, atol=0)
    assert bool(long[0, 1].isnan().all())
    pivots = torch.ones(2)
    units.quick_pass(blocks, found, pivots)
    assert float(pivots[1]) == 0.0  # and so nobody trusts them


def conditioned(sorts, share, seed=0):
    """Rows that have the first one in common, but for a share of their squares."""
    return [of + (1 / share - 1) ** 0.5 * of[:, :1] for of in drawn(sorts, seed)]


def least_pivots(rows):
    """Of each block's Gram matrix."""
    return torch.linalg.cholesky(rows @ rows.mT).diagonal(dim1=1, dim2=2).square().amin(1)


@pytest.mark.parametrize("share", [1.0, 0.05])
def test_one_pass_is_orthonormal_to_rounding_and_two_to_float32(share):
    blocks = Blocks(SORTS, CPU)
    first = units.unit_rows(blocks, laid(blocks, conditioned(SORTS, share)))
    pivots = torch.full((blocks.count,), math.inf)
    second, nothing = units.quick_pass(blocks, first, pivots)
    assert nothing is None
    expected = [least_pivots(of) for of in exact(blocks, first)]
    assert torch.allclose(pivots.double(), torch.cat(expected), rtol=1e-3, atol=0)
    before = pivots.clone()
    third, whole = units.quick_pass(blocks, second, pivots, last=True)
    assert torch.equal(pivots, before)  # those of the second pass are near 1
    results = zip(*(exact(blocks, rows) for rows in (first, second, third)), blocks.of_sorts(whole), strict=True)
    for (given, once, rounded, twice), least in zip(results, expected, strict=True):
        # T − I is rounded, which multiplies U: by as much as that is longer than 1, and T than I.
        longest = float(torch.linalg.matrix_norm(given, 2).max()) / float(least.min()) ** 0.5
        assert beside_identity(once) <= ROUNDED * longest
        assert share < 1 or beside_identity(once) <= 2.0**-10
        assert beside_identity(twice) <= 1e-6 + ROUNDED * beside_identity(once)
        assert share < 1 or beside_identity(twice) <= 3e-6
        # However T − I is rounded, V = U + (T − I) U has no other span.
        assert beside_span(once, twice) <= 1e-6
        assert beside_span(given, once) <= 2.0**-11 / float(least.min()) ** 0.5
        assert bool(((rounded - twice).abs() <= ROUNDED * twice.abs() + 2.0**-25 / SCALE).all())


def test_blocks_of_zeros_and_those_that_are_not_trusted_stay_as_they_are():
    sorts = [(3, 40, 56), (1, 5, 24)]
    given = drawn(sorts)
    given[0][1] = 0.0
    given[0][2, 17] = 0.0
    blocks = Blocks(sorts, CPU)
    pivots = torch.tensor([0.5, 0.5, 0.5, math.nan])
    of_length_1 = units.unit_rows(blocks, laid(blocks, given))
    for _ in range(2):  # once they are not trusted nothing is made of them
        rows, whole = units.quick_pass(blocks, of_length_1, pivots, last=True)
        assert float(pivots[2]) == 0.0
    assert 0 < float(pivots[0]) < 0.5
    assert float(pivots[1]) == 0.5
    assert bool(pivots[3].isnan())  # what was not trusted before is not now
    basis = blocks.of_sorts(whole)[0]
    assert not bool(basis[1].any())
    for place, block in ((0, 2), (1, 0)):
        found, left = (blocks.of_sorts(of)[place][block] for of in (rows, of_length_1))
        assert torch.equal(found, left)
    assert bool(whole.isfinite().all())
    assert bool(rows.isfinite().all())


def test_a_row_in_the_span_of_others_is_not_trusted():
    given = drawn([(1, 40, 56)])
    given[0][0, 30] = given[0][0, :30].sum(0)
    blocks, pivots = Blocks([(1, 40, 56)], CPU), torch.ones(1)
    units.quick_pass(blocks, units.unit_rows(blocks, laid(blocks, given)), pivots)
    assert float(pivots[0]) < 2.0**-16


@pytest.mark.parametrize("place", [0, 20, 33])
def test_a_number_that_is_none_is_not_trusted(place):
    blocks, pivots = Blocks([(2, 34, 40)], CPU), torch.ones(2)
    rows = units.unit_rows(blocks, laid(blocks, drawn(blocks.sorts)))
    blocks.of_sorts(rows)[0][1, place, 7] = math.nan
    units.quick_pass(blocks, rows, pivots)
    assert 0 < float(pivots[0]) < 1
    assert float(pivots[1]) == 0.0


def test_a_block_has_the_same_bits_alone_and_among_others(monkeypatch):
    sum_alike_wherever_it_lies(monkeypatch)
    given = drawn(SORTS)

    def results(sorts, of_sorts):
        blocks = Blocks(sorts, CPU)
        amounts = torch.full((blocks.count,), 0.125)
        subtracted = units.unit_rows(blocks, laid(blocks, [of.flip(-1) for of in of_sorts]))
        rows = units.unit_rows(blocks, laid(blocks, of_sorts), amounts, subtracted)
        pivots = torch.ones(blocks.count)
        second, whole = units.quick_pass(blocks, rows, pivots, last=True)
        parts = (blocks.of_sorts(of) for of in (rows, second, whole))
        return list(zip(*parts, pivots.split([count for count, _, _ in sorts]), strict=True))

    together = results(SORTS, given)
    for place, (count, k, length) in enumerate(SORTS):
        for block in range(count):
            ((*alone, pivot),) = results([(1, k, length)], [given[place][block : block + 1]])
            for one, other in zip((*alone, pivot), together[place], strict=True):
                assert torch.equal(one[0], other[block])
