"""Step 2, the Real subspace: what all specialists changed alike (README §3). N × N algebra in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import MergeConfig

# A Gram entry is known to this fraction of |A||A|ᵀ (README §2); eigenvalues below it, relative to the trace, are noise.
GRAM_ERROR = 16 * 2.0**-24


@dataclass(frozen=True)
class RealSubspace:
    """The projector onto the Real subspace, acting on coefficients of the task vectors.

    Attributes:
        gram: (N, N) weighted Gram matrix G = Σ γ_l G_l.
        weights: (N,) w, summing to 1: the mean task vector is Σ w_j τ_j.
        eigenvalues: (N,) of K = D H G Hᵀ D, D² = N diag(w), descending.
        dimension: how many were kept: at most k, fewer where K has no more above the noise.
        core: (N,) coefficients c, so that τ_core = Σ c_j τ_j.
        mixing: (N, N) M, residual i = Σ_j M[j, i] τ_j.
        gap: (λ_k − λ_{k+1}) / λ_k; None where nothing was cut off.
    """

    gram: Tensor
    weights: Tensor
    eigenvalues: Tensor
    dimension: int
    core: Tensor
    mixing: Tensor
    gap: float | None


def mean_weights(config: MergeConfig, count: int) -> Tensor:
    """(N,) float64 w: 1/N, or the configured weights over their sum."""
    if config.weights is None:
        return torch.full((count,), 1.0 / count, dtype=torch.float64)
    weights = torch.tensor(config.weights, dtype=torch.float64)
    return weights / weights.sum()


def layer_weights(grams: Sequence[Tensor], config: MergeConfig) -> list[float]:
    """γ_l of every matrix tensor: 1, or 1/‖A_l‖²_F (0 where that norm is 0)."""
    if config.layer_weight == "none":
        return [1.0] * len(grams)
    traces = [float(gram.trace()) for gram in grams]
    return [1.0 / trace if trace > 0 else 0.0 for trace in traces]


def real_subspace(gram: Tensor, config: MergeConfig) -> RealSubspace:
    """The top-k right singular vectors of the task matrix, from its (N, N) weighted Gram matrix."""
    count = len(gram)
    identity = torch.eye(count, dtype=torch.float64)
    mean = mean_weights(config, count)
    # Rows of the task matrix that are centred, if asked for, and as long as an expert counts.
    rows = identity - mean if config.center else identity
    if config.weights is not None:
        rows = (count * mean).sqrt().unsqueeze(1) * rows
    eigenvalues, vectors = torch.linalg.eigh(rows @ gram @ rows.T)
    eigenvalues, vectors = eigenvalues.flip(0), vectors.flip(1)

    if config.real_rank is None:
        projector, core, dimension, gap = identity, mean, count, None
    else:
        above_noise = int((eigenvalues > GRAM_ERROR * gram.trace()).sum())
        dimension = min(config.real_rank, above_noise)
        basis = rows.T @ vectors[:, :dimension] / eigenvalues[:dimension].sqrt()
        projector = basis @ basis.T @ gram  # on coefficients: Aᵀ·basis has orthonormal columns
        core = projector @ mean
        cut = 0 < dimension < count
        gap = float(1 - eigenvalues[dimension].clamp_min(0) / eigenvalues[dimension - 1]) if cut else None

    removed = projector if config.residual == "own" else core.unsqueeze(1)  # from column i: P e_i, or c
    mixing = identity - removed
    return RealSubspace(gram, mean, eigenvalues, dimension, core, mixing, gap)
