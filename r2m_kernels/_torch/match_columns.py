"""Columns of a merged change brought to the specialists' mean length (README §6): ``scale="column"``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._stream.blocks import as_matrix, row_panels, task_vectors
from .._stream.tensors import compute_dtype
from ..update_scale import MOST
from .largest import largest_of, magnitude


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
        largest.append(_match(base, [expert[index] for expert in experts], change, counts, out))
    return torch.stack(largest)


def _match(base: Tensor, experts: Sequence[Tensor], merged: Tensor, counts: Tensor, out: Tensor) -> Tensor:
    dtype = compute_dtype([base, *experts])
    theta, thetas, change = as_matrix(base), [as_matrix(expert) for expert in experts], as_matrix(merged)
    blocks = [rows for panel in row_panels(*theta.shape) for rows in panel]
    specialists = torch.zeros(len(experts), theta.shape[1], dtype=torch.float64, device=base.device)
    reached = torch.zeros(theta.shape[1], dtype=torch.float64, device=base.device)
    for rows in blocks:
        specialists += task_vectors(theta, thetas, rows, dtype).square().sum(dim=1, dtype=torch.float64)
        change[rows] -= theta[rows].to(change.dtype)
        reached += change[rows].square().sum(dim=0, dtype=torch.float64)
    counts, tiny = counts.double().to(base.device, non_blocking=True), torch.finfo(torch.float64).tiny
    target = counts @ specialists.sqrt() / counts.sum().clamp_min(tiny)
    reached = reached.sqrt()
    factors = torch.where(reached > 0, target / reached.clamp_min(tiny), 1.0).clamp_max(MOST).to(change.dtype)
    matched, largest = as_matrix(out), []
    for rows in blocks:
        rounded = change[rows].mul_(factors).add_(theta[rows].to(change.dtype)).to(out.dtype)
        largest.append(magnitude(rounded))
        matched[rows] = rounded
    return largest_of(largest, base.device)
