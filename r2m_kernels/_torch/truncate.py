"""Step 3 for CPUs and plain PyTorch: one shifted step of subspace iteration from a sparse sketch (README §4).

On A = X or Xᵀ, tall, with blocks of b rows on the short side, so that products stream through A:

1. B = SᵀA, S sparse signs; V = the left-rotated B with orthonormal rows, by descending singular value of B;
2. V ← orth(V AᵀA − a V), both products in one pass over A, the shift a below the mean energy of what V leaves out;
3. Y = V Aᵀ, and the leading eigenvectors of YYᵀ: F = (Yᵀ Z)(Zᵀ V) without an SVD.

The textbook's method multiplies six times for the same error, this one three times and with fewer columns; of the
three, two only turn the subspace, and may have operands in bfloat16 where the CPU multiplies those faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._interface import Effort, ShiftedFactors
from .._stream import parallel
from .._stream.blocks import long_panels, panel_limit
from .._stream.factors import RATE, stacked
from .residuals import Residuals, SignMatrix

# Of the mean energy of the complement; directions there are damped as long as the shift is below their largest energy.
SHIFT = 0.8
# Rows of a block for each component kept, and the multiple it is rounded up to (BLAS runs better there).
WIDTH_RATIO = 1.4
WIDTH_MULTIPLE = 8
# Ratio of the smallest to the largest eigenvalue of the sketch's Gram: below it the spectrum is too steep for a step,
# which squares it, in float32 (k^-1 at rank 100: 2e-5) or float64.
STEEP = {torch.float32: 2.0**-18, torch.float64: 2.0**-40}
# Where the block holds all of A, its smaller Ritz values are rounding: what is cut off has less than this share.
NOTHING_LOST = {torch.float32: 1e-12, torch.float64: 1e-26}


def truncation_width(rank: int, oversampling: int) -> int:
    """Rows of a block, b."""
    return -(-int(WIDTH_RATIO * rank + oversampling) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def shifted_truncation(
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    mixing: Tensor,
    keys: Tensor,
    energies: Tensor,
    rank: int,
    effort: Effort,
    residuals: Callable[..., Residuals] = Residuals.of,
) -> ShiftedFactors:
    """See :class:`r2m_kernels._interface.ShiftedTruncation`; ``energies`` are measured here, more precisely.

    ``residuals`` makes a tensor's: another backend's may form blocks and sketches faster.
    """
    of_tensors = []
    for index, key in enumerate(keys.tolist()):
        of_tensor = residuals(bases[index], [expert[index] for expert in experts], mixing)
        steps, width = -(-effort.iterations // 2), truncation_width(rank, effort.oversampling)
        of_tensors.append(_truncate(of_tensor, key, rank, steps, width, effort.tolerance))
    left, right, trusted, gap = (stacked(each) for each in zip(*of_tensors, strict=True))
    return ShiftedFactors(left, right, None, trusted, gap)


def _truncate(
    residuals: Residuals, key: int, rank: int, steps: int, width: int, tolerance: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, n = residuals.shape
    tall, short = m >= n, min(m, n)
    sketch, energy = residuals.sketch(SignMatrix.random(key, max(m, n), width, residuals.dtype))
    norms = energy.sqrt()
    usable = torch.isfinite(norms) & (norms > 0)
    # Scaled to norm 1: a step squares the residual, and squares of large and small ones do not fit.
    inverse = torch.where(usable, norms, torch.inf).reciprocal()
    unit = residuals.scaled(inverse)
    basis, steep = _descending(sketch * inverse.to(sketch).view(-1, 1, 1))
    kept: list[Tensor] = []
    for _ in range(0 if bool(steep.all()) else steps):
        product, energies = _there_and_back(unit, basis, tall)
        kept.append(energies.sum(dim=1))
        # Not above any energy that the block holds, either: that would damp what is wanted.
        outside = (usable.double() - kept[-1]).clamp_min(0) / max(1, short - width)
        shift = torch.minimum(SHIFT * outside, energies.amin(dim=1)).to(basis)
        basis = torch.stack([_orthonormal(w - a * v) for w, a, v in zip(product, shift, basis, strict=True)])
        if tolerance is not None and len(kept) > 1 and bool((kept[-1] - kept[-2] <= tolerance * kept[-1]).all()):
            break
    for i in steep.nonzero().flatten().tolist():
        basis[i] = _orthonormal(sketch[i])
    rows = _times(unit, basis, tall)
    left = torch.empty(len(rows), rank, rows.shape[2], dtype=rows.dtype, device=rows.device)
    right = torch.empty(len(rows), rank, short, dtype=rows.dtype, device=rows.device)
    gap = torch.full((len(rows),), torch.nan, dtype=torch.float64)
    trusted = torch.isfinite(norms)
    for i, (y, v) in enumerate(zip(rows, basis, strict=True)):
        values, vectors = _by_size(y.double() if steep[i] else y)
        rotation = vectors[:, :rank].T.to(y)
        torch.mm(rotation * norms[i].to(rotation), y, out=left[i])
        torch.mm(rotation, v, out=right[i])
        if steep[i]:
            trusted[i] &= bool(values[rank:].sum() <= NOTHING_LOST[residuals.dtype] * values.sum())
            gap[i] = 0.0
        elif kept:
            growth = (values.sum() - kept[-1][i]).clamp_min(0)
            gap[i] = growth * (values[-1] / values[rank - 1]) ** RATE if values[rank - 1] > 0 else 0.0
    left, right = (left.mT, right) if tall else (right.mT, left)
    return left, right, trusted, gap * energy


def _times(residuals: Residuals, basis: Tensor, tall: bool) -> Tensor:
    """V_i A_iᵀ, (N, b, long side)."""
    rows = torch.empty(*basis.shape[:2], max(residuals.shape), dtype=basis.dtype, device=basis.device)

    def multiply(panel: list[slice]) -> None:
        for run in panel:
            for v, a, out in zip(basis, residuals.along(run, tall), rows, strict=True):
                torch.mm(v, a.T, out=out[:, run])

    for _ in parallel.for_each(multiply, long_panels(*residuals.shape), panel_limit(residuals.device)):
        pass
    return rows


def _there_and_back(residuals: Residuals, basis: Tensor, tall: bool) -> tuple[Tensor, Tensor]:
    """V_i A_iᵀA_i, (N, b, short side), and ‖A_i v‖² of every row v, (N, b) float64 on the CPU; A is read once."""
    fast = basis.to(residuals.fast_dtype)

    def of_panel(panel: list[slice]) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(basis)
        energies = torch.zeros(basis.shape[:2], dtype=torch.float64, device=basis.device)
        for run in panel:
            for i, a in enumerate(residuals.along(run, tall, residuals.fast_dtype)):
                y = fast[i] @ a.T
                energies[i] += y.to(basis.dtype).square().sum(dim=1)
                if y.dtype == total.dtype:
                    total[i].addmm_(y, a)
                else:
                    total[i] += y @ a
        return total, energies

    total, energies = parallel.ordered_sum(of_panel, long_panels(*residuals.shape), panel_limit(basis.device))
    return total, energies.cpu()


def _descending(sketch: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows for each (b, short) block by descending singular value, and whether they fall too steeply.

    Rows of one size each make W = V AᵀA a matrix whose rows differ in size and not within: rounding its operands, or
    itself, to fewer bits then costs a row digits of its own, and not the small rows all of theirs.
    """
    basis, steep = torch.empty_like(sketch), torch.zeros(len(sketch), dtype=torch.bool)
    for i, block in enumerate(sketch):
        values, vectors = _by_size(block)
        steep[i] = not bool(values[-1] > STEEP[sketch.dtype] * values[0])  # NaN and zero are, too
        torch.mm((vectors * values.clamp_min(0).rsqrt().nan_to_num(0.0, 0.0, 0.0)).T.to(block), block, out=basis[i])
    return basis, steep


def _by_size(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of rows · rowsᵀ on the CPU, descending, in the rows' dtype."""
    gram = (rows @ rows.T).cpu()
    if not bool(torch.isfinite(gram).all()):
        gram = torch.eye(len(gram), dtype=gram.dtype) * torch.nan  # LAPACK refuses it; NaN is seen by the caller
        return gram.diagonal(), gram
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0), vectors.flip(1)


def _orthonormal(rows: Tensor) -> Tensor:
    """Householder QR of (k, n) rows, k ≤ n, scaled to 1 first."""
    largest = rows.abs().amax()
    basis: Tensor = torch.linalg.qr((rows / largest if largest > 0 else rows).T).Q
    return basis.T
