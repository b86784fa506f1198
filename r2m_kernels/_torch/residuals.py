"""The residuals of one tensor, X_i = Σ_j mixing[j, i] (θ_j − θ₀), formed a block at a time and never stored whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._stream import parallel
from .._stream.blocks import as_matrix, block_height, long_panels, panel_limit, task_vectors
from .._stream.stored import Matrix, StoredMatrix
from .._stream.tensors import compute_dtype


@dataclass(frozen=True)
class SignMatrix:
    """A sparse test matrix S of ``long`` rows with four entries ±1 each, cheap to multiply without a product.

    Row c holds ``signs[t, c]`` in column (c mod width + offsets[c // width, t]) mod width, t = 0 … 3: pieces of
    ``width`` rows are rotated as wholes, so that both SᵀA and A S are sums of contiguous runs. One entry a row would
    be fooled by few heavy rows; four at random rotations were not on any spectrum tried.

    Attributes:
        offsets: (⌈long / width⌉, 4) int32 in [0, width).
        signs: (4, long) of the compute dtype.
    """

    width: int
    offsets: Tensor
    signs: Tensor

    @staticmethod
    def random(key: int, long: int, width: int, dtype: torch.dtype) -> SignMatrix:
        """The matrix that belongs to a key, the same on every machine."""
        generator = torch.Generator().manual_seed(key)
        pieces = -(-long // width)
        offsets = torch.randint(0, width, (pieces, 4), generator=generator, dtype=torch.int32)
        signs = torch.randint(0, 2, (4, long), generator=generator, dtype=torch.int8)
        return SignMatrix(width, offsets, signs.to(dtype) * 2 - 1)

    def dense(self, run: slice) -> Tensor:
        """Its rows of a run, (len(run), width)."""
        row = torch.arange(run.start, run.stop)
        matrix = torch.zeros(len(row), self.width, dtype=self.signs.dtype)
        for t in range(4):
            column = (row % self.width + self.offsets[row // self.width, t]) % self.width
            matrix[row - run.start, column] += self.signs[t, row]
        return matrix


class Residuals:
    """The residuals of one tensor, seen as (m, n) matrices: all N, or the E that are chosen.

    Attributes:
        shape: (m, n).
        count: E.
        dtype: of the computation, float32 or float64; ``mixing``'s.
        fast_dtype: the dtype of operands of products that need no precision: it may be one that the machine multiplies
            faster.
        chosen: which ones, in their order; whoever else is there touches no bit.
        panels: at work at once; ``None``: as many as threads want.
    """

    def __init__(
        self,
        base: Matrix,
        experts: Sequence[Matrix],
        mixing: Tensor,
        chosen: Sequence[int] | None = None,
        panels: int | None = None,
    ) -> None:
        self.base: Matrix = as_matrix(base)
        self.experts: Sequence[Matrix] = [as_matrix(expert) for expert in experts]
        self.mixing, self.chosen = mixing, list(range(len(experts)) if chosen is None else chosen)
        self.shape = self.base.shape[0], self.base.shape[1]
        self.count, self.dtype, self.device = len(self.chosen), mixing.dtype, base.device
        self.panels = panel_limit(self.device) if panels is None else panels
        self.fast_dtype = self.dtype

    @classmethod
    def of(cls, base: Matrix, experts: Sequence[Matrix], mixing: Tensor, dtype: torch.dtype | None = None) -> Residuals:
        """With the mixing on the inputs' device and in ``dtype``, or else their compute dtype."""
        return cls(base, experts, mixing.to(base.device, dtype or compute_dtype([base, *experts])))

    def only(self, chosen: Sequence[int], panels: int | None = None) -> Residuals:
        """Some of the N."""
        return type(self)(self.base, self.experts, self.mixing, chosen, self.panels if panels is None else panels)

    def scaled(self, factors: Tensor) -> Residuals:
        """factors_i · X_i, an (E,) float64 tensor on the CPU."""
        of_all = torch.ones(len(self.experts), dtype=torch.float64)
        of_all[self.chosen] = factors
        mixing = (self.mixing.double().cpu() * of_all).to(self.mixing)
        return type(self)(self.base, self.experts, mixing, self.chosen, self.panels)

    def block(self, rows: slice, columns: slice, dtype: torch.dtype | None = None) -> Tensor:
        """X_i[rows, columns]: (E, …, …), in ``dtype`` or else the compute dtype."""
        if isinstance(self.base, StoredMatrix):
            formed = [self._formed(some, columns, dtype) for some in self.read_rows(rows, columns)]
            return formed[0] if len(formed) == 1 else torch.cat(formed, dim=1)
        return self._formed(rows, columns, dtype)

    def read_rows(self, rows: slice, columns: slice) -> list[slice]:
        """Rows of a block cut into what is read at once."""
        first, last, _ = rows.indices(self.shape[0])
        left, right, _ = columns.indices(self.shape[1])
        step = block_height(last - first, right - left)
        return [slice(start, min(start + step, last)) for start in range(first, last, step)]

    def _formed(self, rows: slice, columns: slice, dtype: torch.dtype | None) -> Tensor:
        theta, *thetas = (one[rows, columns] for one in (self.base, *self.experts))
        tau = task_vectors(theta, thetas, slice(None), self.dtype)
        block = torch.mm(self.mixing.T.contiguous(), tau.view(len(tau), -1)).view(tau.shape)
        if self.count < len(tau):
            block = block[self.chosen]
        return block if dtype is None else block.to(dtype)

    def sketch(self, signs: SignMatrix) -> tuple[Tensor, Tensor]:
        """SᵀA_i for A = X or Xᵀ, tall: (E, width, short side); and ‖X_i‖², (E,) float64 on the CPU."""
        m, n = self.shape
        tall = m >= n

        def of_panel(panel: list[slice]) -> tuple[Tensor, Tensor]:
            total = torch.zeros(self.count, signs.width, min(m, n), dtype=self.dtype, device=self.device)
            energy = torch.zeros(self.count, dtype=torch.float64, device=self.device)
            for run in panel:
                block = self.along(run, tall)
                total += torch.matmul(signs.dense(run).to(self.device).T, block)
                energy += torch.linalg.vector_norm(block, dim=(1, 2), dtype=torch.float64).square()
            return total, energy

        total, energy = parallel.ordered_sum(of_panel, long_panels(m, n), self.panels)
        return total, energy.cpu()

    def matrices(self) -> list[StoredMatrix]:
        """Each residual as a matrix of its own, formed where it is read."""

        def of_one(chosen: int) -> StoredMatrix:
            block = self.only([chosen]).block
            return StoredMatrix(self.shape, self.dtype, self.device, lambda rows, columns: block(rows, columns)[0])

        return [of_one(chosen) for chosen in self.chosen]

    def along(self, run: slice, tall: bool, dtype: torch.dtype | None = None) -> Tensor:
        """Rows of A = X (tall) or Xᵀ: (E, len(run), short side)."""
        if tall:
            return self.block(run, slice(None), dtype)
        return self.block(slice(None), run, dtype).mT
