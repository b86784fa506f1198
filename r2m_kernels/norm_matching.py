"""Step 4, one norm per specialist and the factors that make them equal (README §5)."""

from __future__ import annotations

import torch
from torch import Tensor

from .real_subspace import GRAM_ERROR

# A residual shorter than this fraction of the longest task vector is rounding: the Gram, and with it core and mixing,
# is known to GRAM_ERROR only; four times that leaves room for forming the residual itself.
NEGLIGIBLE = 4 * GRAM_ERROR


def any_residual(mixing: Tensor) -> bool:
    """Whether the mixing leaves residuals beyond rounding: with a single expert, say, it does not."""
    return float(mixing.abs().max()) > NEGLIGIBLE


def residual_norms(squares: Tensor, longest: float) -> Tensor:
    """n_i: (N,) float64, 0 where a residual is indistinguishable from rounding.

    Args:
        squares: (N,) Σ_l ‖F_il‖² over matrix and vector tensors.
        longest: max_j ‖τ_j‖ over the same tensors.
    """
    norms = squares.clamp_min(0).sqrt()
    return torch.where(norms > NEGLIGIBLE * longest, norms, 0.0)


def matching_scales(norms: Tensor, weights: Tensor, match: bool) -> Tensor:
    """s_i = Σ_j w_j n_j / n_i, 0 where n_i = 0; all 1 without matching (0 where n_i = 0)."""
    present = norms > 0
    if not match:
        return present.double()
    return torch.where(present, (weights @ norms) / torch.where(present, norms, 1.0), 0.0)
