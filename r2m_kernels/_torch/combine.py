"""Step 5: the merged tensor in one read of each input and one write."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._stream import parallel
from .._stream.blocks import (
    as_column,
    as_matrix,
    column_slices,
    element_panels,
    panel_limit,
    product_panels,
    row_panels,
)
from .._stream.tensors import compute_dtype
from .largest import largest_of, magnitude, representable


def combine(
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    coefficients: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    scale: Tensor | None,
    outs: Sequence[Tensor],
    squares: list[Tensor] | None = None,
) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""
    largest = []
    of_blocks: list[Tensor] | None = None if squares is None else []
    for index, (base, out) in enumerate(zip(bases, outs, strict=True)):
        lefts, rights = (None if factor is None else factor[index] for factor in (left, right))
        core = coefficients[index] if coefficients.ndim == 3 else coefficients
        others = [expert[index] for expert in experts]
        largest.append(_combine(base, others, core, lefts, rights, scale, out, of_blocks))
    if squares is not None and of_blocks:
        squares.append(torch.stack(of_blocks))
    return torch.stack(largest)


def _combine(
    base: Tensor,
    experts: Sequence[Tensor],
    coefficients: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    scale: Tensor | None,
    out: Tensor,
    of_blocks: list[Tensor] | None,
) -> Tensor:
    dtype = compute_dtype([base, *experts])
    low_rank = None
    if left is not None and right is not None:
        low_rank = side_by_side(left, right, scale, dtype)
    by_rows = coefficients.ndim == 2
    # Tensors without a low-rank part have no rows to speak of: they are walked through as one column.
    view = as_matrix if low_rank or by_rows else as_column
    theta, thetas = view(base), [view(expert) for expert in experts]
    target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    merged = target.view(theta.shape)
    weights = [] if by_rows else representable(coefficients, dtype)
    of_rows = coefficients.to(base.device, dtype) if by_rows else None

    def merge_panel(panel: list[tuple[slice, slice]]) -> tuple[Tensor, list[Tensor]]:
        largest, squares = [], []
        for rows, columns in panel:
            block = theta[rows, columns].to(dtype)
            total = block.clone()
            for j, expert in enumerate(thetas):
                if of_rows is not None:
                    change = torch.sub(expert[rows, columns].to(dtype), block)
                    total.addcmul_(of_rows[rows, j].unsqueeze(1), change)
                elif weights[j] != 0.0:
                    total.add_(torch.sub(expert[rows, columns].to(dtype), block), alpha=weights[j])
            if low_rank:
                product = low_rank[0][rows] @ low_rank[1][:, columns]
                if of_blocks is not None:
                    squares.append(norm_square(product))
                total.add_(product)
            rounded = total.to(out.dtype)  # the one rounding to the storage dtype
            largest.append(magnitude(rounded))
            merged[rows, columns] = rounded
        return largest_of(largest, base.device), squares

    if low_rank:
        panels = product_panels(*theta.shape)
    else:
        runs = row_panels(*theta.shape) if by_rows else element_panels(theta.numel())
        panels = [[(rows, columns) for rows in panel for columns in column_slices(theta.shape[1])] for panel in runs]
    merged_panels = list(parallel.for_each(merge_panel, panels, panel_limit(base.device)))
    if low_rank and of_blocks is not None:
        of_blocks.append(torch.stack([square for _, some in merged_panels for square in some]))
    if target is not out:
        out.copy_(target)
    return largest_of((largest for largest, _ in merged_panels), base.device)


def norm_square(block: Tensor) -> Tensor:
    """‖block‖², a float64 number."""
    norm: Tensor = torch.linalg.vector_norm(block, dtype=torch.float64)
    return norm.square()


def side_by_side(left: Tensor, right: Tensor, scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Σ_i s_i L_i R_i as one product: (m, N·r), as truncations leave left factors, and (N·r, n)."""
    count, m, rank = left.shape
    if scale is None:
        scaled = left.to(dtype).mT.reshape(count * rank, m)
    else:
        scaled = torch.empty(count, rank, m, dtype=dtype, device=left.device)
        torch.mul(left.to(dtype).mT, scale.to(left.device, dtype).view(count, 1, 1), out=scaled)
        scaled = scaled.view(count * rank, m)
    return scaled.T, right.to(dtype).reshape(count * rank, right.shape[2])
