"""Tensors whose task vectors are products of few columns: steps 1, 3 and 5 from the factors alone (README §4).

A task vector is L_j R_jᵀ, (m, r_j) by (n, r_j), and comes as one tensor (m + n, r_j), L_j above R_j. All is worked out
in float64 with library products, but for the sum with the base: no bit depends on threads or a memory budget, and the
inner product of two task vectors not on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._interface import Grams, Operators
from ._stream.factors import GroupFactors, inner_products, stacked
from ._stream.tensors import compute_dtype

# Elements of a base whose squares are summed at once.
RUN = 2**18


def task_grams(bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], m: int) -> Grams:
    """Gram matrices of the task vectors, ⟨τ_i, τ_j⟩ = Σ (L_iᵀL_j) ∘ (R_iᵀR_j), and ‖θ₀‖².

    Args:
        bases: L tensors of one shape, or a run of one's elements.
        experts: N sequences of L task vectors.
        m: rows of the tensors.

    Returns:
        (L, N, N) and (L,) float64. NaN or Inf in a base makes its tensor's non-finite.
    """
    squares = torch.stack([run_squares(base).sum() for base in bases])
    tasks = torch.stack([_gram([expert[place] for expert in experts], m) for place in range(len(bases))])
    return Grams(tasks + (squares - squares).view(-1, 1, 1), squares)


def part_grams(base: Tensor, experts: Sequence[Tensor], m: int, *, first: bool) -> Grams:
    """What :func:`task_grams` adds up, of a run of one tensor: a term of each :data:`RUN`, the Gram in the first."""
    squares = run_squares(base)
    tasks = (squares - squares).view(-1, 1, 1).repeat(1, len(experts), len(experts))
    if first:
        tasks[0] += _gram(experts, m)
    return Grams(tasks, squares)


def run_squares(base: Tensor) -> Tensor:
    """Σ θ₀² of each run of a tensor's elements, float64."""
    flat = base.reshape(-1)
    runs = (flat[start : start + RUN] for start in range(0, flat.numel(), RUN))
    lengths = [torch.linalg.vector_norm(run, dtype=torch.float64) for run in runs]
    return torch.stack(lengths).square()


def _gram(experts: Sequence[Tensor], m: int) -> Tensor:
    """(N, N) float64, symmetric up to rounding: each number is a function of its two task vectors alone."""
    gram = experts[0].new_zeros((len(experts), len(experts)), dtype=torch.float64)
    wide = [expert.double() for expert in experts]
    for i, one in enumerate(wide):
        for j, other in enumerate(wide):
            gram[i, j] = ((one[:m].mT @ other[:m]) * (one[m:].mT @ other[m:])).sum()
    return gram


def truncate(
    experts: Sequence[Sequence[Tensor]], m: int, mixing: Tensor, rank: int, dtype: torch.dtype
) -> GroupFactors:
    """The best rank-r approximations of X_i = Σ_j mixing[j, i] τ_j, or all of X_i where it has a smaller rank.

    With L = Q_l T_l and R = Q_r T_r, all task vectors side by side, X_i = Q_l (T_l D_i T_rᵀ) Q_rᵀ, of which the middle
    has as many rows as they have columns.

    Args:
        experts: N sequences of L task vectors, alike in their ranks.
        m: rows of the tensors.
        mixing: (N, N).
        rank: r.
        dtype: of the factors.
    """
    both = torch.cat([stacked(expert).double() for expert in experts], dim=2)
    owners = [j for j, expert in enumerate(experts) for _ in range(expert[0].shape[1])]
    if not owners:
        both, owners = both.new_zeros(*both.shape[:2], 1), [0]
    (outer_left, left), (outer_right, right) = torch.linalg.qr(both[:, :m]), torch.linalg.qr(both[:, m:])
    of_columns = mixing.double().cpu()[owners].T.to(both.device)
    middles = (left.unsqueeze(1) * of_columns.unsqueeze(1)) @ right.mT.unsqueeze(1)
    # Small problems are solved on the CPU for every device.
    u, sizes, vh = (one.to(both.device) for one in torch.linalg.svd(middles.cpu()))
    u, sizes, vh = u[..., :rank], sizes[..., :rank], vh[..., :rank, :]
    signs = torch.where(u.gather(-2, u.abs().argmax(dim=-2, keepdim=True)) < 0, -1.0, 1.0)
    # Components side by side, as in other factors.
    lefts = (outer_left.unsqueeze(1) @ (u * signs * sizes.unsqueeze(-2))).to(dtype).mT.contiguous().mT
    rights = ((vh * signs.mT) @ outer_right.mT.unsqueeze(1)).to(dtype)
    gap = torch.zeros(lefts.shape[:2], dtype=torch.float64, device=both.device)
    return GroupFactors(lefts, rights, "right", True, "exact", gap)


def collapsed(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-r approximation of a product of many columns, float64 on the CPU: (m, r) and (r, n).

    Args:
        left, right: (m, k) and (k, n).
        rank: r.
    """
    (outer_left, inner_left), (outer_right, inner_right) = torch.linalg.qr(left), torch.linalg.qr(right.mT)
    u, sizes, vh = torch.linalg.svd(inner_left @ inner_right.mT)
    return outer_left @ (u[:, :rank] * sizes[:rank]), vh[:rank] @ outer_right.mT


class Products(NamedTuple):
    """Σ_i scale_i · left_i right_i: (L, N, m, r), (L, N, r, n) and (N,)."""

    left: Tensor
    right: Tensor
    scale: Tensor

    def squares(self) -> Tensor:
        """(L, N, N) float64, of which each tensor's add up to its square."""
        both = torch.outer(self.scale, self.scale).double().to(self.left.device)
        return inner_products(self.left, self.right, ordered=False) * both


def combine(
    operators: Operators,
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    m: int,
    coefficients: Tensor,
    products: Products | None,
    outs: Sequence[Tensor],
    rows: slice | None = None,
    columns: slice | None = None,
) -> Tensor:
    """θ₀ + Σ_j c_j τ_lj and truncated residuals into each out, as one product of all their columns.

    Args:
        operators: who adds it to the base.
        bases: L tensors of one shape, or some rows and columns of one.
        experts: N sequences of L task vectors.
        m: rows of the tensors.
        coefficients: (N,) c.
        products: of those rows and columns; ``None``: there are none.
        outs: L tensors as the bases.
        rows, columns: which those are; ``None``: all.

    Returns:
        (L,) largest magnitudes.
    """
    changes = [stacked(expert) for expert in experts]
    dtype, device = compute_dtype([bases[0], changes[0]]), bases[0].device
    some = slice(0, m) if rows is None else rows
    lefts = [change[:, some] * weight for change, weight in zip(changes, coefficients.tolist(), strict=True)]
    rights = [change[:, m:][:, columns or slice(None)].mT for change in changes]
    if products is not None:
        scaled = products.left.to(device, dtype) * products.scale.to(device, dtype).view(-1, 1, 1)
        lefts += list(scaled.unbind(1))
        rights += list(products.right.to(device, dtype).unbind(1))
    # Components side by side, and one at least.
    left = torch.cat([*lefts, lefts[0].new_zeros(*lefts[0].shape[:2], 1)], dim=2).to(dtype).mT.contiguous().mT
    right = torch.cat([*rights, rights[0].new_zeros(len(bases), 1, rights[0].shape[2])], dim=1).to(dtype)
    # The base stands for an expert, which with a coefficient of 0 is not read.
    nothing, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return operators.combine(bases, [list(bases)], nothing, left.unsqueeze(1), right.unsqueeze(1), one, outs)
