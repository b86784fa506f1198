"""Low-rank factors of residuals, as plain data that steps and stores hand on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

# Rows of factors that are widened to float64 at once on a CPU. On a GPU, where every launch counts, all are.
PRODUCT_ROWS = 2**10
LENGTH_ROWS = 2**8  # the same of left factors whose rows are measured, beside products of all components
# How fast what a subspace misses shrinks, from the Ritz values at its edge and at the rank: their ratio to this power.
RATE = 4
# Of the last growth of the kept energy to the one before: a larger ratio says nothing about the limit.
SLOWEST = 0.95
SLOWER = 0.75
# Blocks of components whose inner products are taken at once, with those before them.
GRAM_BLOCKS = 4
WIDENED = 2**17  # elements of each factor that are widened for a sum
Side = Literal["left", "right"]


@dataclass(frozen=True)
class Factors:
    """Truncated residuals of one tensor, F_i = left_i right_i.

    Attributes:
        left: (N, m, r).
        right: (N, r, n).
        ordered: components come by descending singular value, so that the leading ones are a smaller truncation, and
            both sides are orthogonal.
        basis: the side that has orthonormal vectors; ``None``: neither.
        gap: (N,) float64, an estimate of the energy that the best truncation at this rank would keep beyond this one's;
            0 where this is the best one, NaN where nothing is known.
        method: who truncated: "exact", "textbook", or "shifted" for the backend's own.
    """

    left: Tensor
    right: Tensor
    ordered: bool = True
    basis: Side | None = None
    gap: Tensor | None = None
    method: str = "exact"

    def truncated(self, rank: int) -> Factors:
        """The leading ``rank`` components, by descending singular value."""
        if rank >= self.left.shape[2]:
            return self
        whole = self if self.ordered else self._in_order()
        return replace(whole, left=whole.left[:, :, :rank], right=whole.right[:, :rank], gap=None)

    def _in_order(self) -> Factors:
        """The same F_i; one side is orthonormal, and the other's Gram has the squared singular values."""
        weighted = self.right.transpose(1, 2) if self.basis == "left" else self.left
        rotation = leading_eigenvectors(gram_matrices(weighted).cpu(), weighted.shape[2]).to(weighted)
        left, right = torch.bmm(self.left, rotation), torch.bmm(rotation.transpose(1, 2), self.right)
        return replace(self, left=left, right=right, ordered=True)

    @property
    def orthogonal(self) -> bool:
        """Whether the vectors of one side are, to the compute dtype's rounding."""
        return self.ordered or self.basis is not None

    @property
    def orthogonal_rows(self) -> bool:
        """Whether the rows of each right factor are orthogonal."""
        return self.ordered or self.orthonormal_rows

    @property
    def orthonormal_rows(self) -> bool:
        """Whether they have length 1, too."""
        return self.basis == "right"

    def energies(self) -> Tensor:
        """‖F_i‖²: (N,) float64 on the CPU."""
        return energies(self.left.unsqueeze(0), self.right.unsqueeze(0), self.ordered, self.basis)[0].cpu()

    def inner_products(self) -> Tensor:
        """⟨F_i, F_j⟩: (N, N) float64 on the CPU."""
        return inner_products(self.left.unsqueeze(0), self.right.unsqueeze(0), self.orthogonal)[0].cpu()


@dataclass(frozen=True)
class GroupFactors:
    """Truncated residuals of L tensors of one shape, where they were made: nobody has waited for them.

    Attributes:
        left: (L, N, m, r).
        right: (L, N, r, n).
        basis, ordered, method: of :class:`Factors`.
        gap: (L, N), of :class:`Factors`.
        products: (L, N, N) float64, where they came with the factors.
        trusted: (L, N) bool, whether each can be relied on; ``None``: all.
        squares: (L, N) float64, ‖F_li‖², where they came with the factors.
    """

    left: Tensor
    right: Tensor
    basis: Side | None
    ordered: bool
    method: str
    gap: Tensor
    products: Tensor | None = None
    trusted: Tensor | None = None
    squares: Tensor | None = None

    def each(self) -> list[Factors]:
        """Every tensor's, without the numbers that are still on the device."""
        sides = zip(self.left.unbind(), self.right.unbind(), strict=True)
        return [Factors(left, right, self.ordered, self.basis, method=self.method) for left, right in sides]

    def some(self, places: Sequence[int]) -> GroupFactors:
        """Those of tensors at some places."""
        at = list(places)
        known = (self.products, self.trusted, self.squares)
        products, trusted, squares = (None if one is None else one[at] for one in known)
        left, right, gap = self.left[at], self.right[at], self.gap[at]
        return replace(self, left=left, right=right, gap=gap, products=products, trusted=trusted, squares=squares)

    def energies(self) -> Tensor:
        """‖F_li‖²: (L, N) float64."""
        if self.products is not None:
            return self.products.diagonal(dim1=1, dim2=2)
        if self.squares is not None:
            return self.squares
        return energies(self.left, self.right, self.ordered, self.basis)

    def inner_products(self) -> Tensor:
        """⟨F_li, F_lj⟩: (L, N, N) float64."""
        orthogonal = self.ordered or self.basis is not None
        return inner_products(self.left, self.right, orthogonal) if self.products is None else self.products


