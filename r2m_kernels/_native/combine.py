"""Step 5: the merged tensor in one read of each input and one write."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._stream import parallel
from .._stream.blocks import as_matrix, element_panels, row_panels
from .._stream.tensors import compute_dtype
from .._torch.combine import combine as portable
from .._torch.combine import side_by_side
from .._torch.largest import magnitudes
from .library import LONG, POINTER, declare, flat, loaded, matrices, rows_of

COMBINE = declare("r2m_combine", LONG, POINTER, POINTER, LONG, LONG, POINTER, POINTER)


def combine(
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    coefficients: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    scale: Tensor | None,
    outs: Sequence[Tensor],
) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`; coefficients of rows are the portable backend's."""
    if coefficients.ndim == 3:
        return portable(bases, experts, coefficients, left, right, scale, outs)
    for index, (base, out) in enumerate(zip(bases, outs, strict=True)):
        lefts, rights = (None if factor is None else factor[index] for factor in (left, right))
        _combine(base, [expert[index] for expert in experts], coefficients, lefts, rights, scale, out)
    return magnitudes(outs)


def _combine(
    base: Tensor,
    experts: Sequence[Tensor],
    core: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    scale: Tensor | None,
    out: Tensor,
) -> None:
    if base.numel() == 0:
        return
    library, dtype = loaded(), compute_dtype([base, *experts])
    read = [j for j, weight in enumerate(core.tolist()) if weight != 0.0]
    weights = core.cpu()[read].to(dtype)
    low_rank = None
    if left is not None and right is not None and scale is not None:
        low_rank = side_by_side(left, right, scale, dtype)
    # Tensors without a low-rank part have no rows to speak of: they are walked through as one.
    theta, *thetas = (
        rows_of(as_matrix(tensor)) if low_rank else flat(tensor) for tensor in (base, *(experts[j] for j in read))
    )
    target = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype)
    merged = target.view(theta.shape)

    def of_rows(rows: slice, columns: slice, term: Tensor | None) -> None:
        inputs = matrices([tensor[rows, columns] for tensor in (theta, *thetas)])
        added = None if term is None else matrices([term])
        view = merged[rows, columns]
        library.call(
            *(COMBINE, dtype, len(thetas), inputs, weights.data_ptr()),
            *(*view.shape, added, matrices([view])),
        )

    def of_panel(panel: list[slice]) -> None:
        for run in panel:
            if low_rank:
                of_rows(run, slice(None), low_rank[0][run] @ low_rank[1])
            else:
                of_rows(slice(None), run, None)

    panels = row_panels(*theta.shape) if low_rank else element_panels(theta.numel())
    for _ in parallel.for_each(of_panel, panels):
        pass
    if target is not out:
        out.copy_(target)
