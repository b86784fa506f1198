"""Products with the residuals X_i, which are formed a block of rows at a time and never stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from r2m_kernels import _parallel
from r2m_kernels._torch.blocks import as_matrix, compute_dtype, panel_limit, residual_blocks, row_panels


def residual_matmul(
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    mixing: Tensor,
    rhs: Tensor,
    transpose: bool = False,
    precision: str = "ieee",
) -> Tensor:
    """``precision`` is accepted for all backends' sake: float32 products are IEEE here (``_parallel`` sees to it)."""
    of_tensor = zip(bases, zip(*experts, strict=True), rhs, strict=True)
    return torch.stack([_residual_matmul(base, others, mixing, block, transpose) for base, others, block in of_tensor])


def _residual_matmul(base: Tensor, experts: Sequence[Tensor], mixing: Tensor, rhs: Tensor, transpose: bool) -> Tensor:
    dtype = torch.promote_types(compute_dtype([base, *experts]), rhs.dtype)
    matrix, matrices = as_matrix(base), [as_matrix(expert) for expert in experts]
    mixing, rhs = mixing.to(base.device, dtype), rhs.to(base.device, dtype)
    multiply = _transposed if transpose else _plain
    return multiply(matrix, matrices, mixing, rhs)


def _plain(base: Tensor, experts: Sequence[Tensor], mixing: Tensor, rhs: Tensor) -> Tensor:
    (m, n), (count, _, k) = base.shape, rhs.shape
    result = torch.zeros(count, m, k, dtype=rhs.dtype, device=base.device)

    def multiply(panel: list[slice]) -> None:
        for rows, columns, residual in residual_blocks(base, experts, mixing, panel):
            for i in range(count):
                result[i, rows].addmm_(residual[i], rhs[i, columns])

    for _ in _parallel.for_each(multiply, row_panels(m, n), panel_limit(base.device)):
        pass
    return result


def _transposed(base: Tensor, experts: Sequence[Tensor], mixing: Tensor, rhs: Tensor) -> Tensor:
    (m, n), (count, _, k) = base.shape, rhs.shape

    def multiply(panel: list[slice]) -> Tensor:
        partial = torch.zeros(count, n, k, dtype=rhs.dtype, device=base.device)
        for rows, columns, residual in residual_blocks(base, experts, mixing, panel):
            for i in range(count):
                partial[i, columns].addmm_(residual[i].T, rhs[i, rows])
        return partial

    result: Tensor | None = None
    for partial in _parallel.for_each(multiply, row_panels(m, n), panel_limit(base.device)):
        result = partial if result is None else result.add_(partial)
    return result if result is not None else torch.zeros(count, n, k, dtype=rhs.dtype, device=base.device)
