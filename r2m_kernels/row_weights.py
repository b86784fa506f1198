"""Residuals weighted row by row, where they are added: who changed a neuron most has most to say there (README §6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from r2m_kernels import _parallel
from r2m_kernels._torch.blocks import as_matrix, compute_dtype, panel_limit, row_panels, task_vectors


@dataclass(frozen=True)
class RowRule:
    """θ₀ + λ τ_core + η Σ_i W_i ∘ X_i with row r's weights W_ri ∝ w_i ‖row r of s_i X_i‖^p, Σ_i W_ri = 1.

    The matching scales s enter the weights alone: there they keep one generator from dominating, and residuals stay as
    long as they are.

    Attributes:
        core: (N,) λ c.
        mixing: (N, N) M, X_i = Σ_j M_ji τ_j.
        weights: (N,) w, summing to 1.
        scales: (N,) s.
        eta: η.
        power: p.
    """

    core: Tensor
    mixing: Tensor
    weights: Tensor
    scales: Tensor
    eta: float
    power: float


def combine(base: Tensor, experts: Sequence[Tensor], rule: RowRule, out: Tensor) -> None:
    """The merged tensor into a contiguous ``out``, in one read of each input; rounded once.

    Args:
        base, experts: θ₀ and N θ_j of one shape (m, …); rows are slices of the first dimension.
        rule: what to add.
        out: where to write.
    """
    dtype = compute_dtype([base, *experts])
    theta, thetas, merged = as_matrix(base), [as_matrix(expert) for expert in experts], as_matrix(out)
    core, mixing = (part.to(base.device, dtype) for part in (rule.core, rule.mixing))
    weights, scales = (part.to(base.device) for part in (rule.weights, rule.scales))

    def merge_panel(panel: list[slice]) -> None:
        for rows in panel:
            tau = task_vectors(theta, thetas, rows, dtype)
            flat = tau.flatten(1)
            residuals = (mixing.T @ flat).view_as(tau)
            # Float64 sums: the longest row counts a power of its length.
            lengths = torch.linalg.vector_norm(residuals, dim=2, dtype=torch.float64) * scales.unsqueeze(1)
            longest = lengths.amax(dim=0, keepdim=True)
            # Relative to the longest, so that no power leaves float64's range; where nobody changed a row, all count.
            shares = torch.where(longest > 0, lengths / longest.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
            shares = (shares.pow(rule.power) * weights.unsqueeze(1)).to(dtype)
            shares = rule.eta * shares / shares.sum(dim=0)
            total = (core @ flat).view_as(tau[0])
            for share, residual in zip(shares, residuals, strict=True):
                total.addcmul_(share.unsqueeze(1), residual)
            merged[rows] = total.add_(theta[rows].to(dtype))

    for _ in _parallel.for_each(merge_panel, row_panels(*theta.shape), panel_limit(base.device)):
        pass
