"""The residuals of one tensor, X_i = Σ_j mixing[j, i] (θ_j − θ₀), formed a block at a time and never stored whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._stream import parallel
from .._stream.blocks import as_matrix, long_panels, panel_limit, task_vectors
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

    def dense(self) -> Tensor:
        """(long, width)."""
        long = self.signs.shape[1]
        row = torch.arange(long)
        matrix = torch.zeros(long, self.width, dtype=self.signs.dtype)
        for t in range(4):
            column = (row % self.width + self.offsets[row // self.width, t]) % self.width
            matrix[row, column] += self.signs[t]
        return matrix


class Residuals:
    """The N residuals of one tensor, seen as (m, n) matrices.

    Attributes:
        shape: (m, n).
        count: N.
        dtype: of the computation, float32 or float64; ``mixing``'s.
        fast_dtype: the dtype of operands of products that need no precision: it may be one that the machine multiplies
            faster.
    """

    def __init__(self, base: Tensor, experts: Sequence[Tensor], mixing: Tensor) -> None:
        self.base, self.experts = as_matrix(base), [as_matrix(expert) for expert in experts]
        self.mixing = mixing
        self.shape = self.base.shape[0], self.base.shape[1]
        self.count, self.dtype, self.device = len(experts), mixing.dtype, base.device
        self.fast_dtype = self.dtype

    @classmethod
    def of(cls, base: Tensor, experts: Sequence[Tensor], mixing: Tensor, dtype: torch.dtype | None = None) -> Residuals:
        """With the mixing on the inputs' device and in ``dtype``, or else their compute dtype."""
        return cls(base, experts, mixing.to(base.device, dtype or compute_dtype([base, *experts])))

    def scaled(self, factors: Tensor) -> Residuals:
        """factors_i · X_i, a (N,) float64 tensor on the CPU."""
        mixing = (self.mixing.double().cpu() * factors).to(self.mixing)
        return type(self)(self.base, self.experts, mixing)

    def block(self, rows: slice, columns: slice, dtype: torch.dtype | None = None) -> Tensor:
        """X_i[rows, columns] of all experts: (N, …, …), in ``dtype`` or else the compute dtype."""
        theta, thetas = self.base[:, columns], [expert[:, columns] for expert in self.experts]
        tau = task_vectors(theta, thetas, rows, self.dtype)
        block = torch.mm(self.mixing.T.contiguous(), tau.view(self.count, -1)).view(tau.shape)
        return block if dtype is None else block.to(dtype)

    def sketch(self, signs: SignMatrix) -> tuple[Tensor, Tensor]:
        """SᵀA_i for A = X or Xᵀ, tall: (N, width, short side); and ‖X_i‖², (N,) float64 on the CPU."""
        (m, n), dense = self.shape, signs.dense().to(self.device)
        tall = m >= n

        def of_panel(panel: list[slice]) -> tuple[Tensor, Tensor]:
            total = torch.zeros(self.count, signs.width, min(m, n), dtype=self.dtype, device=self.device)
            energy = torch.zeros(self.count, dtype=torch.float64, device=self.device)
            for run in panel:
                block = self.along(run, tall)
                total += torch.matmul(dense[run].T, block)
                energy += torch.linalg.vector_norm(block, dim=(1, 2), dtype=torch.float64).square()
            return total, energy

        total, energy = parallel.ordered_sum(of_panel, long_panels(m, n), panel_limit(self.device))
        return total, energy.cpu()

    def along(self, run: slice, tall: bool, dtype: torch.dtype | None = None) -> Tensor:
        """Rows of A = X (tall) or Xᵀ of all experts: (N, len(run), short side)."""
        if tall:
            return self.block(run, slice(None), dtype)
        return self.block(slice(None), run, dtype).mT
