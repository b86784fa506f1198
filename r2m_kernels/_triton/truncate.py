"""Step 3 for a group of tensors: subspace iteration with a shift, and no small problem at all (README §4).

On A = X or Xᵀ, tall, with V holding k = r orthonormal rows on the short side: V ← orth(SᵀA) with random signs S, then
V ← orth(V (AᵀA − a)) a few times, and A ≈ (A Vᵀ) V has rank r already. The shift a, below the mean energy of what V
leaves out, is what makes few steps without oversampling enough: it needs no knowledge of the spectrum, and no eigen-
or singular value problem, which on a GPU would cost more than all the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._interface import Effort, ResidualGroup, ShiftedFactors
from .._stream.factors import SLOWEST
from . import gram_start, launch
from .addresses import Group, on_device, send, vectors_fit
from .lengths import row_lengths
from .orthonormalize import Blocks, inner_products
from .residual_matmul import matrix_group, residual_matmul
from .residuals import SHAPE, Kept, Residuals, fits, product_config, sides_of_group, tiles_of
from .signs import signs_of
from .sums import sum_tiles, summed

# Below it a residual counts as zero: what scales it to norm 1, and then to operands, would not fit float32.
SMALLEST_ENERGY = 1e-66
# Without oversampling the luck of the draw evens out over many columns only: at small ranks more steps, on matrices
# that cost next to nothing, take its place (measured: ranks 10, 20 and 40 of ten times as many, seven spectra).
EXTRA_STEPS = ((32, 4), (64, 2))
# From as many columns on the sketch of a Gram matrix stands for a step (512 × 512 and smaller, four spectra, ranks .3
# to .45: below it up to 1.022 × the optimum).
MANY = 256
# A residual that loses less than this share of its energy has so steep a spectrum that squaring it with operands of 11
# bits may lose more than 2 per cent of what it loses; with shares of 5e-4 to 5e-3 it is 1.3 per cent at most by steps.
STEEP = 1e-3
# The same of a residual whose last product is in full precision, and with it what it loses (256 × 320, ranks .1 and .4,
# powers, exponentials and few directions before a tail: 1.7 per cent at most).
STEEPEST = 3e-5
# Below such a pivot one pass leaves the first basis so far from orthonormal that its energy is no start of a series.
ROUGH = 2.0**-12
# The sketch of a residual of few directions has more rows than those: the last ones are in the span of those before.
# What they have beside it is, squared and in the mean over random signs, the energy that the span lacks.
WITNESSES = 4
LACKING = 1e-9  # of the residual's energy


@triton.jit(do_not_specialize=["count"])
def judge_kernel(
    energies,
    before,
    last,
    steps,
    final,
    shapes,
    pivots,
    kept,
    trusted,
    gap,
    count,
    SHAPE: tl.constexpr,
    STEEP: tl.constexpr,
    PIVOTS: tl.constexpr,
    SLOWEST: tl.constexpr,
    KNOWN: tl.constexpr,
    ROUGH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """kept, trusted and gap of each residual, see :class:`r2m_kernels._interface.ShiftedFactors`.

    energies of all residuals; sums of tiles, as shares of the energies, of what the bases of the last two steps had of
    them (KNOWN: there were two; the tiles are those of the table ``steps``), and of the product that became a factor.
    With PIVOTS, the least of every residual's, none of which is to be 0; below ROUGH the gap is not known.
    """
    residual = tl.program_id(0).to(tl.int64)
    first_tensor, tiles, start = tiles_of(shapes, residual, count, SHAPE)
    energy, place = tl.load(energies + residual), start + (residual - first_tensor * count) * tiles
    reached = energy * summed(final + place, tiles, BLOCK)
    tl.store(kept + residual, reached)
    beyond = tl.where(energy - reached >= STEEP * energy, 1, 0)  # a NaN is not
    if PIVOTS:
        beyond = tl.where(tl.load(pivots + residual) > 0.0, beyond, 0)
    tl.store(trusted + residual, tl.where(energy > 0.0, beyond, 1).to(tl.int8))
    left_to_gain = energy * float("nan")
    if KNOWN:
        # What further steps would add: the last three energies continued as a geometric series (Aitken).
        first_tensor, tiles, start = tiles_of(steps, residual, count, SHAPE)
        place = start + (residual - first_tensor * count) * tiles
        first, second = energy * summed(before + place, tiles, BLOCK), energy * summed(last + place, tiles, BLOCK)
        former, growth = second - first, reached - second
        growth = tl.where(growth < 0.0, 0.0, growth)
        ratio = growth / tl.where(former < 1e-300, 1e-300, former)
        ratio = tl.where(ratio > SLOWEST, SLOWEST, ratio)
        left_to_gain = growth * ratio / (1.0 - ratio)
        if ROUGH > 0.0:
            left_to_gain = tl.where(tl.load(pivots + residual) >= ROUGH, left_to_gain, float("nan"))
    tl.store(gap + residual, left_to_gain)


def shifted_truncation(groups: Sequence[ResidualGroup], mixing: Tensor, effort: Effort) -> list[ShiftedFactors]:
    """See :class:`r2m_kernels._interface.ShiftedTruncation`; components come in no order.

    Groups of as many steps and tiles go together: one launch serves them all.
    """
    inputs = [matrix_group(group.bases, group.experts) for group in groups]
    together: dict[tuple[Road | None, bool], list[int]] = {}
    for place, (group, of) in enumerate(zip(groups, inputs, strict=True)):
        road = None if effort.few_directions else road_of(of, group.rank, effort)
        together.setdefault((road, vectors_fit(min(sides_of_group(of)))), []).append(place)
    made: dict[int, ShiftedFactors] = {}
    for (road, _), places in together.items():
        some = [groups[place] for place in places]
        if road is None:
            found = _by_one_sketch(some, mixing, effort.products)
        else:
            send([inputs[place] for place in places], some[0].bases[0].device)
            residuals = Residuals([inputs[place] for place in places], [group.rank for group in some])
            found = _in_lock_step(some, residuals, mixing, road, effort.products and not effort.carefully)
        if effort.carefully:
            found = [_again(*one, mixing, effort.products) for one in zip(some, found, strict=True)]
        made.update(zip(places, found, strict=True))
    return [made[place] for place in range(len(groups))]


class Road(NamedTuple):
    """How residuals of a group are truncated, but for those of few directions.

    Attributes:
        config: of products with what is kept.
        by_gram: from their Gram matrices.
        steps: of subspace iteration.
    """

    config: launch.MatmulConfig
    by_gram: bool
    steps: int


def road_of(inputs: Group, rank: int, effort: Effort) -> Road:
    """That of inputs of one shape, at a rank."""
    aligned, short = fits(inputs), min(sides_of_group(inputs))
    by_gram = aligned and inputs.compute_dtype == torch.float32 and gram_start.worth_it(short, rank)
    by_gram = by_gram and not effort.carefully
    return Road(product_config(inputs, rank, aligned), by_gram, _steps(effort, rank, short, by_gram))


def _steps(effort: Effort, rank: int, short: int, by_gram: bool) -> int:
    """Of subspace iteration; the sketch of a Gram matrix stands for one of those that larger shares ask for."""
    more = effort.more_steps(rank, short)
    fewer = max(0, more - 1) if by_gram and rank >= MANY else more
    return effort.iterations + fewer + next((extra for below, extra in EXTRA_STEPS if rank < below), 0)


class Subspaces(NamedTuple):
    """What truncates residuals, one group after another.

    Attributes:
        operands, basis: orthonormal rows, as operands and in the compute dtype.
        reached: of each step how much of every residual its basis had, as sums of the tiles of ``kept``.
        pivots: (blocks,) float32, the least of every one, where a basis is not orthonormal whatever that is.
    """

    operands: Tensor
    basis: Tensor
    reached: Sequence[Tensor]
    kept: Kept
    pivots: Tensor | None = None


def _by_steps(residuals: Residuals, keys: Tensor, steps: int) -> Subspaces:
    """With A and Aᵀ, and bases that are orthonormal whatever their condition."""

    def orthonormal(vectors: Tensor, last: bool) -> Tensor:
        # Only the span of a basis matters to what follows it, but for the last one.
        return residuals.short.orthonormal(vectors, 2 if last else 1, None if last else residuals.operand)

    basis, reached = orthonormal(residuals.sketch(keys), steps == 0), list[Tensor]()
    for step in range(steps):
        product, squares = residuals.along(basis)
        reached.append(squares)
        basis = orthonormal(residuals.across(product, basis, squares, gram_start.SHIFT), step + 1 == steps)
    return Subspaces(basis, basis, reached, residuals)


def _from_grams(residuals: Residuals, keys: Tensor, steps: int) -> Subspaces:
    """With AᵀA, see :mod:`.gram_start`."""
    operands, basis, reached, pivots, grams = gram_start.subspaces(residuals, keys, steps)
    return Subspaces(operands, basis, reached, grams, pivots)


def _in_lock_step(
    groups: Sequence[ResidualGroup],
    residuals: Residuals,
    mixing: Tensor,
    road: Road,
    products: bool,
) -> list[ShiftedFactors]:
    energies = torch.cat([group.energies for group in groups])
    # Scaled to norm 1: operands fit float16 then, and squares of large and small residuals fit float32.
    present = energies > SMALLEST_ENERGY
    unit = mixing.to(energies) * torch.where(present, energies, torch.inf).rsqrt().unsqueeze(1)  # columns are experts
    lengths, keys = torch.where(present, energies, 0.0).sqrt(), torch.cat([group.keys for group in groups])
    numbers = energies, unit.to(residuals.dtype), lengths.to(residuals.dtype), keys
    energies, unit, lengths, keys = on_device(numbers, residuals.device)

    residuals.form(unit)
    found = (_from_grams if road.by_gram else _by_steps)(residuals, keys, road.steps)
    product, squares = residuals.along(found.operands, lengths)
    residuals.forget()
    judged = _judged(residuals, energies, squares, found)
    factors, first = [], 0
    for group, long, short in zip(
        groups, residuals.long.of_sorts(product), residuals.short.of_sorts(found.basis), strict=True
    ):
        size = len(group.bases)
        sides = [rows.view(size, -1, *rows.shape[1:]) for rows in (long, short)]
        left, right = sides if _tall(group) else sides[::-1]
        trusted, gap, reached = (numbers[first : first + size] for numbers in judged)
        together = inner_products(left, right) if products else None
        factors.append(ShiftedFactors(left.mT, right, False, together, trusted, gap, reached))
        first += size
    return factors


def _again(group: ResidualGroup, made: ShiftedFactors, mixing: Tensor, products: bool) -> ShiftedFactors:
    """The same with a last product in full precision, which tells, too, what is lost of a steep spectrum."""
    tall, (energies,) = _tall(group), on_device([group.energies], made.left.device)
    basis = made.right.mT if tall else made.left
    product = residual_matmul(group.bases, group.experts, mixing, basis, not tall, "tf32x3")
    left, right = (product, made.right) if tall else (made.left, product.mT)
    # Lengths of its rows, whose sums are the same bits whoever else is in the group.
    reached = sum_tiles(row_lengths(product, product.mT, True, orthonormal=True).square())
    trusted = energies - reached >= STEEPEST * energies
    together = inner_products(left.mT, right) if products else None
    return ShiftedFactors(left, right, False, together, trusted, made.gap, reached)


def _by_one_sketch(groups: Sequence[ResidualGroup], mixing: Tensor, products: bool) -> list[ShiftedFactors]:
    """Residuals of fewer directions than the rank, in full precision; trusted where the sketch shows that they are.

    They are not kept: two products read the inputs.
    """
    device, sorts = groups[0].bases[0].device, []
    for group in groups:
        m = len(group.bases[0])
        sorts.append((group.energies.numel(), group.rank, min(m, group.bases[0].numel() // m)))
    blocks, triangles = Blocks(sorts, device), list[Tensor]()
    energies, *keys = on_device(
        [torch.cat([group.energies.flatten() for group in groups]), *(group.keys for group in groups)], device
    )
    vectors = torch.empty(0)
    for place, (group, of_group) in enumerate(zip(groups, keys, strict=True)):
        tall, of_signs = _tall(group), signs_of(group, of_group)
        drawn = residual_matmul(group.bases, group.experts, mixing, of_signs.mT, tall, "tf32x3").mT
        vectors = blocks.vectors(drawn.dtype) if place == 0 else vectors
        blocks.of_sorts(vectors)[place].copy_(drawn.flatten(0, 1))
    bases = blocks.of_sorts(blocks.orthonormal(vectors, passes=2, triangles=triangles))
    beside = blocks.last_on_diagonal(triangles[0], WITNESSES).square()  # reciprocal; 0: there was no residual
    trusted = (beside == 0) | (beside * energies >= 1 / LACKING)
    found, first, nothing = [], 0, torch.zeros_like(energies)
    for group, basis in zip(groups, bases, strict=True):
        shape, last = group.energies.shape, first + group.energies.numel()
        rows = basis.view(*shape, *basis.shape[1:])
        product = residual_matmul(group.bases, group.experts, mixing, rows.mT, not _tall(group), "tf32x3")
        left, right = (product, rows) if _tall(group) else (rows.mT, product.mT)
        together = inner_products(left.mT, right) if products else None
        numbers = (each[first:last].view(shape) for each in (trusted, nothing, energies))  # nothing is left to gain
        found.append(ShiftedFactors(left, right, False, together, *numbers))
        first = last
    return found


def _tall(group: ResidualGroup) -> bool:
    m = len(group.bases[0])
    return m >= group.bases[0].numel() // m


def _judged(residuals: Residuals, energies: Tensor, squares: Tensor, found: Subspaces) -> tuple[Tensor, Tensor, Tensor]:
    """Whether each truncation can be relied on, their gaps, and their energies: (tensors, N) each."""
    reached, gap = torch.empty_like(energies), torch.empty_like(energies)
    trusted, config, known = torch.empty_like(energies, dtype=torch.int8), launch.sums(), len(found.reached) > 1
    launch.start(
        judge_kernel,
        (energies.numel(),),
        config,
        energies,
        *(found.reached[-2:] if known else (squares, squares)),
        *(found.kept.table, squares, residuals.table),
        reached if found.pivots is None else found.pivots,
        *(reached, trusted, gap, residuals.count),
        SHAPE=SHAPE,
        STEEP=STEEP,
        PIVOTS=found.pivots is not None,
        SLOWEST=SLOWEST,
        KNOWN=known,
        ROUGH=ROUGH if found.pivots is not None and len(found.reached) == 2 else 0.0,
        BLOCK=config.block,
    )
    return trusted.view(torch.bool), gap, reached
