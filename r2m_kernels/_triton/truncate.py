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
from .orthonormalize import orthonormal_rows, parts_of_products
from .residual_matmul import Shift, matrix_group, multiply, sketch
from .sums import summed

# Of the mean energy of the complement. Directions there are damped as long as the shift is below their largest energy.
SHIFT = 0.8
# Below it a residual counts as zero: what scales it to norm 1 would not fit float32.
SMALLEST_ENERGY = 1e-70
# Without oversampling the luck of the draw evens out over many columns only: at small ranks more steps, on matrices
# that cost next to nothing, take its place (measured: ranks 10, 20 and 40 of ten times as many, seven spectra).
EXTRA_STEPS = ((32, 4), (64, 2))
# A residual that loses less than this share of its energy has so steep a spectrum that squaring it in float32, and
# operands that matrix units cut off after 10 bits, may lose more: 8 to 2 per cent at shares of 1.2e-3 to 2.4e-3.
STEEP = 4e-3


@triton.jit(do_not_specialize=["count", "parts", "tiles"])
def judge_kernel(
    partial,
    products,
    energies,
    before,
    last,
    trusted,
    gap,
    count,
    parts,
    tiles,
    STEEP: tl.constexpr,
    SLOWEST: tl.constexpr,
    KNOWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """products[l, i], trusted[l, i] and gap[l, i] of each residual, as :class:`r2m_kernels._interface.ShiftedFactors`.

    partial (L, N, N, parts) adds up to the inner products of factors; energies (L, N) are the residuals'. before and
    last: sums of squares of tiles, (L, N, tiles), as shares of the energies, of the products of the last two steps
    (KNOWN: there were two).
    """
    residual = tl.program_id(0).to(tl.int64)
    energy, expert = tl.load(energies + residual), residual % count
    kept = energy * 0.0
    for other in range(count):
        product = residual * count + other
        sums = summed(partial + product * parts, parts, BLOCK)
        tl.store(products + product, sums)
        kept = tl.where(other == expert, sums, kept)
    beyond = tl.where(energy - kept >= STEEP * energy, 1, 0)  # a NaN is not
    tl.store(trusted + residual, tl.where(energy > 0.0, beyond, 1).to(tl.int8))
    left_to_gain = energy * float("nan")
    if KNOWN:
        # What further steps would add: the last three energies continued as a geometric series (Aitken).
        first = energy * summed(before + residual * tiles, tiles, BLOCK)
        second = energy * summed(last + residual * tiles, tiles, BLOCK)
        former, growth = second - first, kept - second
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
    tall = m >= n
    target = launch.target_of(group.device)
    fast, full = launch.fast_precision(target, group.dtype), launch.full_precision(target)
    outside = min(m, n) - rank
    # Scaled to norm 1 while iterating: a step squares the residual, and squares of large and small ones do not fit.
    scales = torch.where(energies > SMALLEST_ENERGY, energies, torch.inf).rsqrt()
    unit = mixing.to(scales) * scales.unsqueeze(1)  # (L, N, N), columns are experts
    numbers = [mixing.to(unit).expand_as(unit), unit, energies, keys]
    mixing, unit, energies, keys = on_device(numbers, group.device)
    mixing, unit = mixing.to(group.compute_dtype), unit.to(group.compute_dtype)
    steps = effort.iterations + next((extra for below, extra in EXTRA_STEPS if rank < below), 0)
    # Only the span of a basis matters to what follows it, but for the last one.
    basis = _orthonormal(sketch(group, unit, keys, rank, transpose=tall), passes=1 if steps else 2)
    kept: list[Tensor] = []
    for step in range(steps):
        product, squares = multiply(group, unit, basis, not tall, fast)
        kept.append(squares)
        basis, _ = multiply(group, unit, product, tall, fast, Shift(squares, SHIFT / outside, basis))
        basis = _orthonormal(basis, passes=1 if step + 1 < steps else 2)
    product, _ = multiply(group, mixing, basis, not tall, full)
    left, right = (product, basis) if tall else (basis, product)
    judged = _judged(parts_of_products(left, right), energies, kept)
    return ShiftedFactors(left.transpose(-1, -2), right, False, *judged)


def _judged(partial: Tensor, energies: Tensor, kept: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Inner products (L, N, N) of their parts, whether truncations can be relied on, and their gaps: (L, N) both."""
    before, last = kept[-2:] if len(kept) > 1 else (energies, energies)
    products = torch.empty(partial.shape[:-1], dtype=torch.float64, device=partial.device)
    trusted, gap, config = torch.empty_like(energies, dtype=torch.int8), torch.empty_like(energies), launch.sums()
    launch.start(
        judge_kernel,
        (energies.numel(),),
        config,
        partial,
        products,
        energies,
        before,
        last,
        trusted,
        gap,
        energies.shape[1],
        partial.shape[-1],
        last.shape[-1],
        STEEP=STEEP,
        SLOWEST=SLOWEST,
        KNOWN=len(kept) > 1,
        BLOCK=config.block,
    )
    return products, trusted.view(torch.bool), gap


def _orthonormal(rows: Tensor, passes: int) -> Tensor:
    """Each (k, length) block of (L, N, k, length)."""
    size, count = rows.shape[:2]
    basis = orthonormal_rows(rows.flatten(0, 1), passes)
    return basis.view(size, count, *basis.shape[1:])
