"""Step 5: the merged tensor in one read of each input and one write, and how large it gets."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .._stream import parallel
from .._stream.blocks import as_matrix, element_panels, product_panels, row_panels
from .._stream.factors import in_bfloat16
from .._stream.tensors import compute_dtype
from .._torch.combine import norm_square, side_by_side
from .library import LONG, POINTER, declare, flat, loaded, matrices, rows_of

COMBINE = declare("r2m_combine", LONG, POINTER, POINTER, LONG, LONG, LONG, POINTER, POINTER, POINTER)
MULTIPLY = declare("r2m_multiply_bfloat16", LONG, POINTER, POINTER, LONG, LONG, POINTER)
T = TypeVar("T")


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
        chosen = coefficients[index] if coefficients.ndim == 3 else coefficients
        others = [expert[index] for expert in experts]
        largest.append(_combine(base, others, chosen, lefts, rights, scale, out, of_blocks))
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
    if base.numel() == 0:
        return torch.zeros((), dtype=torch.float64)
    library, dtype = loaded(), compute_dtype([base, *experts])
    low_rank = None
    if left is not None and right is not None:
        fast = library.multiplies_bfloat16 and in_bfloat16(left, right, scale, dtype)
        low_rank = side_by_side(left, right, scale, torch.bfloat16 if fast else dtype)
    by_rows = coefficients.ndim == 2
    read = list(range(len(experts))) if by_rows else [j for j, one in enumerate(coefficients.tolist()) if one != 0.0]
    weights = weights_of(coefficients if by_rows else coefficients[read], dtype)
    # Tensors without a low-rank part and rows of their own are walked through as one.
    rowwise = by_rows or low_rank is not None
    chosen = [base, *(experts[j] for j in read)]
    theta, *thetas = (rows_of(as_matrix(tensor)) if rowwise else flat(tensor) for tensor in chosen)
    target = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype)
    merged = target.view(theta.shape)

    def of_rows(rows: slice, columns: slice, term: Tensor | None) -> float:
        inputs = matrices([tensor[rows, columns] for tensor in (theta, *thetas)])
        added = None if term is None else matrices([term])
        view = merged[rows, columns]
        factors, stride = (weights[rows], weights.shape[1]) if by_rows else (weights, 0)
        where = (factors.data_ptr(), stride, *view.shape)
        return library.largest(COMBINE, dtype, len(thetas), inputs, *where, added, matrices([view]))

    largest: Tensor
    if low_rank is not None:
        panels, (left_rows, right_rows) = product_panels(*theta.shape), low_rank
        squares: list[Tensor] = []  # in any order: who asks for them adds them up exactly

        def of_block(block: tuple[slice, slice]) -> float:
            product = _product(left_rows[block[0]], right_rows[:, block[1]])
            if of_blocks is not None:
                squares.append(norm_square(product))
            return of_rows(*block, product)

        largest = over(panels, of_block, out)
        if of_blocks is not None:
            of_blocks.append(torch.stack(squares))
    elif by_rows:
        largest = over(row_panels(*theta.shape), lambda rows: of_rows(rows, slice(None), None), out)
    else:
        largest = over(element_panels(theta.numel()), lambda run: of_rows(slice(None), run, None), out)
    if target is not out:
        out.copy_(target)
    return largest


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Of an (m, k) view of (k, m) memory and (k, n)."""
    if left.dtype != torch.bfloat16:
        return left @ right
    product = torch.empty(left.shape[0], right.shape[1])
    terms = matrices([left.T, right, product])
    where = (len(right), *(ctypes.byref(one) for one in terms[:2]), *product.shape, ctypes.byref(terms[2]))
    loaded().call(MULTIPLY, torch.float32, *where)
    return product


def over(panels: Iterable[list[T]], write: Callable[[T], float], out: Tensor) -> Tensor:
    """``write`` every run of the panels; the largest magnitude of all, rounded as ``out`` is, NaN if one is."""
    found = [one for panel in parallel.for_each(lambda panel: [write(run) for run in panel], panels) for one in panel]
    largest = math.nan if any(map(math.isnan, found)) else max(found, default=0.0)
    return torch.tensor(largest, dtype=torch.float64).to(out.dtype).double()


def weights_of(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous coefficients in a compute type, those beyond it as its largest number: an overflow is to show."""
    largest = torch.finfo(dtype).max
    return numbers.cpu().double().clamp(-largest, largest).to(dtype).contiguous()
