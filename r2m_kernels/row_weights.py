"""Residuals weighted row by row, where they are added: who changed a neuron most has most to say there (README §6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._stream import parallel
from ._torch.blocks import as_matrix, compute_dtype, panel_limit, row_panels, task_vectors
from .truncation import Factors

GPU_ELEMENTS = 2**23  # of a block on a GPU: a ViT-L's largest matrix in one


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

    def shares(self, lengths: Tensor) -> Tensor:
        """W from the lengths of the residuals' rows: (N, m) float64 both."""
        lengths = lengths * self.scales.to(lengths.device).unsqueeze(1)
        longest = lengths.amax(dim=0, keepdim=True)
        # Relative to the longest, so that no power leaves float64's range; where nobody changed a row, all count.
        relative = torch.where(longest > 0, lengths / longest.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
        shares = relative.pow(self.power) * self.weights.to(lengths.device).unsqueeze(1)
        return shares / shares.sum(dim=0)


def weighted_factors(factors: Factors, rule: RowRule) -> Tensor:
    """Truncated residuals' left factors with their rows weighted: (N, m, r), in the factors' dtype."""
    left, right = factors.left.double(), factors.right.double()
    squares = ((left @ (right @ right.mT)) * left).sum(dim=2)
    shares = rule.shares(squares.clamp_min(0).sqrt())
    return factors.left * shares.to(factors.left.dtype).unsqueeze(2)


def combine(base: Tensor, experts: Sequence[Tensor], rule: RowRule, out: Tensor) -> None:
    """The merged tensor with whole residuals into a contiguous ``out``, in one read of each input; rounded once.

    Args:
        base, experts: θ₀ and N θ_j of one shape (m, …); rows are slices of the first dimension.
        rule: what to add.
        out: where to write.
    """
    dtype = compute_dtype([base, *experts])
    theta, thetas, merged = as_matrix(base), [as_matrix(expert) for expert in experts], as_matrix(out)
    core, mixing = rule.core.to(base.device), rule.mixing.to(base.device)

    def merge_panel(panel: list[slice]) -> None:
        for rows in panel:
            tau = task_vectors(theta, thetas, rows, dtype)
            residuals = (mixing.T.to(dtype) @ tau.flatten(1)).view_as(tau)
            # Sums in float64: shares are powers of these lengths.
            shares = rule.shares(torch.linalg.vector_norm(residuals, dim=2, dtype=torch.float64))
            coefficients = (core.unsqueeze(1) + rule.eta * (mixing @ shares)).to(dtype)
            total = theta[rows].to(dtype, copy=True)
            for coefficient, change in zip(coefficients, tau, strict=True):
                total.addcmul_(coefficient.unsqueeze(1), change)
            merged[rows] = total

    for _ in parallel.for_each(merge_panel, _panels(theta), panel_limit(base.device)):
        pass


def _panels(theta: Tensor) -> list[list[slice]]:
    """Blocks of rows: a CPU's cache holds one, a GPU's launches are worth one."""
    if theta.device.type == "cpu":
        return row_panels(*theta.shape)
    height = max(1, GPU_ELEMENTS // theta.shape[1])
    return [[slice(start, start + height)] for start in range(0, theta.shape[0], height)]
