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
from ._stream.blocks import as_matrix, element_panels, empty_rows, product_panels
from ._stream.factors import GroupFactors, inner_products, stacked


def task_grams(experts: Sequence[Sequence[Tensor]], m: int) -> Grams:
    """Gram matrices of the task vectors, ⟨τ_i, τ_j⟩ = Σ (L_iᵀL_j) ∘ (R_iᵀR_j).

    Args:
        experts: N sequences of L task vectors.
        m: rows of the tensors.

    Returns:
        (L, N, N) float64; of the bases, which are not looked at, zeros.
    """
    tasks = torch.stack([_gram([expert[place] for expert in experts], m) for place in range(len(experts[0]))])
    return Grams(tasks, tasks.new_zeros(len(tasks)))


def base_squares(bases: Sequence[Tensor], *, flat: bool) -> Tensor:
    """‖θ₀‖² of the blocks of tensors of one shape: (L, blocks) float64, NaN or Inf where a base has them.

    Each is a function of its block alone: which parts a tensor comes in touches no bit.

    Args:
        bases: matrices, or blocks of some of their columns; or runs of elements.
        flat: blocks are :data:`BLOCK_ELEMENTS` on end; else those of low-rank products.
    """
    of_each = []
    for base in bases:
        if flat:
            blocks = [base.reshape(-1)[some] for panel in element_panels(base.numel()) for some in panel]
        else:
            matrix = as_matrix(base)
            blocks = [matrix[at].contiguous() for panel in product_panels(*matrix.shape) for at in panel]
        of_each.append(torch.stack([torch.linalg.vector_norm(block, dtype=torch.float64) for block in blocks]))
    return torch.stack(of_each).square()


def row_grams(experts: Sequence[Sequence[Tensor]], m: int) -> Tensor:
    """Products of rows of the task vectors, L_i[r] (R_iᵀR_j) L_j[r]ᵀ: (L, P, m) float64, as :class:`RowGrams` has them.

    Args:
        experts: N sequences of L task vectors.
        m: rows of the tensors.
    """
    of_tensors = []
    for place in range(len(experts[0])):
        both = [expert[place].double() for expert in experts]
        lefts, rights = [one[:m] for one in both], [one[m:] for one in both]
        pairs = [
            ((lefts[i] @ (rights[i].mT @ rights[j])) * lefts[j]).sum(dim=1)
            for i in range(len(both))
            for j in range(i + 1)
        ]
        of_tensors.append(torch.stack(pairs))
    return torch.stack(of_tensors)


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


def singular_values(left: Tensor, right: Tensor) -> Tensor:
    """Of a product of k columns, (m, k) by (k, n): min(m, n, k) that fall, float64 on the CPU."""
    inner_left, inner_right = (torch.linalg.qr(side, mode="r").R for side in (left, right.mT))
    values: Tensor = torch.linalg.svdvals(inner_left @ inner_right.mT)
    return values


class Products(NamedTuple):
    """Σ_i scale_i · left_i right_i: (L, N, m, r), (L, N, r, n) and (N,); without a scale as they are."""

    left: Tensor
    right: Tensor
    scale: Tensor | None

    def scaled_left(self, dtype: torch.dtype) -> Tensor:
        """(L, N, m, r), of each its scale in it."""
        left = self.left.to(dtype)
        return left if self.scale is None else left * self.scale.to(left).view(-1, 1, 1)

    def rounded(self) -> Products:
        """In bfloat16, each scale in the left factor. Elements that lie side by side stay so."""
        left = self.left
        if self.scale is not None:
            left = torch.empty(left.mT.shape, dtype=torch.bfloat16, device=left.device).mT
            torch.mul(self.left, self.scale.to(self.left).view(-1, 1, 1), out=left)
        right = self.right
        if right.device.type != "cpu":  # padded there as kernels want rows, or they are copied once more
            right = empty_rows(right.shape[:-1], right.shape[-1], torch.bfloat16, right.device).copy_(right)
        return Products(left.to(torch.bfloat16), right.to(torch.bfloat16), None)

    def squares(self) -> Tensor:
        """(L, N, N) float64, of which each tensor's add up to its square."""
        products = inner_products(self.left, self.right, orthogonal=False)
        return products if self.scale is None else products * torch.outer(self.scale, self.scale).to(products)


def columns(
    experts: Sequence[Sequence[Tensor]],
    m: int,
    coefficients: Tensor,
    products: Products | None,
    dtype: torch.dtype,
    rows: slice | None = None,
    some: slice | None = None,
) -> tuple[Tensor, Tensor]:
    """Σ_j c_j τ_lj and truncated residuals as one product: (L, m, k) and (L, k, n), a column at least.

    Args:
        experts: N sequences of L task vectors.
        m: rows of the tensors.
        coefficients: (N,) c, or (L, m, N), one of each row.
        products: of the rows and columns that are wanted; ``None``: there are none.
        dtype: of the factors.
        rows, some: which rows and columns those are; ``None``: all.
    """
    changes, wanted, device = [stacked(expert) for expert in experts], rows or slice(0, m), experts[0][0].device
    if coefficients.ndim == 3:
        weights = [one.unsqueeze(2) for one in coefficients[:, wanted].to(device).unbind(2)]
    else:
        weights = coefficients.tolist()
    lefts = [change[:, wanted] * weight for change, weight in zip(changes, weights, strict=True)]
    rights = [change[:, m:][:, some or slice(None)].mT for change in changes]
    if products is not None:
        lefts += list(products.scaled_left(dtype).to(device).unbind(1))
        rights += list(products.right.to(device, dtype).unbind(1))
    if not sum(left.shape[2] for left in lefts):
        lefts.append(lefts[0].new_zeros(*lefts[0].shape[:2], 1))
        rights.append(rights[0].new_zeros(rights[0].shape[0], 1, rights[0].shape[2]))
    # Components side by side.
    return torch.cat(lefts, dim=2).to(dtype).mT.contiguous().mT, torch.cat(rights, dim=1).to(dtype)


def combine(
    operators: Operators, bases: Sequence[Tensor], left: Tensor, right: Tensor, outs: Sequence[Tensor]
) -> Tensor:
    """θ₀ + left · right into each out.

    Args:
        operators: who adds it to the base.
        bases: L tensors of one shape, or some rows and columns of one.
        left, right: (L, m, k) and (L, k, n).
        outs: L tensors as the bases.

    Returns:
        (L,) largest magnitudes.
    """
    # The base stands for an expert, which with a coefficient of 0 is not read.
    nothing, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return operators.combine(bases, [list(bases)], nothing, left.unsqueeze(1), right.unsqueeze(1), one, outs)
