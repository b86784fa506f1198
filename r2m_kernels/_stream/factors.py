"""Low-rank factors of residuals, as plain data that steps and stores hand on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# How fast what a subspace misses shrinks, from the Ritz values at its edge and at the rank: their ratio to this power.
RATE = 4


@dataclass(frozen=True)
class Factors:
    """Truncated residuals of one tensor, F_i = left_i right_i.

    Attributes:
        left: (N, m, r).
        right: (N, r, n).
        ordered: components come by descending singular value, so that the leading ones are a smaller truncation.
        products: (N, N) float64, ⟨F_i, F_j⟩, where they came with the factors.
        gap: (N,) float64, an estimate of the energy that the best truncation at this rank would keep beyond this one's;
            0 where this is the best one, NaN where nothing is known.
        method: who truncated: "exact", "textbook", or "shifted" for the backend's own.
    """

    left: Tensor
    right: Tensor
    ordered: bool = True
    products: Tensor | None = None
    gap: Tensor | None = None
    method: str = "exact"

    def truncated(self, rank: int) -> Factors:
        """The leading ``rank`` components, by descending singular value."""
        if rank >= self.left.shape[2]:
            return self
        whole = self if self.ordered else self._in_order()
        return Factors(whole.left[:, :, :rank], whole.right[:, :rank])

    def _in_order(self) -> Factors:
        """The same F_i; one side is orthonormal, and the other's Gram has the squared singular values."""
        tall = self.left.shape[1] >= self.right.shape[2]
        weighted = self.left if tall else self.right.transpose(1, 2)
        rotation = leading_eigenvectors([gram_matrix(block) for block in weighted], weighted.shape[2]).to(weighted)
        return Factors(torch.bmm(self.left, rotation), torch.bmm(rotation.transpose(1, 2), self.right))

    def inner_products(self) -> Tensor:
        """⟨F_i, F_j⟩ from the factors alone: (N, N) float64 on the CPU."""
        if self.products is not None:
            return self.products
        count, rank = len(self.left), self.left.shape[2]
        products = self.left.new_empty(count, count, dtype=torch.float64)
        left, right = self.left.mT.double(), self.right.double()
        # In float64, since residuals may nearly cancel; one expert with all that follow, which is half of the pairs.
        # Components that come by size are orthogonal on both sides to float32's rounding: of ‖F_i‖² that leaves the
        # squares of their own lengths, and products of two roundings.
        first = 1 if self.ordered else 0
        if self.ordered:
            products.diagonal().copy_((left.square().sum(2) * right.square().sum(2)).sum(1))
        for i in range(count - first):
            others = slice(i + first, count)
            pairs = (left[i] @ left[others].flatten(0, 1).T).mul_(right[i] @ right[others].flatten(0, 1).T)
            products[i, others] = products[others, i] = pairs.view(rank, count - i - first, rank).sum(dim=(0, 2))
        return products.cpu()


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Those of several tensors as one; of a single one without a copy."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def gram_matrix(product: Tensor) -> Tensor:
    """(k, k) float64 on the CPU, where small eigenvalue problems are solved for every device."""
    double = product.double()
    return (double.T @ double).cpu()


def leading_eigenvectors(grams: Sequence[Tensor], rank: int) -> Tensor:
    """(N, k, rank), by descending eigenvalue, with signs fixed (the largest entry of a column is positive)."""
    leading = []
    for gram in grams:
        vectors = torch.linalg.eigh((gram + gram.T) / 2).eigenvectors.flip(1)[:, :rank]
        largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
        leading.append(vectors * torch.where(largest < 0, -1.0, 1.0))
    return torch.stack(leading)
