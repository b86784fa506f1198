"""Step 4, one norm per specialist, factors that make them equal, and their strength in the merge (README §5, §6)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from . import gram
from .config import MergeConfig
from .findings import Findings, Residuals, Strength
from .real_subspace import GRAM_ERROR
from .update_scale import gain

# A residual shorter than this fraction of the longest task vector is rounding: the Gram, and with it core and mixing,
# is known to GRAM_ERROR only; four times that leaves room for forming the residual itself.
NEGLIGIBLE = 4 * GRAM_ERROR
# Residuals that cancel leave little but what truncation happened to cut: a relative η counts their sum as this part of
# their mean length at least, and so lengthens no residual beyond 16 times eta · ‖core‖.
LEAST_SHARE = 16.0


def any_residual(mixing: Tensor) -> bool:
    """Whether the mixing leaves residuals beyond rounding: with a single expert, say, it does not."""
    return float(mixing.abs().max()) > NEGLIGIBLE


def match(
    findings: Findings,
    products: Mapping[str, Tensor],
    config: MergeConfig,
    *,
    scales: Tensor | None = None,
    core_scale: float | None = None,
    eta: float | None = None,
) -> Residuals:
    """Norms n, scales s, λ and η for these options.

    Args:
        findings: of steps 1–3.
        products: tensor name → (N, N) float64, ⟨F_il, F_jl⟩ of matrix tensors; where rows are weighted (N,), ‖F_il‖².
        config: of the merge.
        scales: (N,) instead of those that match the norms.
        core_scale, eta: instead of the config's.
    """
    weights, count = findings.real.weights, len(findings.experts)
    energies = {name: each if each.ndim == 1 else each.diag() for name, each in products.items()}
    names = sorted(products)
    matrix = gram.ordered_sum([energies[name] for name in names], count)
    center = torch.eye(count, dtype=torch.float64) - weights
    vector = center @ findings.vector_gram @ center.T
    longest = _longest(findings.matrix_gram + findings.vector_gram)
    norms = residual_norms(matrix + vector.diag(), longest)
    scales = matching_scales(norms, weights, config.norm_match) if scales is None else scales
    core_scale, eta = config.core_scale if core_scale is None else core_scale, config.eta if eta is None else eta
    known = config.row_power == 0 or config.eta == 0
    summed = gram.ordered_sum([products[name] for name in names], count, count) if known else None
    found = strength(findings, matrix, summed, scales.detach(), config, core_scale, eta)
    return Residuals(norms, scales, energies, found)


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


def strength(
    findings: Findings,
    energies: Tensor,
    products: Tensor | None,
    scales: Tensor,
    config: MergeConfig,
    core_scale: float,
    eta: float,
) -> Strength:
    """λ and η as ``config`` makes them of ``core_scale`` and ``eta``, its own or others.

    Args:
        findings: of steps 1–3.
        energies: (N,) Σ_l ‖F_il‖² over matrix tensors.
        products: (N, N) Σ_l ⟨F_il, F_jl⟩ over them; ``None`` where rows are weighted.
        scales: (N,) s.
        config: of the merge.
    """
    count, weights, core = len(scales), findings.real.weights, findings.real.core
    factor = {"mean": 1.0, "sum": count, "restored": gain(findings.matrix_gram, weights)}[config.core_mode]
    core_scale = core_scale * factor  # not in place: it may be a tensor that somebody learns
    core_norm = abs(core_scale) * float((core @ findings.matrix_gram @ core).clamp_min(0).sqrt())
    weighted = weights * scales
    residual = None if products is None else float((weighted @ products @ weighted).clamp_min(0).sqrt())
    if residual is not None and residual <= NEGLIGIBLE * _longest(findings.matrix_gram) * float(weighted.sum()):
        residual = 0.0
    floor, cancelled = float(weighted @ energies.clamp_min(0).sqrt()) / LEAST_SHARE, False
    if config.eta_mode == "sum":
        eta = eta * count
    elif config.eta_mode == "core_norm":
        eta = eta * core_norm
    elif config.eta_mode == "relative":
        assert residual is not None, "a relative η weighs no rows"
        eta, cancelled = eta * core_norm / max(residual, floor) if residual > 0 else 0.0, 0 < residual < floor
    return Strength(core_scale, eta, core_norm, residual, cancelled)


def with_norm(residuals: Residuals, norm: float | None, findings: Findings) -> Residuals:
    """The same with the norm of the residual term, η included, as it was measured where rows are weighted."""
    strength = residuals.strength
    if norm is None or not math.isfinite(norm) or strength.residual_norm is not None or strength.eta == 0:
        return residuals
    norm /= strength.eta
    beyond = norm > NEGLIGIBLE * _longest(findings.matrix_gram)
    return replace(residuals, strength=replace(strength, residual_norm=norm if beyond else 0.0))


def _longest(squares: Tensor) -> float:
    """max_j ‖τ_j‖ from a Gram matrix."""
    return float(squares.diag().max().clamp_min(0).sqrt())
