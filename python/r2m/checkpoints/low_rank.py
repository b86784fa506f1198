"""A stored weight and a product of low rank, as one tensor that is read whole or in pieces.

No piece needs the whole: factors are small, and their product is formed in tiles of a fixed grid, each by a product of
its own, so that it changes no bit how much is read at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from r2m.checkpoints.view import Added, LazyTensor
from r2m_kernels.streaming import TensorSpec

ROWS, COLUMNS = 128, 1024  # of a tile


@dataclass(frozen=True)
class Factors:
    """scale · left · right, as (m, n).

    Attributes:
        shape: m and n.
        rank: r.
        scale: of their product.
        dtype: of the wider one.
        left, right: read (m, r) and (r, n).
    """

    shape: tuple[int, int]
    rank: int
    scale: float
    dtype: torch.dtype
    left: Callable[[], Tensor]
    right: Callable[[], Tensor]

    @property
    def transposed(self) -> Factors:
        """(n, m)."""
        left, right = self.left, self.right
        return replace(self, shape=self.shape[::-1], left=lambda: right().T, right=lambda: left().T)

    def stacked(self, dtype: torch.dtype) -> Tensor:
        """(m + n, r): the left one with the scale in it, above the right one transposed."""
        wide = torch.promote_types(self.dtype, torch.float64)
        return torch.cat([self.left().to(wide) * self.scale, self.right().to(wide).T]).to(dtype)


def added(base: LazyTensor, factors: Factors, magnitudes: Callable[[], Tensor] | None, by_column: bool) -> LazyTensor:
    """The sum base + scale · left · right, in float32 or, where the base has it, float64.

    Args:
        base: of a shape that is (m, n) when all dimensions but the first are one.
        factors: of that size.
        magnitudes: read what the rows' lengths are instead (DoRA); ``None``: they stay as they are.
        by_column: those are the columns'.
    """
    whole = _Sum(base, factors, magnitudes, by_column)
    spec = TensorSpec(base.spec.shape, whole.stored)
    block = None if base.read_block is None else whole.read_block
    # With lengths of their own rows are changed by more than the product.
    change = Added(base, factors.rank, lambda: factors.stacked(whole.stored)) if magnitudes is None else None
    return LazyTensor(spec, whole.read, whole.read_elements, block, change)


class _Sum:
    def __init__(
        self, base: LazyTensor, factors: Factors, magnitudes: Callable[[], Tensor] | None, by_column: bool
    ) -> None:
        self.base, self.factors, self.magnitudes, self.by_column = base, factors, magnitudes, by_column
        self.stored = torch.promote_types(base.spec.dtype, torch.float32)
        self._wide = reduce(torch.promote_types, (self.stored, factors.dtype))
        self._lock = threading.Lock()
        self._ratios: Tensor | None = None

    def read(self) -> Tensor:
        m, n = self.factors.shape
        stored = self.base.read().reshape(m, n)
        return self._values(stored, slice(0, m), slice(0, n)).reshape(self.base.spec.shape)

    def read_elements(self, start: int, stop: int) -> Tensor:
        n = self.factors.shape[1]
        if start >= stop:
            return torch.empty(0, dtype=self.stored)
        first, last = start // n, -(-stop // n)
        skipped = start - first * n
        # The rows it lies in, with nothing for the base where that was not asked for.
        rows = torch.zeros((last - first) * n, dtype=self.base.spec.dtype)
        rows[skipped : skipped + stop - start] = self.base.read_elements(start, stop)
        values = self._values(rows.view(-1, n), slice(first, last), slice(0, n))
        return values.reshape(-1)[skipped : skipped + stop - start]

    def read_block(self, start: int, length: int, step: int, count: int) -> Tensor:
        n = self.factors.shape[1]
        row, column = divmod(start, n)
        if step != n or column + length > n:
            runs = range(start, start + step * count, step) if step else [start] * count
            return torch.stack([self.read_elements(one, one + length) for one in runs])
        assert self.base.read_block is not None
        stored = self.base.read_block(start, length, step, count)
        return self._values(stored, slice(row, row + count), slice(column, column + length))

    def _values(self, stored: Tensor, rows: slice, columns: slice) -> Tensor:
        """Of some rows and columns, whose elements of the base are given."""
        values = self._product_added(stored, rows, columns)
        if self.magnitudes is not None:
            ratios = self._lengthened()
            values *= ratios[columns] if self.by_column else ratios[rows, None]
        return values.to(self.stored)

    def _product_added(self, stored: Tensor, rows: slice, columns: slice) -> Tensor:
        values = stored.to(self._wide)  # whose memory nobody else has
        left, right = self.factors.left().to(self._wide), self.factors.right().to(self._wide)
        for top, high, down in _tiles(rows, ROWS):
            upper = left[top : top + ROWS].contiguous()
            for edge, wide, across in _tiles(columns, COLUMNS):
                tile = upper @ right[:, edge : edge + COLUMNS].contiguous()
                values[down, across] += tile[high, wide] * self.factors.scale
        return values

    def _lengthened(self) -> Tensor:
        """By what rows, or columns, are multiplied: the sum is gone through once for their lengths."""
        with self._lock:
            if self._ratios is None:
                assert self.magnitudes is not None
                lengths = self._squares().sqrt_()
                self._ratios = (self.magnitudes().reshape(-1).double() / lengths).to(self._wide)
            return self._ratios

    def _squares(self) -> Tensor:
        m, n = self.factors.shape
        squares = torch.zeros(n if self.by_column else m, dtype=torch.float64)
        for top in range(0, m, ROWS):
            rows = slice(top, min(top + ROWS, m))
            stored = self.base.read_elements(rows.start * n, rows.stop * n).view(-1, n)
            energies = self._product_added(stored, rows, slice(0, n)).double().square_()
            if self.by_column:
                squares += energies.sum(0)
            else:
                squares[rows] = energies.sum(1)
        return squares


def _tiles(part: slice, size: int) -> Iterator[tuple[int, slice, slice]]:
    """Tiles that a part of a dimension lies in: where each begins, what of it is in the part, and where in the part."""
    for start in range(part.start // size * size, part.stop, size):
        low, high = max(start, part.start), min(start + size, part.stop)
        yield start, slice(low - start, high - start), slice(low - part.start, high - part.start)
