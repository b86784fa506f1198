"""How far a merged change reaches, against the specialists' own changes (README §6): ``scale``, restored cores.

The mean of task vectors that are nearly orthogonal is much shorter than each of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._torch.blocks import as_matrix, compute_dtype, row_panels, task_vectors

# A change is lengthened at most so much: specialists that cancel leave little but rounding to lengthen.
MOST = 4.0


def gain(gram: Tensor, weights: Tensor) -> float:
    """(Σ w_j ‖τ_j‖ / ‖mean τ‖)^½ of one tensor or of all, at most ``MOST``; 1 where nothing changed.

    Args:
        gram: (N, N) of the task vectors.
        weights: (N,) w.
    """
    lengths = float(weights @ gram.diag().clamp_min(0).sqrt())
    mean = float((weights @ gram @ weights).clamp_min(0).sqrt())
    if lengths == 0:
        return 1.0
    return float((lengths / max(mean, lengths / MOST**2)) ** 0.5)


def match_columns(base: Tensor, experts: Sequence[Tensor], merged: Tensor, core: Tensor, out: Tensor) -> None:
    """Every column of the merged change scaled to the specialists' mean length there, which counts |c_j| of each.

    Args:
        base, experts: θ₀ and N θ_j of one shape (m, …); columns are indices of all dimensions but the first.
        merged: θ* in float32 or float64, contiguous; overwritten.
        core: (N,) c.
        out: where to write, contiguous. A factor is at most ``MOST``; a column of zeros stays.
    """
    dtype = compute_dtype([base, *experts])
    theta, thetas, change = as_matrix(base), [as_matrix(expert) for expert in experts], as_matrix(merged)
    blocks = [rows for panel in row_panels(*theta.shape) for rows in panel]
    own = torch.zeros(len(experts), theta.shape[1], dtype=torch.float64, device=base.device)
    found = torch.zeros(theta.shape[1], dtype=torch.float64, device=base.device)
    for rows in blocks:
        own += task_vectors(theta, thetas, rows, dtype).square().sum(dim=1, dtype=torch.float64)
        change[rows] -= theta[rows].to(change.dtype)
        found += change[rows].square().sum(dim=0, dtype=torch.float64)
    counts = core.abs().to(base.device)
    wanted = counts @ own.sqrt() / counts.sum().clamp_min(torch.finfo(torch.float64).tiny)
    reached = found.sqrt()
    factors = torch.where(reached > 0, wanted / reached.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
    factors = factors.clamp_max(MOST).to(change.dtype)
    target = as_matrix(out)
    for rows in blocks:
        target[rows] = change[rows].mul_(factors).add_(theta[rows].to(change.dtype))
