"""Step 5 with whole residuals weighted by row, in one read of each input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._stream import parallel
from .._stream.blocks import as_matrix, panel_limit, row_panels, task_vectors
from .._stream.tensors import compute_dtype
from ..row_weights import row_shares

GPU_ELEMENTS = 2**23  # of a block on a GPU: a ViT-L's largest matrix in one


def combine_rows(
    base: Tensor,
    experts: Sequence[Tensor],
    core: Tensor,
    mixing: Tensor,
    weights: Tensor,
    scales: Tensor,
    eta: float,
    power: float,
    out: Tensor,
) -> None:
    """See :class:`r2m_kernels._interface.Operators`."""
    dtype = compute_dtype([base, *experts])
    theta, thetas, merged = as_matrix(base), [as_matrix(expert) for expert in experts], as_matrix(out)
    core, mixing = core.to(base.device), mixing.to(base.device)

    def merge_panel(panel: list[slice]) -> None:
        for rows in panel:
            tau = task_vectors(theta, thetas, rows, dtype)
            residuals = (mixing.T.to(dtype) @ tau.flatten(1)).view_as(tau)
            # Sums in float64: shares are powers of these lengths.
            lengths = torch.linalg.vector_norm(residuals, dim=2, dtype=torch.float64)
            shares = row_shares(lengths, weights, scales, power)
            coefficients = (core.unsqueeze(1) + eta * (mixing @ shares)).to(dtype)
            total = theta[rows].to(dtype, copy=True)
            for coefficient, change in zip(coefficients, tau, strict=True):
                total.addcmul_(coefficient.unsqueeze(1), change)
            merged[rows] = total

    for _ in parallel.for_each(merge_panel, _panels(theta), panel_limit(base.device)):
        pass


def _panels(theta: Tensor) -> list[list[slice]]:
    """Blocks of rows: a CPU's cache holds one, a GPU's launches are worth one."""
    if theta.device.type == "cpu":
        return row_panels(*theta.shape)
    height = max(1, GPU_ELEMENTS // theta.shape[1])
    return [[slice(start, start + height)] for start in range(0, theta.shape[0], height)]
