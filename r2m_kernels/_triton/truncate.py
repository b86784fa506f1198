"""Step 3 for a group of tensors: subspace iteration with a shift, and no small problem at all (README §4).

On A = X or Xᵀ, tall, with V holding k = r orthonormal rows on the short side: V ← orth(SᵀA) with random signs S, then
V ← orth(V (AᵀA − a)) a few times, and A ≈ (A Vᵀ) V has rank r already. The shift a, below the mean energy of what V
leaves out, is what makes two steps without oversampling enough: it needs no knowledge of the spectrum, and no eigen-
or singular value problem, which on a GPU would cost more than all the products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._interface import Effort, ShiftedFactors
from . import launch
from .orthonormalize import inner_products, orthonormal_rows
from .residual_matmul import matrix_group, multiply, sketch

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
# Of the last growth of the kept energy to the one before: a larger ratio says nothing about the limit.
SLOWEST = 0.95


def truncation_width(rank: int, oversampling: int) -> int:
    """Rows of a block: there is no oversampling."""
    return rank


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
    unit = (mixing.to(scales) * scales.unsqueeze(1)).to(group.device)  # (L, N, N), columns are experts
    basis = _orthonormal(sketch(group, unit, keys, rank, transpose=tall))
    kept: list[Tensor] = []
    for _ in range(effort.iterations + next((extra for below, extra in EXTRA_STEPS if rank < below), 0)):
        product, energy = multiply(group, unit, basis, not tall, fast)
        kept.append(energy)
        shift = (SHIFT / max(1, outside) * (1.0 - energy)).clamp_min(0).to(basis.dtype)
        basis, _ = multiply(group, unit, product, tall, fast, shift, basis)
        basis = _orthonormal(basis)
    product, _ = multiply(group, mixing, basis, not tall, full)
    left, right = (product, basis) if tall else (basis, product)
    products = inner_products(left, right)
    energies = energies.to(products.device, non_blocking=True)
    final = products.diagonal(dim1=1, dim2=2)
    trusted = ~((energies > 0) & ~(energies - final >= STEEP * energies))  # NaN is not
    gap = _left_to_gain([*(energies * one for one in kept[-2:]), final])
    return ShiftedFactors(left.transpose(-1, -2), right, products, trusted, gap)


def _left_to_gain(kept: list[Tensor]) -> Tensor:
    """What further steps would add to the kept energy: the last three continued as a geometric series (Aitken)."""
    if len(kept) < 3:
        return torch.full_like(kept[-1], torch.nan)
    before, last = kept[1] - kept[0], (kept[2] - kept[1]).clamp_min(0)
    ratio = (last / before.clamp_min(torch.finfo(before.dtype).tiny)).clamp(0, SLOWEST)
    return last * ratio / (1 - ratio)


def _orthonormal(rows: Tensor) -> Tensor:
    """Each (k, length) block of (L, N, k, length)."""
    size, count = rows.shape[:2]
    basis = orthonormal_rows(rows.flatten(0, 1))
    return basis.view(size, count, *basis.shape[1:])
