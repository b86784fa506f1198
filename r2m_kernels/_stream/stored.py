"""Matrices that are worked on where they are stored: too large for the memory, read a block at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class StoredMatrix:
    """One input of a matrix; what is asked of it by rows and columns is read, and belongs to who asked.

    It has of a tensor what those need who take a matrix block by block.

    Attributes:
        shape: (m, n).
        dtype: as stored, and as blocks are.
        device: of the blocks.
        read: its blocks, by the slices of their rows and columns.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    read: Callable[[slice, slice], Tensor]

    def numel(self) -> int:
        """Elements of all of it."""
        return self.shape[0] * self.shape[1]

    def zeros(self) -> StoredMatrix:
        """One of zeros, like it."""

        def read(rows: slice, columns: slice) -> Tensor:
            size = rows.stop - rows.start, columns.stop - columns.start
            return torch.zeros(size, dtype=self.dtype, device=self.device)

        return replace(self, read=read)

    def __getitem__(self, where: tuple[slice, slice]) -> Tensor:
        rows, columns = (slice(*one.indices(size)) for one, size in zip(where, self.shape, strict=True))
        return self.read(rows, columns)


Matrix = Tensor | StoredMatrix
