"""Step 3 for a group of tensors: subspace iteration with a shift, and no small problem at all (README §4).

On A = X or Xᵀ, tall, with V holding k = r orthonormal rows on the short side: V ← orth(SᵀA) with random signs S, then
V ← orth(V (AᵀA − a)) a few times, and A ≈ (A Vᵀ) V has rank r already. The shift a, below the mean energy of what V
leaves out, is what makes few steps without oversampling enough: it needs no knowledge of the spectrum, and no eigen-
or singular value problem, which on a GPU would cost more than all the products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._interface import Effort, ResidualGroup, ShiftedFactors
from .._stream.blocks import empty_rows
from .._stream.factors import SLOWEST
from . import launch
from .addresses import on_device
from .orthonormalize import Blocks, inner_products
from .residual_matmul import matrix_group, residual_matmul
from .residuals import SHAPE, Residuals, fits, random_signs, row_stride, tiles_of
from .sums import summed

# Of the mean energy of the complement. Directions there are damped as long as the shift is below their largest energy.
SHIFT = 0.8
# Below it a residual counts as zero: what scales it to norm 1, and then to operands, would not fit float32.
SMALLEST_ENERGY = 1e-66
# Without oversampling the luck of the draw evens out over many columns only: at small ranks more steps, on matrices
# that cost next to nothing, take its place (measured: ranks 10, 20 and 40 of ten times as many, seven spectra).
EXTRA_STEPS = ((32, 4), (64, 2))
# A residual that loses less than this share of its energy has so steep a spectrum that squaring it with operands of 11
# bits may lose more than 2 per cent of what it loses; with shares of 5e-4 to 5e-3 it is 1.3 per cent at most.
STEEP = 1e-3
# The sketch of a residual of few directions has more rows than those: the last ones are in the span of those before.
# What they have beside it is, squared and in the mean over random signs, the energy that the span lacks.
WITNESSES = 4
LACKING = 1e-9  # of the residual's energy


@triton.jit
def judge_kernel(
    energies,
    before,
    last,
    final,
    shapes,
    kept,
    trusted,
    gap,
    count,
    SHAPE: tl.constexpr,
    STEEP: tl.constexpr,
    SLOWEST: tl.constexpr,
    KNOWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """kept, trusted and gap of each residual, see :class:`r2m_kernels._interface.ShiftedFactors`.

    energies of all residuals; sums of squares of tiles, as shares of the energies, of the products of the last two
    steps (KNOWN: there were two) and of the one that became a factor.
    """
    residual = tl.program_id(0).to(tl.int64)
    first_tensor, tiles, start = tiles_of(shapes, residual, count, SHAPE)
    energy, place = tl.load(energies + residual), start + (residual - first_tensor * count) * tiles
    reached = energy * summed(final + place, tiles, BLOCK)
    tl.store(kept + residual, reached)
    beyond = tl.where(energy - reached >= STEEP * energy, 1, 0)  # a NaN is not
    tl.store(trusted + residual, tl.where(energy > 0.0, beyond, 1).to(tl.int8))
    left_to_gain = energy * float("nan")
    if KNOWN:
        # What further steps would add: the last three energies continued as a geometric series (Aitken).
        first, second = energy * summed(before + place, tiles, BLOCK), energy * summed(last + place, tiles, BLOCK)
        former, growth = second - first, reached - second
        growth = tl.where(growth < 0.0, 0.0, growth)
        ratio = growth / tl.where(former < 1e-300, 1e-300, former)
        ratio = tl.where(ratio > SLOWEST, SLOWEST, ratio)
        left_to_gain = growth * ratio / (1.0 - ratio)
    tl.store(gap + residual, left_to_gain)


@triton.jit(do_not_specialize=["count", "k", "length", "tiles"])
def signs_kernel(keys, out, count, k, length, tiles, BLOCK: tl.constexpr):
    """out[l, i, column, row] = the random sign of row and column with keys[l], of every expert i: (L, N, k, length)."""
    vector, tile = tl.program_id(0).to(tl.int64) // tiles, tl.program_id(0) % tiles
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    signs = random_signs(tl.load(keys + vector // (count * k)), rows, vector % k)
    tl.store(out + vector * row_stride(length) + rows, signs, mask=rows < length)


def shifted_truncation(groups: Sequence[ResidualGroup], mixing: Tensor, effort: Effort) -> list[ShiftedFactors]:
    """See :class:`r2m_kernels._interface.ShiftedTruncation`; components come in no order.

    Groups of as many steps go together: one launch serves them all.
    """
    together: dict[tuple[bool, int], list[int]] = {}
    inputs = [matrix_group(group.bases, group.experts) for group in groups]
    for place, group in enumerate(groups):
        steps = effort.iterations + next((extra for below, extra in EXTRA_STEPS if group.rank < below), 0)
        steps = 0 if effort.few_directions else steps
        together.setdefault((fits(inputs[place]), steps), []).append(place)
    made: dict[int, ShiftedFactors] = {}
    for (_, steps), places in together.items():
        some = [groups[place] for place in places]
        if effort.few_directions:
            found = _by_one_sketch(some, mixing, effort.products)
        else:
            residuals = Residuals([inputs[place] for place in places], [group.rank for group in some])
            found = _in_lock_step(some, residuals, mixing, steps, effort.products)
        made.update(zip(places, found, strict=True))
    return [made[place] for place in range(len(groups))]


def _in_lock_step(
    groups: Sequence[ResidualGroup], residuals: Residuals, mixing: Tensor, steps: int, products: bool
) -> list[ShiftedFactors]:
    energies = torch.cat([group.energies for group in groups])
    # Scaled to norm 1: operands fit float16 then, and squares of large and small residuals fit float32.
    present = energies > SMALLEST_ENERGY
    unit = mixing.to(energies) * torch.where(present, energies, torch.inf).rsqrt().unsqueeze(1)  # columns are experts
    lengths, keys = torch.where(present, energies, 0.0).sqrt(), torch.cat([group.keys for group in groups])
    numbers = energies, unit.to(residuals.dtype), lengths.to(residuals.dtype), keys
    energies, unit, lengths, keys = on_device(numbers, residuals.device)

    def orthonormal(vectors: Tensor, last: bool) -> Tensor:
        # Only the span of a basis matters to what follows it, but for the last one.
        return residuals.short.orthonormal(vectors, 2 if last else 1, None if last else residuals.operand)

    residuals.form(unit)
    basis, kept = orthonormal(residuals.sketch(keys), steps == 0), list[Tensor]()
    for step in range(steps):
        product, squares = residuals.along(basis)
        kept.append(squares)
        basis = orthonormal(residuals.across(product, basis, squares, SHIFT), step + 1 == steps)
    product, squares = residuals.along(basis, lengths)
    kept.append(squares)
    residuals.forget()
    judged = _judged(residuals, energies, kept)
    found, first = [], 0
    for group, long, short in zip(
        groups, residuals.long.of_sorts(product), residuals.short.of_sorts(basis), strict=True
    ):
        size = len(group.bases)
        sides = [rows.view(size, -1, *rows.shape[1:]) for rows in (long, short)]
        left, right = sides if _tall(group) else sides[::-1]
        trusted, gap, reached = (numbers[first : first + size] for numbers in judged)
        together = inner_products(left, right) if products else None
        found.append(ShiftedFactors(left.mT, right, False, together, trusted, gap, reached))
        first += size
    return found


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
        tall, of_signs = _tall(group), _signs(group, of_group)
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


def _signs(group: ResidualGroup, keys: Tensor) -> Tensor:
    """Random signs of a tensor's key, the same for all experts: (L, N, k, long side) float32."""
    (size, count), m = group.energies.shape, len(group.bases[0])
    length, config = max(m, group.bases[0].numel() // m), launch.sums()
    out = empty_rows((size, count, group.rank), length, torch.float32, keys.device)
    tiles = -(-length // config.block)
    grid = (size * count * group.rank * tiles,)
    launch.start(signs_kernel, grid, config, keys, out, count, group.rank, length, tiles, BLOCK=config.block)
    return out


def _judged(residuals: Residuals, energies: Tensor, kept: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Whether each truncation can be relied on, their gaps, and their energies: (tensors, N) each."""
    reached, gap = torch.empty_like(energies), torch.empty_like(energies)
    trusted, config, known = torch.empty_like(energies, dtype=torch.int8), launch.sums(), len(kept) > 2
    launch.start(
        judge_kernel,
        (energies.numel(),),
        config,
        energies,
        *(kept[-3:] if known else kept[-1:] * 3),
        *(residuals.table, reached, trusted, gap, residuals.count),
        SHAPE=SHAPE,
        STEEP=STEEP,
        SLOWEST=SLOWEST,
        KNOWN=known,
        BLOCK=config.block,
    )
    return trusted.view(torch.bool), gap, reached
