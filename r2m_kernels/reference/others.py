"""Other methods, a function each: what tests hold their configurations of ``MergeConfig`` to (README §8).

All take a base, N experts and what the experts count; tensors with fewer than two dimensions are vectors, and running
statistics are always averaged. Results are float64.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .checkpoints import StateDict, changed, kinds, mean_weights, mixed, side_by_side, task_vectors

Weights = Sequence[float] | None


def _each(
    base: StateDict,
    experts: Sequence[StateDict],
    weights: Weights,
    of_matrix: Callable[[Tensor, Tensor], Tensor],
    vector_scale: float = 1.0,
) -> dict[str, Tensor]:
    """θ₀ + of_matrix(τ, w) for matrices, + ``vector_scale`` · mean τ for vectors; means of statistics."""
    w = mean_weights(weights, len(experts))
    matrices, vectors, statistics = kinds(base)
    tau = task_vectors(base, experts, matrices, [*vectors, *statistics])
    change = {name: mixed(w, tau[name]) for name in tau}
    change |= {name: vector_scale * change[name] for name in vectors}
    return changed(base, change | {name: of_matrix(tau[name], w) for name in matrices})


def weight_average(base: StateDict, experts: Sequence[StateDict], weights: Weights = None) -> dict[str, Tensor]:
    """θ₀ + mean τ (model soups, arXiv 2203.05482)."""
    return _each(base, experts, weights, lambda tau, w: mixed(w, tau))


def task_arithmetic(
    base: StateDict, experts: Sequence[StateDict], scale: float, weights: Weights = None
) -> dict[str, Tensor]:
    """θ₀ + scale · Σ τ (arXiv 2212.04089)."""
    total = scale * len(experts)
    return _each(base, experts, weights, lambda tau, w: total * mixed(w, tau), total)


def cart(
    base: StateDict, experts: Sequence[StateDict], rank: float, scale: float, weights: Weights = None
) -> dict[str, Tensor]:
    """θ₀ + mean τ + scale · Σ of the deviations from it, truncated to a share ``rank`` (arXiv 2412.12153)."""

    def of_matrix(tau: Tensor, w: Tensor) -> Tensor:
        mean = mixed(w, tau)
        r = math.ceil(rank * min(mean.shape) * (1 - 1e-12))
        u, s, vh = torch.linalg.svd(tau - mean, full_matrices=False)
        return mean + scale * len(tau) * mixed(w, u[..., :r] * s[:, None, :r] @ vh[:, :r])

    return _each(base, experts, weights, of_matrix)


def star(base: StateDict, experts: Sequence[StateDict], share: float, weights: Weights = None) -> dict[str, Tensor]:
    """Of each τ the fewest singular values with ``share`` of their sum, scaled up to all of it (arXiv 2502.10339)."""

    def of_matrix(tau: Tensor, w: Tensor) -> Tensor:
        u, s, vh = torch.linalg.svd(tau, full_matrices=False)
        total = s.sum(1, keepdim=True)
        kept = s * (s.cumsum(1) - s < share * total * (1 - 1e-12))
        return mixed(w, u * (kept * (total / kept.sum(1, keepdim=True)).nan_to_num(1.0))[:, None] @ vh)

    return _each(base, experts, weights, of_matrix)


def mono_soup(base: StateDict, experts: Sequence[StateDict], weights: Weights = None) -> dict[str, Tensor]:
    """Singular values of each τ times 1 − λ up to its effective rank and times λ beyond (arXiv 2602.09689)."""

    def of_matrix(tau: Tensor, w: Tensor) -> Tensor:
        soups = torch.zeros_like(tau)
        for one, soup in zip(tau, soups, strict=True):
            u, s, vh = torch.linalg.svd(one, full_matrices=False)
            if s[0] > 0:
                p = (s / s.sum())[s > 0]
                rank = math.ceil(math.exp(-float((p * p.log()).sum())) * (1 - 1e-12))
                low = 0.0
                if rank < len(s):
                    rho = float(s[rank] / s[0]) ** 2
                    low = rho + (1 - rho) * math.sqrt(float(s[rank:].square().sum() / s.square().sum()))
                soup += (1 - low) * u[:, :rank] * s[:rank] @ vh[:rank] + low * u[:, rank:] * s[rank:] @ vh[rank:]
        return mixed(w, soups)

    return _each(base, experts, weights, of_matrix)


def score(base: StateDict, experts: Sequence[StateDict], scale: float, weights: Weights = None) -> dict[str, Tensor]:
    """θ₀ + scale · Σ of the τ in TSV-M's bases, off the diagonal only up to 1.96/N of the root of their mean square.

    From arXiv 2603.05768, whose code measures from the mean there, which depends on the signs of singular vectors.
    """

    def of_matrix(tau: Tensor, w: Tensor) -> Tensor:
        count, r = len(tau), max(1, min(tau.shape[1:]) // len(tau))
        u, _, vh = torch.linalg.svd(tau, full_matrices=False)
        u, v = (_together(side[..., :r]).transpose(0, 1).flatten(1) for side in (u, vh.mT))
        core = u.T @ tau @ v
        others = core - torch.diag_embed(core.diagonal(dim1=1, dim2=2))
        border = 1.96 / count * others.square().mean(dim=(1, 2), keepdim=True).sqrt()
        kept = torch.where(others.abs() > border, 0.0, core)
        return scale * count * u @ mixed(w, kept) @ v.T

    return _each(base, experts, weights, of_matrix, scale)


def _together(vectors: Tensor) -> Tensor:
    """(N, m, r) with orthonormal columns each → the nearest with all N·r columns orthonormal."""
    count, _, r = vectors.shape
    u, _, vh = torch.linalg.svd(vectors.transpose(0, 1).flatten(1), full_matrices=False)
    together: Tensor = u @ vh
    return together.view(-1, count, r).transpose(0, 1)


def tsv_m(base: StateDict, experts: Sequence[StateDict], scale: float, weights: Weights = None) -> dict[str, Tensor]:
    """θ₀ + scale · Σ of the τ at rank min(m, n)/N, singular vectors orthonormal together (arXiv 2412.00081)."""

    def of_matrix(tau: Tensor, w: Tensor) -> Tensor:
        count, r = len(tau), max(1, min(tau.shape[1:]) // len(tau))
        u, s, vh = torch.linalg.svd(tau, full_matrices=False)
        u, v = _together(u[..., :r]), _together(vh[:, :r].mT)
        return scale * count * mixed(w, u * s[:, None, :r] @ v.mT)

    return _each(base, experts, weights, of_matrix, scale)


def iso_c(base: StateDict, experts: Sequence[StateDict], scale: float, weights: Weights = None) -> dict[str, Tensor]:
    """θ₀ + scale · Σ τ with all singular values set to their mean (arXiv 2502.04959)."""

    def of_matrix(tau: Tensor, w: Tensor) -> Tensor:
        u, s, vh = torch.linalg.svd(len(tau) * mixed(w, tau), full_matrices=False)
        flat: Tensor = scale * s.mean() * u @ vh
        return flat

    return _each(base, experts, weights, of_matrix, scale)


def swudi(
    base: StateDict, experts: Sequence[StateDict], descent_steps: int, scale: float, weights: Weights = None
) -> dict[str, Tensor]:
    """θ₀ + scale · X_T, by T steps 1/L down Σ_i w_i ‖(X − τ_i) τ_iᵀ‖² / ‖τ_i‖² from the mean (arXiv 2606.07289)."""

    def of_matrix(tau: Tensor, w: Tensor) -> Tensor:
        gram = tau.mT @ tau
        loss = (w / gram.diagonal(dim1=1, dim2=2).sum(1)).nan_to_num(0.0, 0.0, 0.0)
        length = 1 / float((mixed(loss, gram) @ mixed(loss, gram)).norm() ** 0.5 or 1.0)
        x = mixed(w, tau)
        for _ in range(descent_steps):
            x = x + length * mixed(loss, (tau - x) @ gram)
        return scale * x

    return _each(base, experts, weights, of_matrix, scale)


def ties(
    base: StateDict, experts: Sequence[StateDict], density: float, scale: float, weights: Weights = None
) -> dict[str, Tensor]:
    """Of each τ the largest ``density`` of elements; scale · mean of those that agree in sign (arXiv 2306.01708)."""
    count, w = len(experts), mean_weights(weights, len(experts))
    matrices, vectors, statistics = kinds(base)
    tau = task_vectors(base, experts, matrices, [*vectors, *statistics])
    change = {name: mixed(w, tau[name]) for name in statistics}
    magnitudes = side_by_side([tau[name] for name in (*matrices, *vectors)], count).abs().sort(dim=1).values
    dropped = magnitudes.shape[1] - int(magnitudes.shape[1] * density)
    smallest = magnitudes[:, dropped - 1] if dropped else torch.zeros(count)
    for name in (*matrices, *vectors):
        kept = torch.where(tau[name].abs() >= smallest[:, None, None], tau[name], 0.0)
        agree = w[:, None, None] * (kept * mixed(w, kept) > 0)
        change[name] = scale * ((agree * kept).sum(0) / agree.sum(0)).nan_to_num(0.0)
    return changed(base, change)


def splitmix64(key: int, place: int) -> int:
    """Number ``place`` (from 1) of the sequence of 64-bit numbers that ``key`` starts (Steele, Lea & Flood 2014)."""
    most = 2**64 - 1
    z = (key + 0x9E3779B97F4A7C15 * place) & most
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & most
    z = (z ^ z >> 27) * 0x94D049BB133111EB & most
    return z ^ z >> 31


def dare(
    base: StateDict,
    experts: Sequence[StateDict],
    density: float,
    scale: float,
    seed: int = 0,
    weights: Weights = None,
) -> dict[str, Tensor]:
    """θ₀ + scale · Σ τ with a random ``density`` of each τ's elements, divided by it (arXiv 2311.03099).

    Element e of expert j's tensor is kept where the upper 32 bits of number e + 1 of its sequence are below
    ⌊density · 2³²⌋; the sequence starts at 63 bits of BLAKE2b of "seed, name, j, rows x the rest", NUL between them.
    """
    count, w = len(experts), mean_weights(weights, len(experts))
    matrices, vectors, statistics = kinds(base)
    tau = task_vectors(base, experts, matrices, [*vectors, *statistics])
    change = {name: mixed(w, tau[name]) for name in statistics}
    for name in (*matrices, *vectors):
        rows, elements = (base[name].shape or (1,))[0], base[name].numel()
        kept = torch.zeros(count, elements, dtype=torch.float64)
        for j in range(count):
            text = f"{seed}\0{name}\0{j}\0{rows}x{elements // max(1, rows)}".encode()
            key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
            numbers = (splitmix64(key, place) >> 32 for place in range(1, elements + 1))
            kept[j] = torch.tensor([number < int(density * 2**32) for number in numbers])
        change[name] = scale * count * mixed(w, kept.view(tau[name].shape) * tau[name]) / density
    return changed(base, change)


def layers_scaled(
    base: StateDict, experts: Sequence[StateDict], merged: StateDict, weights: Weights = None
) -> dict[str, Tensor]:
    """``scale="layer"``: every matrix's change times (mean ‖τ‖ / ‖mean τ‖)^½, at most 4."""
    w, (matrices, _, _) = mean_weights(weights, len(experts)), kinds(base)
    result = dict(merged)
    for name, tau in task_vectors(base, experts, matrices, []).items():
        lengths, of_mean = w @ tau.norm(dim=(1, 2)), mixed(w, tau).norm()
        gain = (lengths / of_mean.clamp_min(lengths / 16)).nan_to_num(1.0).sqrt()
        result[name] = base[name].double() + gain * (merged[name] - base[name].double())
    return result


def columns_scaled(base: StateDict, experts: Sequence[StateDict], merged: StateDict, core: Tensor) -> dict[str, Tensor]:
    """``scale="column"``: every column of a matrix's change as long as the experts' are, which count |core_j|."""
    result = dict(merged)
    for name, tau in task_vectors(base, experts, kinds(base).matrices, []).items():
        change = (merged[name] - base[name].double()).reshape(tau.shape[1:])
        lengths = core.abs() @ tau.norm(dim=1) / core.abs().sum()
        factors = (lengths / change.norm(dim=0)).nan_to_num(1.0).clamp_max(4)
        result[name] = base[name].double() + (change * factors).reshape(base[name].shape)
    return result
