"""Data-free ideas of our own, none on the list that this benchmark began with, each with the budget of any method.

What won is an option of the package; the rest is here, so that its numbers can be made again. The rows that were to be
confirmed on fresh seeds were fixed before those were looked at: ``REGISTERED``, the first of which may become the
default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from r2m_kernels import MergeConfig

StateDict = Mapping[str, Tensor]
Rule = Callable[[StateDict, Sequence[StateDict]], StateDict]
SMALLEST = 1e-20

# Every field that matters is spelled out: the package's default may move, what was registered may not.
DEFAULT = MergeConfig(
    real_rank=1,
    rank=1.0,
    core_scale=1.0,
    core_mode="restored",
    eta=1.0,
    eta_mode="constant",
    norm_match=True,
    row_power=3.0,
)
ROWS = DEFAULT.replace(core_scale=1.2, core_mode="mean")
TRUNCATED = MergeConfig.r2m_truncated()
REGISTERED: dict[str, MergeConfig] = {
    "R2M by rows, core restored": DEFAULT,
    "R2M by rows, core × 1.2": ROWS,
    "R2M by rows, squares, unmatched": ROWS.replace(row_power=2.0, norm_match=False),
    "R2M by rows, all × 1.15": ROWS.replace(row_power=2.0, core_scale=1.15, eta=1.15, norm_match=False),
    "rows without Real subspace, × 1.15": ROWS.replace(
        row_power=4.0, real_rank=0, core_scale=1.15, eta=1.15, norm_match=False
    ),
    "R2M, rank 0.2, η = 1": TRUNCATED.replace(rank=0.2, eta=1.0, eta_mode="constant"),
}


def by_matrix(change: Callable[[Tensor], Tensor]) -> Rule:
    """A rule from what becomes of one matrix's task vectors, (N, m, n) to (m, n); vectors are averaged."""

    def rule(base: StateDict, experts: Sequence[StateDict]) -> StateDict:
        merged: dict[str, Tensor] = {}
        for name, theta in base.items():
            if not theta.is_floating_point():
                merged[name] = theta
                continue
            tau = torch.stack([expert[name] - theta for expert in experts])
            if theta.ndim < 2:
                merged[name] = theta + tau.mean(0)
            else:
                merged[name] = theta + change(tau.flatten(2)).view_as(theta)
        return merged

    return rule


def _weighted(tau: Tensor, weights: Tensor) -> Tensor:
    made: Tensor = (weights * tau).sum(0) / weights.sum(0)
    return made


def magnitudes(power: float, scale: float = 1.0) -> Rule:
    """Every element in proportion to a power of its magnitude: between the mean and the largest."""
    return by_matrix(lambda tau: scale * _weighted(tau, tau.abs() ** power + SMALLEST))


def soft_signs(left: float, scale: float = 1.0) -> Rule:
    """Elements against the sign of their sum count ``left`` of the others, where TIES drops them."""
    return by_matrix(lambda tau: scale * _weighted(tau, torch.where(tau * tau.sum(0) > 0, 1.0, left)))


def columns(power: float, scale: float = 1.0) -> Rule:
    """Every input column in proportion to a power of its length."""

    def change(tau: Tensor) -> Tensor:
        lengths = tau.norm(dim=1, keepdim=True)
        return scale * _weighted(tau, lengths**power + SMALLEST)

    return by_matrix(change)


def subspace_per_layer(scale: float = 1.0) -> Rule:
    """A Real direction for every layer, and nothing but the core."""

    def change(tau: Tensor) -> Tensor:
        rows = tau.flatten(1).double()
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        leading = vectors[:, -1] / values[-1].clamp_min(SMALLEST).sqrt()
        core = torch.outer(leading, leading) @ (rows @ rows.T).mean(1)
        return scale * torch.tensordot(core.float(), tau, 1)

    return by_matrix(change)


