"""Residuals weighted row by row: who changed a neuron most has most to say there (README §6)."""

from __future__ import annotations

import torch
from torch import Tensor


def shared_weight(weights: Tensor, scales: Tensor) -> float:
    """What is shared out row by row: all but the weights of experts whose residual is rounding (s_i = 0).

    Those keep their weight in every row. If it went to the others, one that weighs next to nothing might get it whole.

    Args:
        weights, scales: (N,) w and s.
    """
    return 1.0 - float(weights[scales == 0].sum())


def row_shares(lengths: Tensor, weights: Tensor, scales: Tensor, power: float) -> Tensor:
    """W_ri ∝ w_i (s_i ‖row r of X_i‖)^p with Σ_i W_ri = 1; where nobody changed a row, w.

    Args:
        lengths: (…, N, m) float64, ‖row r of X_i‖.
        weights: (N,) w, summing to 1.
        scales: (N,) s, the matching scales.
        power: p.

    Returns:
        (…, N, m) float64; a row's shares depend on its own lengths alone.
    """
    weights, scales = (tensor.to(lengths, non_blocking=True).unsqueeze(1) for tensor in (weights, scales))
    lengths = lengths * scales
    longest = lengths.amax(dim=-2, keepdim=True)
    # Relative to the longest, so that no power leaves float64's range; where nobody changed a row, all count.
    relative = torch.where(longest > 0, lengths / longest.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
    shares = relative.pow(power) * weights
    return shares / shares.sum(dim=-2, keepdim=True)
