"""Residuals weighted row by row: who changed a neuron most has most to say there (README §6)."""

from __future__ import annotations

import torch
from torch import Tensor


def row_shares(lengths: Tensor, weights: Tensor, scales: Tensor, power: float) -> Tensor:
    """W_ri ∝ w_i (s_i ‖row r of X_i‖)^p with Σ_i W_ri = 1; where nobody changed a row, w.

    Args:
        lengths: (N, m) float64, ‖row r of X_i‖.
        weights: (N,) w, summing to 1.
        scales: (N,) s, the matching scales.
        power: p.

    Returns:
        (N, m) float64.
    """
    lengths = lengths * scales.to(lengths.device).unsqueeze(1)
    longest = lengths.amax(dim=0, keepdim=True)
    # Relative to the longest, so that no power leaves float64's range; where nobody changed a row, all count.
    relative = torch.where(longest > 0, lengths / longest.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
    shares = relative.pow(power) * weights.to(lengths.device).unsqueeze(1)
    return shares / shares.sum(dim=0)


def weighted_factors(left: Tensor, right: Tensor, weights: Tensor, scales: Tensor, power: float) -> Tensor:
    """Truncated residuals' left factors with their rows weighted by :func:`row_shares`.

    Args:
        left, right: (N, m, r) and (N, r, n), F_i = left_i right_i.
        weights, scales, power: of :func:`row_shares`.

    Returns:
        (N, m, r), in the factors' dtype.
    """
    wide, other = left.double(), right.double()
    squares = ((wide @ (other @ other.mT)) * wide).sum(dim=2)
    shares = row_shares(squares.clamp_min(0).sqrt(), weights, scales, power)
    return left * shares.to(left.dtype).unsqueeze(2)
