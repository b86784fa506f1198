"""R²M (arXiv 2509.24367) top to bottom, in the order of README §§1–6."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .checkpoints import StateDict, changed, fits, kinds, mean_weights, mixed, side_by_side, task_vectors

ROUNDING = 2.0**-24  # of float32, in which checkpoints come


def merge(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    real_rank: int | None = 1,
    center: bool = False,
    residual: str = "core",
    rank: float | int = 0.4,
    core_scale: float = 1.0,
    core_mode: str = "restored",
    eta: float = 1.0,
    eta_mode: str = "constant",
    norm_match: bool = True,
    row_power: float = 3.0,
    layer_weight: str = "none",
    weights: Sequence[float] | None = None,
    ranks: Sequence[tuple[str, float | int]] = (),
    truncate: Sequence[str] = (),
    rank_rounding: str = "up",
    whole_up_to: int = 16,
    exclude: Sequence[str] = (),
    head: Sequence[str] = (),
    keep: Sequence[str] = (),
    average: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Options mean what :class:`r2m_kernels.MergeConfig` says; the result is float64, other types as in the base.

    ``head`` are the names of the classifier's tensors where their mean is taken: where a network ends is no formula.
    """
    count, w = len(experts), mean_weights(weights, len(experts))
    matrices, vectors, statistics = kinds(base, exclude, keep, [*average, *head])

    # Step 1. Task vectors: what each specialist learned. (N, m, n) a tensor, (N, elements) of all matrices.
    tau = task_vectors(base, experts, matrices, [*vectors, *statistics])
    whole = side_by_side([tau[name] for name in matrices], count)

    # Step 2. The Real subspace: what all of them learned alike. The core is the mean task vector's part in it.
    frobenius = layer_weight == "frobenius"
    balanced = [tau[name] / (tau[name].norm() or 1.0) if frobenius else tau[name] for name in matrices]
    core, projector = real_subspace(side_by_side(balanced, count), w, real_rank, center)

    # Step 3. Fake residuals: what is one specialist's own, truncated to low rank. Of vectors: off the mean.
    removed = projector if residual == "own" else core.unsqueeze(1).expand(count, count)
    fake = {name: tau[name] - mixed(removed.T, tau[name]) for name in matrices}
    for name, residuals in fake.items():
        usual = 1.0 if min(residuals.shape[1:]) <= whole_up_to else rank
        share = next((one for glob, one in ranks if fits(name, [glob])), usual)
        if truncate and not fits(name, truncate):
            share = 1.0
        rounded, hair = (math.floor, 1e-12) if rank_rounding == "down" else (math.ceil, -1e-12)
        r = share if isinstance(share, int) else max(1, rounded(share * min(residuals.shape[1:]) * (1 + hair)))
        u, s, vh = torch.linalg.svd(residuals, full_matrices=False)
        fake[name] = u[..., :r] * s[:, None, :r] @ vh[:, :r]
    fake |= {name: tau[name] - mixed(w, tau[name]) for name in vectors}

    # Step 4. One norm for all specialists, lest one drown the others. What is shorter than rounding is nothing.
    norms = side_by_side(list(fake.values()), count).norm(dim=1)
    longest = side_by_side([tau[name] for name in fake], count).norm(dim=1).max()
    norms = torch.where(norms > 64 * ROUNDING * longest, norms, 0.0)
    scales = torch.where(norms > 0, w @ norms / norms if norm_match else torch.ones_like(norms), 0.0)

    # Step 5. θ₀ + λ core + η residuals. λ gives back half of the length that averaging took.
    lengths, of_mean = w @ whole.norm(dim=1), (w @ whole).norm()
    restored = (lengths / of_mean.clamp_min(lengths / 16)).nan_to_num(1.0).sqrt()
    core_scale *= {"mean": 1.0, "sum": count, "restored": float(restored)}[core_mode]
    core_norm = abs(core_scale) * float((core @ whole).norm())
    term_norm = float((w * scales @ side_by_side([fake[name] for name in matrices], count)).norm())
    nothing = term_norm <= 64 * ROUNDING * float(whole.norm(dim=1).max()) * float(w @ scales)
    of_residuals = w * scales @ side_by_side([fake[name] for name in matrices], count).norm(dim=1)
    relative = 0.0 if nothing else core_norm / max(term_norm, float(of_residuals) / 16)  # lest what cancels be blown up
    eta *= {"constant": 1.0, "sum": count, "core_norm": core_norm, "relative": relative}[eta_mode]
    change = {name: mixed(w, tau[name]) for name in statistics}
    for name, residuals in fake.items():
        of_rows = (w * scales)[:, None]
        if row_power > 0 and name in matrices:  # a row belongs most to the specialist that changed it most
            changes = scales[:, None] * residuals.norm(dim=2)
            of_rows = w[:, None] * (changes / changes.amax(0)).nan_to_num(1.0) ** row_power
            of_rows = of_rows / of_rows.sum(0) * (1 - w[scales == 0].sum())  # what is nothing keeps its weight
        shared = mixed(core if name in matrices else w, tau[name])
        change[name] = core_scale * shared + eta * (of_rows[..., None] * residuals).sum(0)
    return changed(base, change)


def real_subspace(task_matrix: Tensor, w: Tensor, k: int | None, center: bool) -> tuple[Tensor, Tensor]:
    """Core coefficients c (N,), τ_core = Σ_j c_j τ_j, and projector P (N, N), Πτ_i = Σ_j P_ji τ_j."""
    identity = torch.eye(len(w), dtype=torch.float64)
    if k is None:  # the whole span of the task vectors
        return w, identity
    # An expert that counts twice is two rows.
    rows = (len(w) * w).sqrt()[:, None] * (identity - w if center else identity)
    u, s, _ = torch.linalg.svd(rows @ task_matrix, full_matrices=False)
    k = min(k, int((s**2 > 16 * ROUNDING * task_matrix.square().sum()).sum()))
    basis = rows.T @ u[:, :k] / s[:k]  # task_matrixᵀ · basis: the top k right singular vectors
    projector = basis @ (basis.T @ task_matrix @ task_matrix.T)
    return projector @ w, projector
