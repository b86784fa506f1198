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

from .._interface import Effort, ShiftedFactors
from .._stream.factors import SLOWEST
from . import launch
from .addresses import on_device
from .orthonormalize import inner_products, orthonormal_rows
from .residual_matmul import SCALE, Shift, matrix_group, multiply, sketch
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


@triton.jit(do_not_specialize=["tiles", "final_tiles"])
def judge_kernel(
    energies,
    before,
    last,
    final,
    kept,
    trusted,
    gap,
    tiles,
    final_tiles,
    STEEP: tl.constexpr,
    SLOWEST: tl.constexpr,
    KNOWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """kept, trusted and gap of each residual, see :class:`r2m_kernels._interface.ShiftedFactors`.

    energies (L, N) of the residuals; before, last and final: sums of squares of tiles, (L, N, tiles), as shares of
    them, of the products of the last two steps (KNOWN: there were two) and of the one that became a factor.
    """
    residual = tl.program_id(0).to(tl.int64)
    energy = tl.load(energies + residual)
    reached = energy * summed(final + residual * final_tiles, final_tiles, BLOCK)
    tl.store(kept + residual, reached)
    beyond = tl.where(energy - reached >= STEEP * energy, 1, 0)  # a NaN is not
    tl.store(trusted + residual, tl.where(energy > 0.0, beyond, 1).to(tl.int8))
    left_to_gain = energy * float("nan")
    if KNOWN:
        # What further steps would add: the last three energies continued as a geometric series (Aitken).
        first = energy * summed(before + residual * tiles, tiles, BLOCK)
        second = energy * summed(last + residual * tiles, tiles, BLOCK)
        former, growth = second - first, reached - second
        growth = tl.where(growth < 0.0, 0.0, growth)
        ratio = growth / tl.where(former < 1e-300, 1e-300, former)
        ratio = tl.where(ratio > SLOWEST, SLOWEST, ratio)
        left_to_gain = growth * ratio / (1.0 - ratio)
    tl.store(gap + residual, left_to_gain)


def shifted_truncation(
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    mixing: Tensor,
    keys: Tensor,
    energies: Tensor,
    rank: int,
    effort: Effort,
) -> ShiftedFactors:
    """See :class:`r2m_kernels._interface.ShiftedTruncation`; components come in no order."""
    group = matrix_group(bases, experts)
    m = bases[0].shape[0]
    n = bases[0].numel() // m
    tall, half = m >= n, group.compute_dtype == torch.float32
    outside = min(m, n) - rank
    # Scaled to norm 1: operands fit float16 then, and squares of large and small residuals fit float32.
    present = energies > SMALLEST_ENERGY
    unit = mixing.to(energies) * torch.where(present, energies, torch.inf).rsqrt().unsqueeze(1)  # columns are experts
    lengths = torch.where(present, energies, 0.0).sqrt()
    numbers = [unit.to(group.compute_dtype), lengths.to(group.compute_dtype), energies, keys]
    unit, lengths, energies, keys = on_device(numbers, group.device)
    steps = effort.iterations + next((extra for below, extra in EXTRA_STEPS if rank < below), 0)
    # Only the span of a basis matters to what follows it, but for the last one.
    basis = _orthonormal(sketch(group, unit, keys, rank, transpose=tall), steps == 0, half)
    kept: list[Tensor] = []
    for step in range(steps):
        product, squares = multiply(group, unit, basis, not tall, "fp16", half=half)
        kept.append(squares)
        basis, _ = multiply(group, unit, product, tall, "fp16", Shift(squares, SHIFT / outside, basis))
        basis = _orthonormal(basis, step + 1 == steps, half)
    product, squares = multiply(group, unit, basis, not tall, "fp16", lengths=lengths)
    left, right = (product, basis) if tall else (basis, product)
    products = inner_products(left, right) if effort.products else None
    reached, trusted, gap = _judged(energies, kept, squares)
    return ShiftedFactors(left.transpose(-1, -2), right, False, products, trusted, gap, reached)


def _judged(energies: Tensor, kept: list[Tensor], final: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Energies of truncations, whether they can be relied on, and their gaps: (L, N) each."""
    before, last = kept[-2:] if len(kept) > 1 else (energies, energies)
    reached, gap = torch.empty_like(energies), torch.empty_like(energies)
    trusted, config = torch.empty_like(energies, dtype=torch.int8), launch.sums()
    launch.start(
        judge_kernel,
        (energies.numel(),),
        config,
        energies,
        before,
        last,
        final,
        reached,
        trusted,
        gap,
        last.shape[-1],
        final.shape[-1],
        STEEP=STEEP,
        SLOWEST=SLOWEST,
        KNOWN=len(kept) > 1,
        BLOCK=config.block,
    )
    return reached, trusted.view(torch.bool), gap


def _orthonormal(rows: Tensor, last: bool, half: bool) -> Tensor:
    """Each (k, length) block of (L, N, k, length): the last ones well, others as operands of the next product."""
    size, count = rows.shape[:2]
    passes, scale = (2, None) if last else (1, SCALE if half else None)
    basis = orthonormal_rows(rows.flatten(0, 1), passes, scale)
    return basis.view(size, count, *basis.shape[1:])
