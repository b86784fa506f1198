"""What becomes of singular values beyond truncation: other methods in R²M's form (README §8). Float64, batched."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ._interface import Operators
from ._stream.budget import COMPUTE_BYTES
from ._stream.factors import GroupFactors
from .config import MergeConfig
from .plain_truncation import Truncatable
from .real_subspace import mean_weights

# Directions of a Gram matrix below this share of its largest eigenvalue are rounding: they have no polar factor.
NOTHING = 1e-13
# Standard deviations, over the number of experts, up to which an off-diagonal entry stays: SCORE's authors' choice.
TRIM = 1.96


def map_spectra(
    factors: GroupFactors,
    inputs: Truncatable[Tensor],
    mixing: Tensor,
    config: MergeConfig,
    operators: Operators,
    dtype: torch.dtype,
) -> GroupFactors:
    """The configured map on a group's truncated residuals, in ``dtype``; as they are for ``"truncate"``.

    Args:
        factors: of the residuals X_i.
        inputs, mixing: what they are made of.
        config: how to map them.
        operators: of the backend.
        dtype: of the result.
    """
    if config.spectrum == "truncate":
        return factors
    if config.spectrum == "rescale":
        mapped = rescaled(factors, float(config.rank))
    elif config.spectrum == "reweigh":
        mapped = reweighed(factors)
    elif config.spectrum == "trim":
        mapped = trimmed(factors, inputs, mixing, mean_weights(config, len(inputs.experts)), operators)
    else:
        mapped = orthogonalized(factors)
    # Values on the orthonormal side change its lengths.
    return replace(mapped, left=mapped.left.to(dtype), right=mapped.right.to(dtype), basis=None)


def mapping_bytes(shape: tuple[int, int], rank: int, count: int, config: MergeConfig) -> int:
    """What that takes at most beyond the factors, of ``count`` residuals of one matrix of this shape."""
    if config.spectrum == "truncate":
        return 0
    (short, long), size, width = sorted(shape), torch.float64.itemsize, count * rank
    if config.spectrum == "rescale":  # how many are kept only numbers tell: as of values that fall evenly to zero
        width = count * math.ceil((1 - math.sqrt(1 - float(config.rank))) * rank)
    if config.spectrum in ("rescale", "reweigh"):  # in place, and then rounded
        return width * (short + long) * COMPUTE_BYTES
    # A QR of the long side holds it three times; where sides are alike the polar factor of one beside the other takes
    # more: its Gram matrix, that matrix's vectors, and twice as much to find them.
    bases, square = width * (long + short) * size, width**2 * size
    joint = max(3 * width * long * size, bases + 5 * square)
    if config.spectrum != "trim":
        return joint
    # Products with all residuals in two types, or in one beside all experts' cores; cores, squares and which of them
    # stay; bases once more as factors.
    sides, moved, cores = width * shape[1] * COMPUTE_BYTES, count * width * shape[0], count * square
    products = sides + max(moved * (size + COMPUTE_BYTES), moved * size + cores)
    return max(joint, bases + max(products, 2 * cores + cores // size, bases))


def flattening_bytes(shape: tuple[int, int]) -> int:
    """What :func:`flattened` takes at most for one matrix of this shape, with what it is given and what it returns."""
    (m, n), square = shape, min(shape) ** 2
    matrices = 2 if m <= n else 3
    return torch.float64.itemsize * max(matrices * m * n + 2 * square, m * n + 4 * square)


def rescaled(factors: GroupFactors, share: float) -> GroupFactors:
    """The fewest leading components with ``share`` of the nuclear norm, scaled up to all of it (STAR).

    Args:
        factors: at full rank, by descending singular value.
        share: of the sum of singular values.

    Returns:
        Factors as wide as the widest of all needs, in the memory of those given; the others' are padded with zeros.
    """
    nuclear = _singular_values(factors)
    totals = nuclear.sum(dim=2, keepdim=True)
    # The first component whose running sum reaches the share is the last one kept. A hair below, for share = 1.
    before = nuclear.cumsum(dim=2) - nuclear
    keep = before < share * (1 - 1e-12) * totals  # of a residual that is zero: nothing
    kept = (nuclear * keep).sum(dim=2, keepdim=True)
    gain = totals / kept.clamp_min(torch.finfo(torch.float64).tiny) * keep
    width = max(1, int(keep.sum(dim=2).max()))
    left = factors.left[..., :width].mul_(gain[:, :, None, :width].to(factors.left))
    return replace(factors, left=left, right=factors.right[:, :, :width], products=None, squares=None)


def reweighed(factors: GroupFactors) -> GroupFactors:
    """Singular values within the effective rank K times 1 − λ, those beyond times λ (MonoSoup).

    K = ⌈exp H⌉, H the entropy of σ/Σσ (Roy & Vetterli 2007); λ = ρ + (1 − ρ) √t, where ρ = (σ_{K+1}/σ_1)² and t is the
    share of energy beyond K.

    Args:
        factors: at full rank, by descending singular value; they are overwritten.
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
    return replace(factors, left=factors.left.mul_(gain.unsqueeze(2).to(factors.left)), products=None, squares=None)


