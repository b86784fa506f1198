"""TIES and DARE, means, sums and columns: element by element in ``csrc/``, a run at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._stream import parallel
from .._stream.blocks import as_matrix, element_panels, row_panels
from .._stream.tensors import compute_dtype
from ..update_scale import MOST
from .combine import COMBINE, over, weights_of
from .library import DOUBLE, LONG, POINTER, declare, flat, loaded, matrices, rows_of

COUNT_MAGNITUDES = declare("r2m_count_magnitudes", LONG, POINTER, LONG, LONG, POINTER, POINTER)
COMBINE_TIES = declare("r2m_combine_ties", LONG, POINTER, POINTER, POINTER, DOUBLE, LONG, LONG, POINTER, POINTER)
COMBINE_DARE = declare(
    "r2m_combine_dare", LONG, POINTER, POINTER, POINTER, DOUBLE, DOUBLE, LONG, LONG, LONG, POINTER, POINTER
)
MEAN = declare("r2m_mean", LONG, POINTER, POINTER, LONG, LONG, POINTER, POINTER)
COLUMN_SQUARES = declare("r2m_column_squares", LONG, POINTER, LONG, LONG, POINTER, POINTER)
SCALE_COLUMNS = declare("r2m_scale_columns", POINTER, POINTER, POINTER, LONG, LONG, POINTER, POINTER)
WEIGHTED_SUM = declare("r2m_weighted_sum", LONG, POINTER, POINTER, LONG, LONG, POINTER)


def count_magnitudes(
    bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], upper: Tensor | None, counts: Tensor
) -> None:
    """See :class:`r2m_kernels._interface.Operators`."""
    library, halves = loaded(), None if upper is None else upper.long().contiguous()
    for index, base in enumerate(bases):
        rows = [flat(tensor) for tensor in (base, *(expert[index] for expert in experts))]
        if base.numel():
            library.call(
                *(COUNT_MAGNITUDES, compute_dtype(rows), len(experts), matrices(rows), 0, base.numel()),
                *(None if halves is None else halves.data_ptr(), counts.data_ptr()),
            )


def combine_ties(
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    weights: Tensor,
    scale: float,
    thresholds: Tensor,
    outs: Sequence[Tensor],
) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""
    smallest = thresholds.float().contiguous()

    def rule(index: int) -> tuple[object, ...]:
        return smallest.data_ptr(), scale

    return _by_elements(COMBINE_TIES, bases, experts, weights, rule, outs)


def combine_dare(
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    weights: Tensor,
    scale: float,
    density: float,
    keys: Tensor,
    first: int,
    outs: Sequence[Tensor],
) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""
    keys = keys.contiguous()

    def rule(index: int) -> tuple[object, ...]:
        return keys[index].data_ptr(), scale, density, first

    return _by_elements(COMBINE_DARE, bases, experts, weights, rule, outs)


def _by_elements(
    name: str,
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    weights: Tensor,
    rule: Callable[[int], tuple[object, ...]],
    outs: Sequence[Tensor],
) -> Tensor:
    library = loaded()

    def of_tensor(index: int, base: Tensor, out: Tensor) -> Tensor:
        rows = [flat(tensor) for tensor in (base, *(expert[index] for expert in experts))]
        dtype = compute_dtype(rows)
        inputs, target, shares = matrices(rows), matrices([out.view(1, -1)]), weights_of(weights, dtype)

        def write(run: slice) -> float:
            where = (*rule(index), run.start, run.stop)
            return library.largest(name, dtype, len(experts), inputs, shares.data_ptr(), *where, target)

        return over(element_panels(base.numel()), write, out)

    return torch.stack([of_tensor(index, *pair) for index, pair in enumerate(zip(bases, outs, strict=True))])


def mean(experts: Sequence[Sequence[Tensor]], weights: Tensor, outs: Sequence[Tensor]) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""
    library, shares = loaded(), weights.double().contiguous()

    def of_tensor(index: int, out: Tensor) -> Tensor:
        rows = [flat(expert[index]) for expert in experts]
        inputs, target = matrices(rows), matrices([out.view(1, -1)])

        def write(run: slice) -> float:
            where = (run.start, run.stop)
            return library.largest(MEAN, torch.float64, len(rows), inputs, shares.data_ptr(), *where, target)

        return over(element_panels(out.numel()), write, out)

    return torch.stack([of_tensor(index, out) for index, out in enumerate(outs)])


def add(bases: Sequence[Tensor], changes: Tensor, outs: Sequence[Tensor]) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""
    return torch.stack([_added(*one) for one in zip(bases, changes, outs, strict=True)])


def _added(base: Tensor, change: Tensor, out: Tensor) -> Tensor:
    dtype, library = torch.promote_types(compute_dtype([base]), change.dtype), loaded()
    theta, added, merged = flat(base), flat(change.to(dtype)), out.view(1, -1)

    def write(run: slice) -> float:
        of_base, term, target = (matrices([tensor[:, run]]) for tensor in (theta, added, merged))
        return library.largest(COMBINE, dtype, 0, of_base, None, 0, 1, run.stop - run.start, term, target)

    return over(element_panels(base.numel()), write, out)


def weighted_sum(
    bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], coefficients: Tensor, dtype: torch.dtype
) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""
    library, factors = loaded(), weights_of(coefficients, dtype)
    sums = torch.empty(len(bases), *as_matrix(bases[0]).shape, dtype=dtype)
    for index, (base, out) in enumerate(zip(bases, sums, strict=True)):
        rows = [rows_of(as_matrix(tensor)) for tensor in (base, *(expert[index] for expert in experts))]

        def write(run: slice, rows: Sequence[Tensor] = rows, out: Tensor = out) -> None:
            inputs, target = matrices([tensor[run] for tensor in rows]), matrices([out[run]])
            size = run.stop - run.start, out.shape[1]
            library.call(WEIGHTED_SUM, dtype, len(experts), inputs, factors.data_ptr(), *size, target)

        runs = [run for panel in row_panels(*out.shape) for run in panel] if out.numel() else []
        for _ in parallel.for_each(write, runs):
            pass
    return sums


def match_columns(
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    merged: Sequence[Tensor],
    counts: Tensor,
    outs: Sequence[Tensor],
) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""
    largest = []
    for index, (base, change, out) in enumerate(zip(bases, merged, outs, strict=True)):
        largest.append(_matched(base, [expert[index] for expert in experts], change, counts.double(), out))
    return torch.stack(largest)


def _matched(base: Tensor, experts: Sequence[Tensor], merged: Tensor, counts: Tensor, out: Tensor) -> Tensor:
    library, dtype = loaded(), merged.dtype
    theta, *thetas = tensors = [rows_of(as_matrix(tensor)) for tensor in (base, *experts)]
    change, target = as_matrix(merged), as_matrix(out)
    (m, n), count = theta.shape, len(thetas)
    panels = row_panels(m, n) if base.numel() else []

    def squares_of(panel: list[slice]) -> Tensor:
        rows = slice(panel[0].start, panel[-1].stop)
        squares = torch.empty(count + 1, n, dtype=torch.float64)
        inputs, moved = matrices([tensor[rows] for tensor in tensors]), matrices([change[rows]])
        library.call(COLUMN_SQUARES, dtype, count, inputs, change[rows].shape[0], n, moved, squares.data_ptr())
        return squares

    total = torch.zeros(count + 1, n, dtype=torch.float64)
    for squares in parallel.for_each(squares_of, panels):
        total += squares
    lengths, tiny = total.sqrt(), torch.finfo(torch.float64).tiny
    wanted, reached = counts @ lengths[:-1] / counts.sum().clamp_min(tiny), lengths[-1]
    factors = torch.where(reached > 0, wanted / reached.clamp_min(tiny), 1.0).clamp_max(MOST).to(dtype)

    def write(rows: slice) -> float:
        of_base, moved, written = (matrices([tensor[rows]]) for tensor in (theta, change, target))
        size = change[rows].shape[0], n
        return library.largest(SCALE_COLUMNS, dtype, of_base, moved, factors.data_ptr(), *size, written)

    return over(panels, write, out)
