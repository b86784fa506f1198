"""Other people's data-free rules that the package has not, in plain PyTorch, float64, a function each.

Sources stand beside, and what is our derivation. All keep the plain mean of classifier and running statistics, and
``scale`` is of matrices and vectors alike. A tensor of more than two dimensions is a matrix, first dimension by the
rest, as in the package.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from bench.quality.parts import Parts, StateDict, in_type_of, shared_rank, svd, together
from r2m_kernels import MergeConfig, merge
from r2m_kernels.reference.checkpoints import changed

State = Mapping[str, Tensor]
NOTHING = 1e-12  # of the largest: eigenvalues and norms below it are rounding


def cleaned(base: State, expert: State, *, energy: float | None = None) -> StateDict:
    """MonoSoup (arXiv 2602.09689, the authors' code): one specialist with its task matrices' low parts weighed anew.

    Of each, k singular values are the high part: as many as its effective rank, or the fewest with ``energy``. P is
    their share of the energy, ρ = (σ_{k+1} / σ_1)²; the low part counts λ = ρ + (1 − ρ) √(1 − P), the high part 1 − λ.
    """
    parts, changes = Parts.of(base, [expert]), {}
    for name, tau in parts.tau.items():
        (u,), (values,), (v,) = svd(tau)
        squares, shares = values.square() / values.square().sum(), values / values.sum()
        if not squares.isfinite().all():
            continue
        if energy is None:
            k = math.ceil(float(torch.special.entr(shares).sum().exp()) * (1 - NOTHING))
        else:
            k = int((squares.cumsum(0) < energy).sum()) + 1
        k = min(k, len(values))
        rho = float((values[k] / values[0]).square()) if k < len(values) else 0.0
        low = rho + (1 - rho) * math.sqrt(max(0.0, 1 - float(squares[:k].sum())))
        weighed = values * torch.where(torch.arange(len(values)) < k, 1 - low, low)
        changes[name] = (u * weighed) @ v.mT
    return in_type_of(base, changed(expert, {name: change - parts.tau[name][0] for name, change in changes.items()}))


def monosoup(
    base: State, experts: Sequence[State], *, energy: float | None = None, then: MergeConfig | None = None
) -> StateDict:
    """Each specialist ``cleaned`` alone, then merged: by the average, or as ``then`` says."""
    clean = [cleaned(base, expert, energy=energy) for expert in experts]
    return merge(base, clean, then or MergeConfig.weight_average())


def larv(base: State, experts: Sequence[State], *, then: MergeConfig, tiers: float | None = None) -> StateDict:
    """LARV (arXiv 2602.09413): every task matrix scaled by depth and by what it does to the base's, then merged.

    By its equation 8 as a third party's code has it: score = e · √d / (1 + softplus(z)), e the effective rank of the
    base's matrix over the change's, d the depth in (0, 1], z the commutator of both, standardised over layers; the
    scale is 1 + ½ tanh(3 (score − 1)). With ``tiers`` our reading of its three levels, whose values the abstract does
    not give: 1 − tiers, 1, 1 + tiers by thirds of the scores.
    """
    parts, scaled = Parts.of(base, experts), [dict(expert) for expert in experts]
    for index, expert in enumerate(experts):
        metrics = []
        for name, tau in parts.tau.items():
            weight, change = base[name].double().reshape(tau.shape[1:]), tau[index]
            ratio = _effective_rank(weight) / _effective_rank(change)
            left, right = weight @ change.mT, weight.mT @ change
            apart = ((left - left.mT).norm() + (right - right.mT).norm()) / (2 * weight.norm() * change.norm())
            metrics.append([float(ratio), float(apart.nan_to_num(0.0))])
        ratios, commutators = torch.tensor(metrics, dtype=torch.float64).T
        depth = torch.arange(1, len(ratios) + 1, dtype=torch.float64) / len(ratios)
        standard = (commutators - commutators.mean()) / commutators.std(correction=0).clamp_min(NOTHING)
        scores = ratios * depth.sqrt() / (1 + softplus(standard))
        third = torch.searchsorted(torch.quantile(scores, torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)), scores)
        scales = 1 + torch.tanh(3 * (scores - 1)) / 2 if tiers is None else 1 + tiers * (third - 1)
        for (name, tau), by in zip(parts.tau.items(), scales, strict=True):
            moved = base[name].double() + by * tau[index].reshape(base[name].shape)
            scaled[index][name] = moved.to(expert[name].dtype)
    return merge(base, scaled, then)


def _effective_rank(matrix: Tensor) -> Tensor:
    """The exponential of the entropy of σ² / Σσ²; 1 for a matrix of zeros."""
    squares = torch.linalg.svdvals(matrix).square()
    effective: Tensor = torch.special.entr((squares / squares.sum()).nan_to_num(0.0)).sum().exp()
    return effective


def resmerge(base: State, experts: Sequence[State], *, budget: float = 0.2, scale: float = 1.0) -> StateDict:
    """ResMerge (arXiv 2606.02252, the authors' code): residuals beyond the first singular value averaged as directions.

    Their mean direction gets the length mean ‖R_i‖ · c^β, c their mean cosine to it and β in [.7, 1] by how alike they
    are; where c ≤ 1/√N the plain mean. To it comes the mean of the first components, as long as ``budget`` times their
    agreement allows. Theirs is for attention and MLP layers; we take every matrix for one.
    """

    def of_matrix(tau: Tensor) -> Tensor:
        u, values, v = svd(tau)
        first = (u[..., :1] * values[:, None, :1]) @ v[..., :1].mT
        rest = tau - first
        norms = rest.norm(dim=(1, 2))
        units = rest / norms.clamp_min(NOTHING)[:, None, None]
        direction = units.sum(0) / units.sum(0).norm().clamp_min(NOTHING)
        coherence = float((units * direction).sum((1, 2)).mean().clamp(0, 1))
        alike = (_mean_cosine(rest) + 1) / 2 + (coherence + 1) / 2
        backbone = direction * norms.mean() * coherence ** (1 - 0.3 * min(1.0, alike / 2))
        if coherence <= len(tau) ** -0.5:
            backbone = rest.mean(0)
        mean = first.mean(0)
        length = budget * _mean_cosine(first, positive=True) * backbone.norm()
        return scale * (backbone + mean * length / mean.norm().clamp_min(NOTHING))

    return Parts.of(base, experts).each(of_matrix, scale)


def _mean_cosine(stack: Tensor, *, positive: bool = False) -> float:
    """Mean of the cosines of all pairs of (N, m, n); negative ones as 0 with ``positive``. 1 for a single one."""
    rows = torch.nn.functional.normalize(stack.flatten(1), dim=1)
    pairs = (rows @ rows.T)[torch.triu(torch.ones(len(rows), len(rows)), 1) > 0]
    pairs = pairs.clamp_min(0) if positive else pairs
    return float(pairs.mean()) if len(pairs) else 1.0


def dc_merge(
    base: State, experts: Sequence[State], *, scale: float = 1.0, smooth: bool = True, elect: bool = False
) -> StateDict:
    """DC-Merge (arXiv 2603.06242, the authors' code and merge-and-rebase's): truncated matrices in a shared basis.

    The leading ⌊min(m, n)/N⌋ singular values of each, all set to their mean if ``smooth``; in TSV-M's basis they are
    summed, or with ``elect`` the mean of the elements that agree in sign with the sum; of the result each expert's own
    diagonal block stays.
    """

    def of_matrix(tau: Tensor) -> Tensor:
        r = shared_rank(tau)
        u, values, v = (part[..., :r] for part in svd(tau))
        values = values.mean(1, keepdim=True).expand_as(values) if smooth else values
        left, right = together(u), together(v)
        turned = (left.mT @ u * values[:, None]) @ (v.mT @ right)
        total = turned.sum(0)
        if elect:
            agree = turned * total > 0
            total = (turned * agree).sum(0) / agree.sum(0).clamp_min(1)
        own = torch.block_diag(*[torch.ones(r, r, dtype=tau.dtype)] * len(tau))
        return scale * left @ (total * own) @ right.mT

    return Parts.of(base, experts).each(of_matrix, scale)
