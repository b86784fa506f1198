"""Rules of ours that the package has not, or not yet, in plain PyTorch: decorrelated task vectors beside R²M's core.

D = Σ Û_i S_i V̂_iᵀ are the decorrelated task vectors of TSV-M (arXiv 2412.00081): each at rank ⌊min(m, n)/N⌋, the
singular vectors of all made orthonormal together. O is what D has outside the span of the task vectors: it takes
length out of directions that all specialists share and puts it where few do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from bench.quality.parts import Parts, StateDict, in_type_of, low_rank, shared_rank, svd, together
from r2m_kernels import MergeConfig, merge

State = Mapping[str, Tensor]
Weight = Tensor | None
# Of R²M the residual alone: at a tenth of full rank, norms matched, all rows alike.
RESIDUAL = MergeConfig.r2m(rank=0.1, row_power=0.0, whole_up_to=0, eta=1.0, core_scale=0.0)
# Eigenvalues of a Gram matrix below this share of the largest are rounding of float32 checkpoints.
ROUNDING = 16 * 2.0**-24


def decorrelate(tau: Tensor, weight: Weight = None) -> Tensor:
    """(N, m, n) → D, (m, n); (N,) factors of each expert's singular values, or none."""
    r = shared_rank(tau)
    u, values, v = (part[..., :r] for part in svd(tau))
    values = values if weight is None else values * weight[:, None]
    return together(u) * values.flatten() @ together(v).mT


def decorrelated(
    base: State,
    experts: Sequence[State],
    *,
    core: float = 1.2,
    residual: Literal["mean", "matched", "none"] = "mean",
    outside: float = 1.5,
    by_tensor: bool = False,
) -> StateDict:
    """θ₀ + core · g² · τ_core + residual + outside · O: K2 by default, K1 with ``residual="matched"``.

    g² = mean ‖τ_i‖ / ‖mean τ‖. The residual is mean τ − τ_core, or twice ``RESIDUAL``.
    O = D − Σ p_j τ_j, p = G⁻¹ ⟨D, τ_j⟩ over all matrices, or tensor by tensor. Vectors and head are plain means.
    """
    parts = Parts.of(base, experts)
    turned = {name: decorrelate(tau) for name, tau in parts.tau.items()}
    inner = {name: (tau * turned[name]).sum((1, 2)) for name, tau in parts.tau.items()}
    p = _solve(parts.gram, torch.stack(list(inner.values())).sum(0))
    alone = merge(base, experts, RESIDUAL) if residual == "matched" else None
    changes = {}
    for name, tau in parts.tau.items():
        coefficients = core * parts.gain * parts.core
        coefficients -= outside * (_solve(parts.grams[name], inner[name]) if by_tensor else p)
        if residual == "mean":
            coefficients += 1 / len(tau) - parts.core
        changes[name] = torch.tensordot(coefficients, tau, 1) + outside * turned[name]
        if alone:
            changes[name] += 2 * (alone[name].double() - base[name].double()).reshape(tau.shape[1:])
    return parts.merged(changes)


def _solve(gram_: Tensor, inner: Tensor) -> Tensor:
    """G⁻¹ h, without directions in which G is rounding."""
    values, vectors = torch.linalg.eigh(gram_)
    used = values > ROUNDING * values[-1].clamp_min(0)
    solved: Tensor = vectors @ torch.where(used, vectors.T @ inner / torch.where(used, values, 1.0), 0.0)
    return solved


def tsv_m_by_core(base: State, experts: Sequence[State], *, scale: float = 1.2, power: float = 0.5) -> StateDict:
    """TSV-M whose singular values count (N w_i / Σw)^power, w the coefficients of R²M's core."""
    parts = Parts.of(base, experts)
    share = len(experts) * parts.core / parts.core.sum()
    weight = share.clamp_min(0) ** power
    return parts.each(lambda tau: scale * decorrelate(tau, weight), scale)


def core_at_full_length(base: State, experts: Sequence[State], *, config: MergeConfig) -> StateDict:
    """A configuration with the core as long as the specialists' updates are on average: λ = g² and not g."""
    return merge(base, experts, config.replace(core_scale=config.core_scale * Parts.of(base, experts).gain ** 0.5))


def mean_of(base: State, experts: Sequence[State], *, configs: tuple[MergeConfig, ...]) -> StateDict:
    """The mean of several merges' weights."""
    states = [merge(base, experts, config) for config in configs]
    mean = {
        name: torch.stack([state[name].double() for state in states]).mean(0) if tensor.is_floating_point() else tensor
        for name, tensor in base.items()
    }
    return in_type_of(base, mean)


def compressed_ensemble(
    base: State, experts: Sequence[State], *, rank: float = 0.05, own_vectors: bool = True
) -> list[StateDict]:
    """N detectors, whose mean logit counts: the average, and of each specialist's rest τ_i − mean τ a low rank.

    Vectors, statistics and classifier are each specialist's own, or the mean. What is stored beside the average are N
    adapters of ``rank``.
    """
    parts = Parts.of(base, experts)
    rests = {name: low_rank(tau - tau.mean(0), rank) for name, tau in parts.tau.items()}
    states = []
    for index in range(len(experts)):
        change = {name: tau.mean(0) + rests[name][index] for name, tau in parts.tau.items()}
        if own_vectors:
            change |= {name: tau[index] for name, tau in (parts.vectors | parts.plain).items()}
        states.append(parts.merged(change))
    return states
