"""What becomes of singular values beyond truncation: other methods in R²M's form (README §8). Float64, plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ._stream.factors import Factors
from .config import MergeConfig

# Directions of a Gram matrix below this share of its largest eigenvalue are rounding: they have no polar factor.
NOTHING = 1e-13


def map_spectra(factors: Sequence[Factors], config: MergeConfig, dtype: torch.dtype) -> list[Factors]:
    """The configured map on truncated residuals, tensor by tensor, in ``dtype``; as they are for ``"truncate"``."""
    if config.spectrum == "rescale":
        return [_in(dtype, rescaled(of_tensor, float(config.rank))) for of_tensor in factors]
    if config.spectrum == "orthogonal":
        return [_in(dtype, orthogonalized(of_tensor)) for of_tensor in factors]
    return list(factors)


def _in(dtype: torch.dtype, factors: Factors) -> Factors:
    return replace(factors, left=factors.left.to(dtype), right=factors.right.to(dtype))


def rescaled(factors: Factors, share: float) -> Factors:
    """The fewest leading components with ``share`` of the nuclear norm, scaled up to all of it (STAR).

    Args:
        factors: at full rank, by descending singular value.
        share: of the sum of singular values.

    Returns:
        Factors as wide as the widest expert needs; the others' are padded with zeros.
    """
    # Components are orthogonal on both sides: their lengths' products are the singular values.
    nuclear = factors.left.double().norm(dim=1) * factors.right.double().norm(dim=2)
    totals = nuclear.sum(dim=1, keepdim=True)
    # The first component whose running sum reaches the share is the last one kept. A hair below, for share = 1.
    before = nuclear.cumsum(dim=1) - nuclear
    keep = before < share * (1 - 1e-12) * totals
    keep[:, 0] = True
    kept = (nuclear * keep).sum(dim=1, keepdim=True)
    gain = torch.where(kept > 0, totals / torch.where(kept > 0, kept, 1.0), 1.0) * keep
    width = int(keep.sum(dim=1).max())
    left = factors.left[:, :, :width] * gain[:, None, :width].to(factors.left)
    return Factors(left, factors.right[:, :width].contiguous(), gap=factors.gap, method=factors.method)


def orthogonalized(factors: Factors) -> Factors:
    """The singular vectors of all experts replaced by the nearest ones that are orthonormal together (TSV-M).

    With U = [U_1 … U_N] and V alike, F_i becomes Û_i diag(σ_i) V̂_iᵀ, Û = U (UᵀU)^(−1/2), in float64: where N·r is
    min(m, n), UᵀU has small eigenvalues.
    """
    count, _, rank = factors.left.shape
    left, right = factors.left.double(), factors.right.double()
    us, values, vs = [], [], []
    for one, other in zip(left, right.mT, strict=True):
        q, r = torch.linalg.qr(one)
        p, s = torch.linalg.qr(other)
        u, sigma, vt = torch.linalg.svd(r @ s.T)
        us.append(q @ u)
        values.append(sigma)
        vs.append(p @ vt.T)
    u, v = _polar(torch.cat(us, dim=1)), _polar(torch.cat(vs, dim=1))
    weighted = u * torch.cat(values)
    made = weighted.view(-1, count, rank).transpose(0, 1), v.T.reshape(count, rank, -1)
    left, right = (side.contiguous() for side in made)
    return Factors(left, right, ordered=False, gap=factors.gap, method=factors.method)


def flattened(base: Tensor, experts: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """Σ_j coefficients_j · τ_j of one tensor with all singular values set to their mean (Iso-C): (m, n) float64."""
    matrix = torch.zeros(base.flatten(1).shape, dtype=torch.float64, device=base.device)
    for coefficient, expert in zip(coefficients.tolist(), experts, strict=True):
        matrix += coefficient * (expert.double() - base.double()).flatten(1)
    wide = matrix.shape[0] <= matrix.shape[1]
    rows = matrix if wide else matrix.T
    values, vectors = _eigh(rows @ rows.T)
    flat = values.sqrt().mean() * ((vectors * _inverse_root(values)) @ vectors.T) @ rows
    return flat if wide else flat.T


def _polar(columns: Tensor) -> Tensor:
    """U (UᵀU)^(−1/2): the matrix of orthonormal columns nearest to U, zero where U has no direction."""
    values, vectors = _eigh(columns.T @ columns)
    return columns @ ((vectors * _inverse_root(values)) @ vectors.T)


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(gram.cpu())  # small: solved on the CPU for every device
    return values.clamp_min(0).to(gram.device), vectors.to(gram.device)


def _inverse_root(values: Tensor) -> Tensor:
    kept = values > NOTHING * values.max()
    return torch.where(kept, values, 1.0).rsqrt() * kept
