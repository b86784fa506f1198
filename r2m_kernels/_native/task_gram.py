"""Step 1: the Gram matrices of the task vectors, of tensors and of rows, in one read of all inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._interface import Grams, RowGrams
from .._stream import parallel
from .._stream.blocks import as_matrix, row_panels
from .._stream.tensors import compute_dtype
from .library import DOUBLE, LONG, POINTER, declare, flat, loaded, matrices, rows_of

TASK_GRAM = declare("r2m_task_gram", LONG, POINTER, LONG, LONG, POINTER, POINTER)
ROW_GRAMS = declare("r2m_row_grams", LONG, POINTER, LONG, LONG, POINTER, LONG, POINTER)
ROW_COEFFICIENTS = declare(
    *("r2m_row_coefficients", LONG, POINTER, LONG, LONG, POINTER, POINTER, POINTER, POINTER, DOUBLE, DOUBLE, POINTER)
)
# Elements of one call; panels are summed in order.
PANEL = 2**20


def gram_panel_elements(precise: bool) -> int:
    """Elements of the panels that a Gram is summed from."""
    return PANEL


def task_gram(bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], precise: bool = False) -> Grams:
    """``precise``: differences and sums in float64."""
    of_tensors = [_gram(base, [expert[index] for expert in experts], precise) for index, base in enumerate(bases)]
    tasks, base = zip(*of_tensors, strict=True)
    return Grams(torch.stack(tasks), torch.stack(base))


def _gram(base: Tensor, experts: Sequence[Tensor], precise: bool) -> tuple[Tensor, Tensor]:
    count, elements = len(experts), base.numel()
    total = torch.zeros(count * count + 1, dtype=torch.float64)  # the Gram matrix, and ‖θ₀‖²
    if elements:
        library = loaded()
        rows = [flat(tensor) for tensor in (base, *experts)]
        dtype = torch.float64 if precise else compute_dtype(rows)
        inputs = matrices(rows)

        def of_panel(first: int) -> Tensor:
            sums = torch.empty(count * count + 1, dtype=torch.float64)
            last = min(first + PANEL, elements)
            library.call(TASK_GRAM, dtype, count, inputs, first, last, sums.data_ptr(), sums[-1:].data_ptr())
            return sums

        for sums in parallel.for_each(of_panel, range(0, elements, PANEL)):
            total += sums
    return total[:-1].view(count, count), total[-1]


def row_grams(bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]]) -> RowGrams:
    """Differences and products in float64: lengths of residuals that nearly cancel need the digits."""
    of_tensors = [_row_grams(base, [expert[index] for expert in experts]) for index, base in enumerate(bases)]
    rows, base = zip(*of_tensors, strict=True)
    return RowGrams(torch.stack(rows), torch.stack(base))


def _row_grams(base: Tensor, experts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    library, count = loaded(), len(experts)
    tensors = [rows_of(as_matrix(tensor)) for tensor in (base, *experts)]
    m, n = tensors[0].shape
    result = torch.zeros(count * (count + 1) // 2, m, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    if m == 0 or n == 0:
        return result, total

    def of_panel(panel: list[slice]) -> Tensor:
        rows = slice(panel[0].start, panel[-1].stop)
        inputs, grams = matrices([tensor[rows] for tensor in tensors]), result[:, rows]
        squares = torch.zeros((), dtype=torch.float64)
        library.call(
            *(ROW_GRAMS, torch.float64, count, inputs, grams.shape[1], n),
            *(grams.data_ptr(), result.stride(0), squares.data_ptr()),
        )
        return squares

    for squares in parallel.for_each(of_panel, row_panels(m, n)):
        total += squares
    return result, total


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
    """See :class:`r2m_kernels._interface.Operators`."""
    library, rows = loaded(), rows if rows.stride(-1) == 1 else rows.contiguous()
    size, _, m = rows.shape
    numbers = [tensor.double().contiguous() for tensor in (core, mixing, weights, scales)]
    out = torch.empty(size, m, len(core), dtype=dtype)
    for grams, coefficients in zip(rows, out, strict=True):
        if m:
            library.call(
                *(ROW_COEFFICIENTS, dtype, len(core), grams.data_ptr(), grams.stride(0), m),
                *(*(one.data_ptr() for one in numbers), eta, power, coefficients.data_ptr()),
            )
    return out
