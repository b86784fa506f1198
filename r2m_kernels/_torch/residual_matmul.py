"""Products with the residuals X_i, which are formed a block of rows at a time and never stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._stream import parallel
from .._stream.blocks import block_height, column_slices, row_panels, runs
from .._stream.stored import Matrix, StoredMatrix
from .._stream.tensors import compute_dtype
from .residuals import Residuals


def residual_matmul(
    bases: Sequence[Matrix],
    experts: Sequence[Sequence[Matrix]],
    mixing: Tensor,
    rhs: Tensor,
    transpose: bool = False,
    precision: str = "ieee",
    residuals: Callable[..., Residuals] = Residuals.of,
) -> Tensor:
    """``precision`` is accepted for all backends' sake: float32 products are IEEE here (``_parallel`` sees to it)."""
    products = []
    for base, others, block in zip(bases, zip(*experts, strict=True), rhs, strict=True):
        dtype = torch.promote_types(compute_dtype([base, *others]), block.dtype)
        multiply = _transposed if transpose else _plain
        products.append(multiply(residuals(base, others, mixing, dtype), block.to(base.device, dtype)))
    return products[0].unsqueeze(0) if len(products) == 1 else torch.stack(products)


def residual_matrices(
    base: Matrix, experts: Sequence[Matrix], mixing: Tensor, residuals: Callable[..., Residuals] = Residuals.of
) -> list[StoredMatrix]:
    """See :class:`r2m_kernels._interface.Operators`."""
    return residuals(base, experts, mixing).matrices()


def _plain(residuals: Residuals, rhs: Tensor) -> Tensor:
    (m, n), count = residuals.shape, residuals.count
    result = torch.zeros(count, m, rhs.shape[2], dtype=rhs.dtype, device=rhs.device)

    def multiply(panel: list[slice]) -> None:
        for columns in column_slices(n):
            for rows in panel:
                block = residuals.block(rows, columns)
                for i in range(count):
                    result[i, rows].addmm_(block[i], rhs[i, columns])

    for _ in parallel.for_each(multiply, row_panels(m, n), residuals.panels):
        pass
    return result


def _transposed(residuals: Residuals, rhs: Tensor) -> Tensor:
    (m, n), count = residuals.shape, residuals.count
    if m < n:
        return _long(residuals, rhs)

    def multiply(panel: list[slice]) -> tuple[Tensor]:
        partial = torch.zeros(count, n, rhs.shape[2], dtype=rhs.dtype, device=rhs.device)
        for columns in column_slices(n):
            for rows in panel:
                block = residuals.block(rows, columns)
                for i in range(count):
                    partial[i, columns].addmm_(block[i].T, rhs[i, rows])
        return (partial,)

    panels = row_panels(m, n)
    if not panels:
        return torch.zeros(count, n, rhs.shape[2], dtype=rhs.dtype, device=rhs.device)
    return parallel.ordered_sum(multiply, panels, residuals.panels)[0]


def _long(residuals: Residuals, rhs: Tensor) -> Tensor:
    """X_iᵀ · rhs_i of wide X_i: each run of the long side by itself, without sums of the result's size."""
    result = rhs.new_empty(residuals.count, residuals.shape[1], rhs.shape[2])

    def multiply(run: slice) -> None:
        for i, rows in enumerate(residuals.along(run, tall=False)):
            torch.mm(rows, rhs[i], out=result[i, run])

    m, n = residuals.shape
    for _ in parallel.for_each(multiply, runs(n, block_height(n, m)), residuals.panels):
        pass
    return result