def _singular_values(factors: GroupFactors) -> Tensor:
    """(L, N, r) float64: components are orthogonal on both sides, and their lengths' products are singular values."""
    lengths: Tensor = factors.left.double().norm(dim=2) * factors.right.double().norm(dim=3)
    return lengths


def orthogonalized(factors: GroupFactors) -> GroupFactors:
    """The singular vectors of all experts replaced by the nearest ones that are orthonormal together (TSV-M).

    With U = [U_1 … U_N] and V alike, F_i becomes Û_i diag(σ_i) V̂_iᵀ, Û = U (UᵀU)^(−1/2), in float64: where N·r is
    min(m, n), UᵀU has small eigenvalues.
    """
    left, right, values = _joint_bases(factors)
    left *= values.flatten(1).unsqueeze(1)
    return _shared_out(factors, left, right)


def trimmed(
    factors: GroupFactors, inputs: Truncatable[Tensor], mixing: Tensor, weights: Tensor, operators: Operators
) -> GroupFactors:
    """Residuals in the joint bases Û, V̂ of :func:`orthogonalized`, without what conflicts off the diagonal (SCORE).

    M_i = Ûᵀ X_i V̂ of the whole X_i; off its diagonal those entries stay that are no larger than 1.96/N of the root of
    their mean square, the diagonal counting as zeros. Û (Σ w_i M_i) V̂ᵀ is shared out by columns of V̂: F_i is what lies
    along those that came from expert i, over w_i, so that Σ w_i F_i is all of it.

    Args:
        factors: of the X_i; products with those are as exact as their type.
        inputs, mixing: what the X_i are made of.
        weights: (N,) w.
        operators: of the backend.
    """
    size, count, _, rank = factors.left.shape
    left, right, _ = _joint_bases(factors)
    sides = right.to(factors.right.dtype).unsqueeze(1).expand(-1, count, -1, -1)
    moved = operators.residual_matmul(inputs.bases, inputs.experts, mixing, sides, precision="tf32x3")
    # All M_iᵀ by one product, (L, N, N·r, N·r); turned and widened at once, as it is the largest of all.
    moved = moved.mT.to(torch.float64, memory_format=torch.contiguous_format)
    cores = (moved.flatten(1, 2) @ left).view(size, count, count * rank, count * rank)
    del moved, sides
    squares = cores.square()
    squares.diagonal(dim1=2, dim2=3).zero_()
    cores.masked_fill_(squares > squares.mean(dim=(2, 3), keepdim=True) * (TRIM / count) ** 2, 0.0)
    del squares
    shares = weights.to(cores.device, non_blocking=True)
    total = (shares @ cores.flatten(2)).view(size, count * rank, count * rank).mT
    del cores
    left = (left @ total).div_(shares.repeat_interleave(rank))
    # ⟨F_i, F_j⟩ of all pairs at once: sums over blocks of two Gram matrices' product by element.
    pairs = (left.mT @ left).mul_(right.mT @ right).view(size, count, rank, count, rank)
    products = pairs.sum(dim=(2, 4))
    del pairs, total
    return replace(_shared_out(factors, left, right), products=products, squares=None)


def _joint_bases(factors: GroupFactors) -> tuple[Tensor, Tensor, Tensor]:
    """Û (L, m, N·r), V̂ (L, n, N·r) and singular values (L, N, r) of residuals, all float64."""
    on_left = factors.basis == "left"
    # F = U σ Vᵀ from the side that is not orthonormal yet: its triangle is turned, and the other side with it. These
    # are as large as all residuals' factors: one after another, and none by two names.
    q, triangle = torch.linalg.qr((factors.right.mT if on_left else factors.left).double())
    u, values, vt = _svd(triangle)
    weighted = q @ u
    del q
    basis = (factors.left if on_left else factors.right.mT).double() @ vt.mT
    left, right = (basis, weighted) if on_left else (weighted, basis)
    del weighted, basis
    left = left.transpose(1, 2).flatten(2)
    left = _polar(left)
    right = right.transpose(1, 2).flatten(2)
    return left, _polar(right), values


def _shared_out(factors: GroupFactors, left: Tensor, right: Tensor) -> GroupFactors:
    """(L, m, N·r) and (L, n, N·r), side by side, as factors of N experts."""
    size, count, _, rank = factors.left.shape
    left = left.view(size, -1, count, rank).transpose(1, 2).contiguous()
    right = right.view(size, -1, count, rank).permute(0, 2, 3, 1).contiguous()
    return replace(factors, left=left, right=right, ordered=False, products=None, squares=None)


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
