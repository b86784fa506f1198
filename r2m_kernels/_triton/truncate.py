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

from r2m_kernels._triton import launch
from r2m_kernels._triton.orthonormalize import inner_products, orthonormal_rows
from r2m_kernels._triton.residual_matmul import matrix_group, multiply, sketch

# Of the mean energy of the complement. Directions there are damped as long as the shift is below their largest energy.
SHIFT = 0.8
# Below it a residual counts as zero: what scales it to norm 1 would not fit float32.
SMALLEST_ENERGY = 1e-70
# Without oversampling the luck of the draw evens out over many columns only: at small ranks more steps, on matrices
# that cost next to nothing, take its place (measured: ranks 10, 20 and 40 of ten times as many, seven spectra).
EXTRA_STEPS = ((32, 4), (64, 2))


def shifted_truncation(
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    mixing: Tensor,
    keys: Tensor,
    energies: Tensor,
    rank: int,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Near-optimal rank-r approximations of the residuals of L tensors of one shape.

    Args:
        keys: (L,) int64, what the random signs of each tensor are made from.
        energies: (L, N) float64, ‖X_li‖².

    Returns:
        Left (L, N, m, r), Right (L, N, r, n): orthonormal on the short side (Right where m ≥ n), components in no
        order; and (L, N, N) float64 on the CPU, the inner products ⟨F_li, F_lj⟩.
    """
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
    for _ in range(iterations + next((extra for below, extra in EXTRA_STEPS if rank < below), 0)):
        product, kept = multiply(group, unit, basis, not tall, fast)
        shift = (SHIFT / max(1, outside) * (1.0 - kept)).clamp_min(0).to(basis.dtype)
        basis, _ = multiply(group, unit, product, tall, fast, shift, basis)
        basis = _orthonormal(basis)
    product, _ = multiply(group, mixing, basis, not tall, full)
    left, right = (product, basis) if tall else (basis, product)
    return left.transpose(-1, -2), right, inner_products(left, right).cpu()


def _orthonormal(rows: Tensor) -> Tensor:
    """Each (k, length) block of (L, N, k, length)."""
    size, count = rows.shape[:2]
    found = orthonormal_rows(rows.flatten(0, 1))
    return found.view(size, count, *found.shape[1:])
