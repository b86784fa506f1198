"""Residuals weighted row by row: Gram matrices of rows, and what they make of coefficients and factors (README §6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._interface import RowGrams
from .._stream import parallel
from .._stream.blocks import as_matrix, panel_limit, row_panels, task_vectors
from ..row_weights import row_shares

# Elements of a block of rows in float64: N of them and their products stay in a core's share of the cache.
BLOCK_ELEMENTS = 2**15
GPU_ELEMENTS = 2**23  # of a block on a GPU: a ViT-L's largest matrix in one


def row_grams(bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]]) -> RowGrams:
    """See :class:`r2m_kernels._interface.Operators`."""
    of_tensors = [_row_grams(base, [expert[index] for expert in experts]) for index, base in enumerate(bases)]
    rows, base = zip(*of_tensors, strict=True)
    return RowGrams(torch.stack(rows), torch.stack(base))


def _row_grams(base: Tensor, experts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    theta, thetas, count = as_matrix(base), [as_matrix(expert) for expert in experts], len(experts)
    (m, n), pairs = theta.shape, count * (count + 1) // 2
    result = torch.zeros(pairs, m, dtype=torch.float64, device=base.device)
    height = max(1, (BLOCK_ELEMENTS if base.device.type == "cpu" else GPU_ELEMENTS) // max(1, n))

    def of_panel(panel: list[slice]) -> Tensor:
        squares = torch.zeros(m, dtype=torch.float64, device=base.device)
        first, last = panel[0].start, min(panel[-1].stop, m)
        for start in range(first, last, height):
            rows = slice(start, min(start + height, last))
            tau = task_vectors(theta, thetas, rows, torch.float64)
            for i in range(count):
                pair = i * (i + 1) // 2
                torch.sum(tau[: i + 1] * tau[i], dim=2, out=result[pair : pair + i + 1, rows])
            squares[rows] = theta[rows].double().square().sum(dim=1)
        return squares

    squares = torch.zeros(m, dtype=torch.float64, device=base.device)
    if n:
        for of_rows in parallel.for_each(of_panel, row_panels(m, n), panel_limit(base.device)):
            squares += of_rows
    return result, squares.sum()


def sum_rows(rows: Tensor) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`: halves added to halves, whatever else is in the tensor."""
    size = rows.shape[-1]
    while size > 1:
        half = size // 2
        folded = rows[..., :half] + rows[..., size - half : size]
        rows = torch.cat([folded, rows[..., half : size - half]], dim=-1) if size % 2 else folded
        size -= half
    return rows[..., 0] if size else rows.sum(dim=-1)


def row_coefficients(
    rows: Tensor,
    core: Tensor,
    mixing: Tensor,
    weights: Tensor,
    scales: Tensor,
    eta: float,
    power: float,
    dtype: torch.dtype,
) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`. By element, so that a row's numbers are its own."""
    size, _, m = rows.shape
    count, device = len(core), rows.device
    core, mixing = (tensor.double().to(device, non_blocking=True) for tensor in (core, mixing))
    squares = torch.zeros(size, count, m, dtype=torch.float64, device=device)
    for i in range(count):
        for j in range(i + 1):
            product = (1.0 if i == j else 2.0) * mixing[i] * mixing[j]
            squares.addcmul_(product.view(1, count, 1), rows[:, i * (i + 1) // 2 + j].unsqueeze(1))
    shares = row_shares(squares.clamp_min_(0).sqrt_(), weights, scales, power)
    coefficients = core.view(1, 1, count).repeat(size, m, 1)
    for i in range(count):
        coefficients.addcmul_((eta * mixing[:, i]).view(1, 1, count), shares[:, i].unsqueeze(2))
    return coefficients.to(dtype)


def weigh_rows(
    left: Tensor,
    lengths: Tensor,
    weights: Tensor,
    scales: Tensor,
    power: float,
    factors: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`. By element, so that a row's numbers are its own."""
    weighed = left * row_shares(lengths, weights, scales, power).to(left.dtype).unsqueeze(-1)
    return weighed.mul_(factors.to(left).view(-1, 1, 1)).to(dtype)