def in_bfloat16(left: Tensor, right: Tensor, scale: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether factors are rounded ones that are multiplied as they are, with sums in the compute dtype, float32."""
    return scale is None and left.dtype == right.dtype == torch.bfloat16 and dtype == torch.float32


def energies(left: Tensor, right: Tensor, ordered: bool, basis: Side | None) -> Tensor:
    """‖F_li‖² from the factors alone: (L, N) float64 where they are; beside a basis the other side's own."""
    if basis is None:
        return inner_products(left, right, orthogonal=ordered).diagonal(dim1=1, dim2=2)
    return row_squares(right if basis == "left" else left.mT).sum(dim=-1)


def row_squares(rows: Tensor) -> Tensor:
    """‖row‖² of (…, r, n): (…, r) float64; on a CPU of few rows at once, since they are widened."""
    step = max(1, WIDENED // max(1, rows.shape[-1])) if rows.device.type == "cpu" else max(1, rows.shape[-2])
    some = [rows[..., start : start + step, :] for start in range(0, rows.shape[-2], step)]
    return torch.cat([one.double().square().sum(dim=-1) for one in some], dim=-1)


def left_to_gain(before: Tensor, last: Tensor, kept: Tensor) -> Tensor:
    """What further steps would add to an energy that is kept, from those of the two before: a geometric series.

    What is left converges more slowly than what has converged: a power of the ratio that was measured.
    """
    former, growth = last - before, (kept - last).clamp_min(0)
    ratio = (growth / former.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(SLOWEST) ** SLOWER
    return growth * ratio / (1 - ratio)


def inner_products(left: Tensor, right: Tensor, orthogonal: bool) -> Tensor:
    """⟨F_li, F_lj⟩ from the factors alone: (L, N, N) float64 where they are.

    Args:
        left, right: (L, N, m, r) and (L, N, r, n).
        orthogonal: the vectors of one side are, to the compute dtype's rounding.
    """
    return product_of_sides(row_blocks(left), row_blocks(right.mT), orthogonal)


def row_lengths(left: Tensor, right: Tensor, orthogonal: bool, orthonormal: bool = False) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""
    if left.device.type != "cpu":
        return lengths_of_rows([left], [right], orthogonal)
    each = [
        lengths_of_rows(
            torch.split(left[place, i], LENGTH_ROWS), torch.split(right[place, i], PRODUCT_ROWS, dim=1), orthogonal
        )
        for place in range(left.shape[0])
        for i in range(left.shape[1])
    ]
    return torch.stack(each).view(left.shape[:3])


def lengths_of_rows(left: Iterable[Tensor], right: Iterable[Tensor], orthogonal: bool) -> Tensor:
    """:func:`row_lengths` of factors in blocks, (…, some rows, r) and (…, r, some columns): (…, m)."""
    squares: Tensor | None = None  # of components, or all their inner products
    for block in right:
        wide = _widened(block)
        found = wide.square_().sum(dim=-1) if orthogonal else _gram_of_rows(wide)
        squares = found if squares is None else squares.add_(found)
        del block, wide, found  # before the next one is read
    assert squares is not None, "a matrix has columns"
    lengths = []
    for block in left:
        wide = _widened(block.mT)  # as truncations leave them: turning them takes longer than the sums
        if orthogonal:
            of_rows = (squares.unsqueeze(-2) @ wide.square_()).squeeze(-2)
        else:
            of_rows = (squares @ wide).mul_(wide).sum(dim=-2)
        lengths.append(of_rows.clamp_min_(0).sqrt_())
    return torch.cat(lengths, dim=-1)


def _widened(block: Tensor) -> Tensor:
    """A float64 copy, elements of a row side by side whatever they were: the same sums then."""
    return block.to(torch.float64, memory_format=torch.contiguous_format, copy=True)


def _gram_of_rows(rows: Tensor) -> Tensor:
    """(…, k, k) of (…, k, n): on a CPU blocks on the diagonal and below are products, the others their copies."""
    count = rows.shape[-2]
    if rows.device.type != "cpu":
        return rows @ rows.mT
    gram = rows.new_empty(*rows.shape[:-2], count, count)
    edges = [count * place // GRAM_BLOCKS for place in range(GRAM_BLOCKS + 1)]
    for first, last in itertools.pairwise(edges):
        below = rows[..., first:last, :] @ rows[..., :last, :].mT
        gram[..., first:last, :last] = below
        gram[..., :first, first:last] = below[..., :first].mT
    return gram


def row_blocks(factor: Tensor) -> Iterator[Tensor]:
    """(L, N, length, r) cut along its length, as :func:`product_of_sides` takes it."""
    length = factor.shape[2]
    step = PRODUCT_ROWS if factor.device.type == "cpu" else length
    return (factor[:, :, start : start + step] for start in range(0, length, step))


def product_of_sides(left: Iterable[Tensor], right: Iterable[Tensor], orthogonal: bool) -> Tensor:
    """:func:`inner_products` of factors that come in blocks of rows, the right ones transposed."""
    (left_pairs, left_lengths), (right_pairs, right_lengths) = _cross(left, orthogonal), _cross(right, orthogonal)
    size, count, rank = left_lengths.shape
    products = left_lengths.new_empty(size, count, count)
    # In float64, since residuals may nearly cancel; one expert with all that follow, which is half of the pairs.
    # Where the vectors of one side are orthogonal, ‖F_i‖² is the squares of components' own lengths, and products of a
    # rounding with what the other side's have in common.
    first = 1 if orthogonal else 0
    if orthogonal:
        products.diagonal(dim1=1, dim2=2).copy_((left_lengths * right_lengths).square().sum(2))
    for i, (pairs, others) in enumerate(zip(left_pairs, right_pairs, strict=True)):
        pairs *= others
        sums = pairs.view(size, rank, count - i - first, rank).sum(dim=(1, 3))
        products[:, i, i + first :] = sums
        products[:, i + first :, i] = sums
    return products


def _cross(blocks: Iterable[Tensor], orthogonal: bool) -> tuple[list[Tensor], Tensor]:
    """Products of each expert's components with those of all that follow, and their own lengths if orthogonal."""
    pairs: list[Tensor] = []
    lengths: Tensor | None = None
    for block in blocks:
        side = block.mT
        own = (
            torch.linalg.vector_norm(side, dim=3, dtype=torch.float64) if orthogonal else side.new_empty(side.shape[:3])
        )
        columns = side.double()
        followers = enumerate(range(1 if orthogonal else 0, columns.shape[1]))
        products = [columns[:, i] @ columns[:, first:].flatten(1, 2).mT for i, first in followers]
        if lengths is None:
            pairs, lengths = products, own
        else:
            lengths = torch.hypot(lengths, own)
            for total, product in zip(pairs, products, strict=True):
                total += product
        del block, side, columns, products  # before the next one is read
    assert lengths is not None, "a matrix has rows"
    return pairs, lengths.double()


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Those of several tensors as one, to be read; without a copy where they are parts of one, evenly spaced."""
    first, *others = tensors
    if not others:
        return first.unsqueeze(0)
    memory, start = first.untyped_storage().data_ptr(), first.storage_offset()
    step = others[0].storage_offset() - start
    together = step >= 0 and all(
        one.untyped_storage().data_ptr() == memory
        and one.storage_offset() == start + place * step
        and (one.shape, one.stride(), one.dtype) == (first.shape, first.stride(), first.dtype)
        for place, one in enumerate(others, 1)
    )
    if together:
        return first.as_strided((len(tensors), *first.shape), (step, *first.stride()))
    return torch.stack(list(tensors))


def gram_matrices(product: Tensor) -> Tensor:
    """(…, k, k) float64 of (…, n, k)."""
    step = PRODUCT_ROWS if product.device.type == "cpu" else max(1, product.shape[-2])
    total = product.new_zeros(*product.shape[:-2], *product.shape[-1:] * 2, dtype=torch.float64)
    for rows in torch.split(product, step, dim=-2):
        wide = rows.double()
        total += wide.mT @ wide
    return total


def leading_eigenvectors(grams: Tensor, rank: int) -> Tensor:
    """(…, k, rank) of (…, k, k) on the CPU, where small eigenvalue problems are solved for every device.

    By descending eigenvalue, with signs fixed: the largest entry of a column is positive.
    """
    vectors: Tensor = torch.linalg.eigh((grams + grams.mT) / 2).eigenvectors.flip(-1)[..., :rank]
    largest = vectors.gather(-2, vectors.abs().argmax(dim=-2, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)
