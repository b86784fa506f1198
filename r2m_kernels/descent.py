"""Gradient descent on what specialists do to each other's inputs, stopped early, and no eigenproblem (README §8)."""

from __future__ import annotations

import torch
from torch import Tensor


def descended(changes: Tensor, start: Tensor, weights: Tensor, steps: int) -> Tensor:
    """Where descent from X₀ = Σ_j start_j τ_j is after some steps (SWUDI by early stopping, arXiv 2606.07289).

    The loss is WUDI's, Σ_i w_i ‖(X − τ_i) τ_iᵀ‖² / ‖τ_i‖² (arXiv 2503.08099): rows of τ_i stand for the inputs of
    specialist i. With A_i = √w_i τ_i / ‖τ_i‖ one above another in A, H = AᵀA and C = [(τ_i − X₀) A_iᵀ]_i, T steps of
    length 1/L lead to X₀ + C A S(I − H/L) / L = X₀ + C S(I − AAᵀ/L) A / L, where S(P) = Σ_{t<T} P^t: the smaller of H
    and AAᵀ is taken, and S by doubling. L = ‖H²‖_F^½ bounds the largest eigenvalue of both.

    Args:
        changes: (L, N, m, n) float64, the τ_i; overwritten.
        start, weights: (N,).
        steps: T, 1 at least.

    Returns:
        (L, m, n) float64.
    """
    size, count, m, n = changes.shape
    first = (start.to(changes) @ changes.flatten(2)).view(size, m, n)
    apart = changes - first.unsqueeze(1)
    lengths = torch.linalg.vector_norm(changes, dim=(2, 3), keepdim=True)
    shares = weights.to(changes).sqrt().view(-1, 1, 1) / torch.where(lengths > 0, lengths, torch.inf)
    rows = changes.mul_(shares)
    back: Tensor | None = None
    if n <= m:
        grams = rows.mT @ rows
        gram, gradient = grams.sum(dim=1), (apart @ grams).sum(dim=1)
    else:
        gradient = (apart @ rows.mT).transpose(1, 2).flatten(2)  # C, (L, m, N·m)
        rows = rows.flatten(1, 2)  # A, (L, N·m, n)
        if n <= count * m:
            gram, gradient = rows.mT @ rows, gradient @ rows
        else:
            gram, back = rows @ rows.mT, rows
    bound = torch.linalg.vector_norm(gram @ gram, dim=(1, 2), keepdim=True).sqrt()
    bound = torch.where(bound > 0, bound, 1.0)
    decay = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device) - gram / bound
    moved = _sum_of_powers(gradient / bound, decay, steps)
    return first + (moved if back is None else moved @ back)


def workspace_elements(count: int, m: int, n: int) -> int:
    """Of float64, what :func:`descended` has at most of a matrix, the task vectors among it."""
    matrix, side = m * n, min(n, count * m)
    # The gradient, and what it is multiplied with; while powers are summed both are there several times.
    gradient, square = m * side, side**2
    summed = (2 * count + 1) * matrix + max(3 * gradient + 5 * square, 4 * gradient + 4 * square)
    if n <= m:
        return max((3 * count + 2) * matrix + (count + 1) * square, summed + count * square)
    return max((2 * count + 3) * matrix + 2 * (gradient + square), summed)


def _sum_of_powers(first: Tensor, matrix: Tensor, steps: int) -> Tensor:
    """What the loop ``x = first + x @ matrix`` makes of zero in some steps; (L, m, d) and (L, d, d)."""
    total, power, digits = first, matrix, bin(steps)[3:]  # of one step; what follows the leading binary digit
    for place, digit in enumerate(digits):
        total = torch.baddbmm(total, total, power)  # twice as many
        if digit == "1":
            total = torch.baddbmm(first, total, matrix)  # and one more
        if place + 1 < len(digits):
            power = power @ power @ matrix if digit == "1" else power @ power
    return total
