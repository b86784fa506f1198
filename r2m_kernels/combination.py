"""Step 5, what the merged tensor is made of (README §6).

Every tensor is one call of ``combine``: coefficients of the task vectors plus, where a residual was truncated,
factors and their scales. What has no factors is linear in the task vectors and enters through the coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .config import MergeConfig
from .norm_matching import NEGLIGIBLE


@dataclass(frozen=True)
class Strength:
    """How strong core and residual term enter.

    Attributes:
        core_scale: λ.
        eta: η.
        core_norm: ‖λ τ_core‖ over matrix tensors.
        residual_norm: ‖Σ w_i s_i F_i‖ over matrix tensors, 0 where it is rounding.
    """

    core_scale: float
    eta: float
    core_norm: float
    residual_norm: float


def strength(
    config: MergeConfig,
    core_norm: float,
    restored: float,
    inner_products: Tensor,
    scales: Tensor,
    weights: Tensor,
    longest: float,
) -> Strength:
    """λ and η of ``config``.

    Args:
        core_norm: ‖τ_core‖ over matrix tensors.
        restored: λ of ``core_mode="restored"``, before ``core_scale``.
        inner_products: (N, N) Σ_l ⟨F_il, F_jl⟩ over matrix tensors.
        scales: (N,) s.
        weights: (N,) w.
        longest: max_j ‖τ_j‖ over matrix tensors, the yardstick of rounding.
    """
    count = len(scales)
    core_scale = config.core_scale * {"mean": 1, "sum": count, "restored": restored}[config.core_mode]
    scaled_core = abs(core_scale) * core_norm
    weighted = weights * scales
    residual = float((weighted @ inner_products @ weighted).clamp_min(0).sqrt())
    if residual <= NEGLIGIBLE * longest * float(weighted.sum()):
        residual = 0.0
    eta = config.eta
    if config.eta_mode == "sum":
        eta *= count
    elif config.eta_mode == "core_norm":
        eta *= scaled_core
    elif config.eta_mode == "relative":
        eta = eta * scaled_core / residual if residual > 0 else 0.0
    return Strength(core_scale, eta, scaled_core, residual)


def matrix_coefficients(core: Tensor, core_scale: float) -> Tensor:
    """(N,) coefficients of the task vectors beside the truncated residuals: λ c."""
    return core_scale * core


def full_rank_coefficients(
    core: Tensor, mixing: Tensor, scales: Tensor, weights: Tensor, core_scale: float, eta: float
) -> Tensor:
    """(N,) where nothing is truncated: λ c + η M (w s)."""
    return core_scale * core + eta * (mixing @ (weights * scales))


def vector_coefficients(scales: Tensor, weights: Tensor, core_scale: float, eta: float) -> Tensor:
    """(N,) of λ · mean + η Σ_i w_i s_i (τ_i − mean), the mean being Σ w_j τ_j."""
    return core_scale * weights + eta * weights * (scales - weights @ scales)