def rank_by_energy(share: float, strength: float) -> Rule:
    """Deviations from the mean at the rank that keeps a share of their energy, of one norm."""

    def change(tau: Tensor) -> Tensor:
        mean = tau.mean(0)
        u, s, vh = torch.linalg.svd(tau - mean, full_matrices=False)
        energy = s.square()
        inside = energy.cumsum(1) - energy < share * energy.sum(1, keepdim=True)
        kept = (u * (s * inside).unsqueeze(1)) @ vh
        norms = kept.flatten(1).norm(dim=1)
        matched = kept * (norms.mean() / norms.clamp_min(SMALLEST)).view(-1, 1, 1)
        return mean + strength * matched.mean(0)

    return by_matrix(change)


def model_stock(power: float) -> Rule:
    """The mean shortened where task vectors disagree: N·cos/(1 + (N − 1)·cos), to a power."""

    def change(tau: Tensor) -> Tensor:
        rows = torch.nn.functional.normalize(tau.flatten(1), dim=1)
        count = len(rows)
        cosine = float(((rows @ rows.T).sum() - count) / (count * (count - 1))) if count > 1 else 1.0
        return tau.mean(0) * max(0.0, count * cosine / (1 + (count - 1) * cosine)) ** power

    return by_matrix(change)


def regression_on_task_vectors(ridge: float) -> Rule:
    """RegMean with τᵀτ, which grows where a layer's inputs were, in place of the inputs' covariance."""

    def change(tau: Tensor) -> Tensor:
        rows = tau.double()
        inputs = rows.mT @ rows
        inputs = inputs / inputs.diagonal(dim1=1, dim2=2).mean(1).clamp_min(SMALLEST).view(-1, 1, 1)
        inputs = inputs + ridge * torch.eye(inputs.shape[1], dtype=torch.float64)
        return torch.linalg.solve(inputs.sum(0), (rows @ inputs).sum(0), left=False).float()

    return by_matrix(change)


def _rows(powers: Sequence[float], scales: Sequence[float], **fields: object) -> dict[str, MergeConfig]:
    return {
        f"power {power:g}, × {scale:g}": ROWS.replace(row_power=power, core_scale=scale, **fields)
        for power in powers
        for scale in scales
    }


def _scaled(name: str) -> dict[str, MergeConfig]:
    return {
        "average": MergeConfig.weight_average().replace(scale=name),
        "R2M's core": TRUNCATED.replace(eta=0.0, scale=name),
        **{
            f"R2M, rank {rank:g}, η {eta:g}": TRUNCATED.replace(rank=rank, eta=eta, scale=name)
            for rank in (0.1, 0.2, 0.4)
            for eta in (0.3, 0.6)
        },
    }


CANDIDATES: dict[str, Mapping[str, MergeConfig | Rule]] = {
    **{name: {"": config} for name, config in REGISTERED.items()},
    "R2M by rows, tuned": _rows((1.0, 2.0, 3.0, 4.0), (1.0, 1.2)),
    "R2M by rows, unmatched, tuned": _rows((1.0, 2.0, 3.0, 4.0), (1.0, 1.2), norm_match=False),
    "rows without Real subspace": _rows((2.0, 4.0, 6.0, 8.0), (1.0,), real_rank=0, norm_match=False),
    "elements by magnitude": {
        f"power {p:g}, × {s:g}": magnitudes(p, s) for p in (0.5, 1.0, 2.0, 4.0) for s in (0.9, 1.0)
    },
    "soft sign election": {
        f"against {left:g}, × {s:g}": soft_signs(left, s) for left in (0.0, 0.25, 0.5, 0.75) for s in (0.8, 1.0)
    },
    "columns by length": {f"power {p:g}, × {s:g}": columns(p, s) for p in (1.0, 2.0, 4.0) for s in (1.0, 1.2)},
    "Real subspace per layer": {f"× {s:g}": subspace_per_layer(s) for s in (0.9, 1.0, 1.1, 1.2)},
    "rank by kept energy": {
        f"share {share:g}, η {eta:g}": rank_by_energy(share, eta)
        for share in (0.3, 0.5, 0.7, 0.9)
        for eta in (0.5, 1.0)
    },
    "Model Stock": {f"power {p:g}": model_stock(p) for p in (0.25, 0.5, 1.0)},
    "regression on task vectors": {
        f"ridge {r:g}": regression_on_task_vectors(r) for r in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    },
    "layers scaled": _scaled("layer"),
    "columns scaled": _scaled("column"),
}
