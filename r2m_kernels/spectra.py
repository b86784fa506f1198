"""What becomes of singular values beyond truncation: other methods in R²M's form (README §8). Float64, batched."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ._stream.factors import GroupFactors
from .config import MergeConfig

# Directions of a Gram matrix below this share of its largest eigenvalue are rounding: they have no polar factor.
NOTHING = 1e-13


def map_spectra(factors: GroupFactors, config: MergeConfig, dtype: torch.dtype) -> GroupFactors:
    """The configured map on a group's truncated residuals, in ``dtype``; as they are for ``"truncate"``."""
    if config.spectrum == "truncate":
        return factors
    if config.spectrum == "rescale":
        mapped = rescaled(factors, float(config.rank))
    elif config.spectrum == "reweigh":
        mapped = reweighed(factors)
    else:
        mapped = orthogonalized(factors)
    # What came with the factors is not true of these.
    return replace(mapped, left=mapped.left.to(dtype), right=mapped.right.to(dtype), products=None)


def rescaled(factors: GroupFactors, share: float) -> GroupFactors:
    """The fewest leading components with ``share`` of the nuclear norm, scaled up to all of it (STAR).

    Args:
        factors: at full rank, by descending singular value.
        share: of the sum of singular values.

    Returns:
        Factors as wide as the widest of all needs; the others' are padded with zeros.
    """
    nuclear = _singular_values(factors)
    totals = nuclear.sum(dim=2, keepdim=True)
    # The first component whose running sum reaches the share is the last one kept. A hair below, for share = 1.
    before = nuclear.cumsum(dim=2) - nuclear
    keep = before < share * (1 - 1e-12) * totals  # of a residual that is zero: nothing
    kept = (nuclear * keep).sum(dim=2, keepdim=True)
    gain = totals / kept.clamp_min(torch.finfo(torch.float64).tiny) * keep
    width = max(1, int(keep.sum(dim=2).max()))
    left = factors.left[..., :width] * gain[:, :, None, :width].to(factors.left)
    return replace(factors, left=left, right=factors.right[:, :, :width].contiguous())


def reweighed(factors: GroupFactors) -> GroupFactors:
    """Singular values within the effective rank K times 1 − λ, those beyond times λ (MonoSoup).

    K = ⌈exp H⌉, H the entropy of σ/Σσ (Roy & Vetterli 2007); λ = ρ + (1 − ρ) √t, where ρ = (σ_{K+1}/σ_1)² and t is the
    share of energy beyond K.

    Args:
        factors: at full rank, by descending singular value.
    """
    values = _singular_values(factors).cpu()  # a few numbers of each matrix, and many small calls
    shares = (values / values.sum(dim=2, keepdim=True)).nan_to_num(0.0)  # of a residual that is zero
    effective = torch.xlogy(shares, shares).sum(dim=2, keepdim=True).neg().exp()
    # A hair above a whole number is that number; K itself, too, is at most all of them.
    within = torch.arange(values.shape[2]) < (effective * (1 - 1e-12)).ceil()
    beyond = values * ~within
    tail = (beyond.norm(dim=2, keepdim=True) / values.norm(dim=2, keepdim=True)).nan_to_num(0.0)  # √t
    next_to_first = (beyond.amax(dim=2, keepdim=True) / values.amax(dim=2, keepdim=True)).nan_to_num(0.0).square()
    low = next_to_first + (1 - next_to_first) * tail
    gain = torch.where(within, 1 - low, low)
    return replace(factors, left=factors.left * gain.unsqueeze(2).to(factors.left))


def _singular_values(factors: GroupFactors) -> Tensor:
    """(L, N, r) float64: components are orthogonal on both sides, and their lengths' products are singular values."""
    return factors.left.double().norm(dim=2) * factors.right.double().norm(dim=3)


def orthogonalized(factors: GroupFactors) -> GroupFactors:
    """The singular vectors of all experts replaced by the nearest ones that are orthonormal together (TSV-M).

    With U = [U_1 … U_N] and V alike, F_i becomes Û_i diag(σ_i) V̂_iᵀ, Û = U (UᵀU)^(−1/2), in float64: where N·r is
    min(m, n), UᵀU has small eigenvalues.
    """
    size, count, _, rank = factors.left.shape
    left, right = factors.left.double(), factors.right.double().mT
    # F = U σ Vᵀ from the side that is not orthonormal yet: its triangle is turned, and the other side with it.
    basis, weighted = (left, right) if factors.basis == "left" else (right, left)
    q, triangle = torch.linalg.qr(weighted)
    u, values, vt = _svd(triangle)
    weighted, basis = q @ u, basis @ vt.mT
    left, right = (basis, weighted) if factors.basis == "left" else (weighted, basis)
    left, right = (_polar(side.transpose(1, 2).flatten(2)) for side in (left, right))
    left = (left * values.view(size, 1, count * rank)).view(size, -1, count, rank).transpose(1, 2).contiguous()
    right = right.view(size, -1, count, rank).permute(0, 2, 3, 1).contiguous()
    return replace(factors, left=left, right=right, ordered=False)


def flattened(changes: Tensor) -> Tensor:
    """(L, m, n) float64 with all singular values of each matrix set to their mean (Iso-C)."""
    rows = changes if changes.shape[1] <= changes.shape[2] else changes.mT
    values, vectors = _eigh(rows @ rows.mT)
    length = values.sqrt().mean(dim=-1, keepdim=True)
    turn = (vectors * (length * _inverse_root(values)).unsqueeze(-2).to(rows.device)) @ vectors.mT
    flat = turn @ rows
    return flat if rows is changes else flat.mT.contiguous()


def _polar(columns: Tensor) -> Tensor:
    """U (UᵀU)^(−1/2): the matrices of orthonormal columns nearest to U, zero where U has no direction."""
    values, vectors = _eigh(columns.mT @ columns)
    return columns @ ((vectors * _inverse_root(values).unsqueeze(-2).to(columns.device)) @ vectors.mT)


# Small problems are solved on the CPU for every device; what follows from eigenvalues alone is made there too.


def _eigh(grams: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues on the CPU, and eigenvectors where the matrices are."""
    values, vectors = torch.linalg.eigh(grams.cpu())
    return values.clamp_min(0), vectors.to(grams.device)


def _svd(matrices: Tensor) -> tuple[Tensor, ...]:
    return tuple(one.to(matrices.device) for one in torch.linalg.svd(matrices.cpu()))


def _inverse_root(values: Tensor) -> Tensor:
    kept = values > NOTHING * values.amax(dim=-1, keepdim=True)
    return torch.where(kept, values, 1.0).rsqrt() * kept
