"""Rows of left factors weighed by their residuals' lengths (README §6)."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import DOUBLE, LONG, POINTER, declare, loaded, matrices, rows_of

WEIGH_ROWS = declare(
    *("r2m_weigh_rows", LONG, POINTER, LONG, LONG, POINTER, POINTER, DOUBLE, POINTER, LONG, POINTER, POINTER)
)


def weigh_rows(
    left: Tensor,
    lengths: Tensor,
    weights: Tensor,
    scales: Tensor,
    power: float,
    factors: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""
    library, rows = loaded(), left.mT
    numbers = [tensor.double().contiguous() for tensor in (weights, scales, factors)]
    out = torch.empty(rows.shape, dtype=dtype)
    for lefts, outs, known in zip(rows, out, lengths.contiguous(), strict=True):
        if outs.numel():
            given = [rows_of(one) for one in lefts]
            library.call(
                *(WEIGH_ROWS, left.dtype, len(given), known.data_ptr(), known.stride(0), known.shape[1]),
                *(*(one.data_ptr() for one in numbers[:2]), power, numbers[2].data_ptr()),
                *(outs.shape[1], matrices(given), matrices(list(outs))),
            )
    return out.mT
