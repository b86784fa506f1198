"""Step 3 for CPUs and plain PyTorch: one shifted step of subspace iteration from a sparse sketch (README §4).

On A = X or Xᵀ, tall, with blocks of b rows on the short side, so that products stream through A:

1. B = SᵀA, S sparse signs; V = the left-rotated B with orthonormal rows, by descending singular value of B;
2. V ← orth(V AᵀA − a V), both products in one pass over A, the shift a below the mean energy of what V leaves out;
3. Y = V Aᵀ, and the leading eigenvectors of YYᵀ: F = (Yᵀ Z)(Zᵀ V) without an SVD.

The textbook's method multiplies six times for the same error, this one three times and with fewer columns; of the
three, two only turn the subspace, and may have operands in bfloat16 where the CPU multiplies those faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._interface import Effort, Pace, ShiftedFactors
from .._stream import parallel
from .._stream.blocks import long_panels
from .._stream.factors import RATE, stacked
from .._stream.stored import Matrix
from .residuals import Residuals, SignMatrix

# Of the mean energy of the complement; directions there are damped as long as the shift is below their largest energy.
SHIFT = 0.8
# Rows of a block for each component kept, and the multiple it is rounded up to (BLAS runs better there).
WIDTH_RATIO = 1.4
WIDTH_MULTIPLE = 8
# Rows of a product in bfloat16 that is made beside the sum it goes to. It is as fast as whole, and up to twice where
# what the library sums in, float32 of the same size, fits the cache.
PRODUCT_ROWS = 256
# Columns of a block that are widened to float64 at once.
PRODUCT_COLUMNS = 1024
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
        (m, n), everyone = of_tensor.shape, range(len(experts))
        found = _subspace(of_tensor, key, truncation_width(rank, effort.oversampling), effort)
        rows = _times(found.unit, found.basis, m >= n)
        rotations, trusted, gap = _leading(found, everyone, rows, rank)
        left, right = (rows.new_empty(len(experts), rank, side) for side in (max(m, n), min(m, n)))
        for i in everyone:
            torch.mm(_lengthened(rotations[i], found, i), rows[i], out=left[i])
            torch.mm(rotations[i], found.basis[i], out=right[i])
        of_tensors.append((*_sides(left, right, m >= n), trusted, gap))
    left, right, trusted, gap = (stacked(each) for each in zip(*of_tensors, strict=True))
    return ShiftedFactors(left, right, None, trusted, gap)


def truncate_by_expert(
    base: Matrix,
    experts: Sequence[Matrix],
    mixing: Tensor,
    key: int,
    rank: int,
    effort: Effort,
    pace: Pace,
    residuals: Callable[..., Residuals] = Residuals.of,
) -> Iterator[ShiftedFactors]:
    """See :class:`r2m_kernels._interface.Operators`."""
    of_tensor = residuals(base, experts, mixing)
    for start in range(0, len(experts), pace.experts):
        some = of_tensor.only(range(len(experts))[start : start + pace.experts], pace.panels)
        found = _subspace(some, key, truncation_width(rank, effort.oversampling), effort)
        for place, expert in enumerate(some.chosen):
            yield _of_expert(found, place, expert, rank)
        del found  # before the next experts' is


def _of_expert(found: Subspace, place: int, expert: int, rank: int) -> ShiftedFactors:
    tall, some = found.unit.shape[0] >= found.unit.shape[1], slice(place, place + 1)
    rows = _times(found.unit.only([expert]), found.basis[some], tall)
    (rotation,), trusted, gap = _leading(found, [place], rows, rank)
    left = _lengthened(rotation, found, place) @ rows[0]
    del rows  # before the other factor is made
    left, right = _sides(left, rotation @ found.basis[place], tall)
    return ShiftedFactors(left[None, None], right[None, None], None, trusted.unsqueeze(0), gap.unsqueeze(0))


def _lengthened(rotation: Tensor, found: Subspace, place: int) -> Tensor:
    """The rotation times ‖X_i‖: what is rotated is of the residual scaled to norm 1."""
    return rotation * found.energy[place].sqrt().to(rotation)


def _sides(left: Tensor, right: Tensor, tall: bool) -> tuple[Tensor, Tensor]:
    """Factors of X_i from those of A_i, transposed: (…, r, long side) and (…, r, short side)."""
    return (left.mT, right) if tall else (right.mT, left)


class Subspace(NamedTuple):
    """Where the residuals A_i = X_i or X_iᵀ, tall, have most of their energy.

    Attributes:
        unit: the residuals scaled to norm 1.
        basis: (E, b, short side), orthonormal rows.
        energy: (E,) float64, ‖X_i‖².
        steep: (E,) bool, whose spectrum is too steep for a step: their basis is the sketch's.
        kept: (E,) float64, the energy of the unit residual in its subspace before the last step; ``None`` without one.
    """

    unit: Residuals
    basis: Tensor
    energy: Tensor
    steep: Tensor
    kept: Tensor | None


def _subspace(residuals: Residuals, key: int, width: int, effort: Effort) -> Subspace:
    (m, n), steps, tolerance = residuals.shape, -(-effort.iterations // 2), effort.tolerance
    sketch, energy = residuals.sketch(SignMatrix.random(key, max(m, n), width, residuals.dtype))
    norms = energy.sqrt()
    usable = torch.isfinite(norms) & (norms > 0)
    # Scaled to norm 1: a step squares the residual, and squares of large and small ones do not fit.
    inverse = torch.where(usable, norms, torch.inf).reciprocal()
    unit = residuals.scaled(inverse)
    basis, steep = _descending(sketch * inverse.to(sketch).view(-1, 1, 1))
    of_steep = {i: _orthonormal(sketch[i]) for i in steep.nonzero().flatten().tolist()}
    del sketch
    kept: list[Tensor] = []
    for _ in range(0 if bool(steep.all()) else steps):
        product, energies = _there_and_back(unit, basis, m >= n)
        kept.append(energies.sum(dim=1))
        # Not above any energy that the block holds, either: that would damp what is wanted.
        outside = (usable.double() - kept[-1]).clamp_min(0) / max(1, min(m, n) - width)
        shift = torch.minimum(SHIFT * outside, energies.amin(dim=1)).to(basis)
        for w, a, v in zip(product, shift, basis, strict=True):
            w -= v.mul_(a)
            v.copy_(_orthonormal(w))
        del product
        if tolerance is not None and len(kept) > 1 and bool((kept[-1] - kept[-2] <= tolerance * kept[-1]).all()):
            break
    for i, rows in of_steep.items():
        basis[i] = rows
    return Subspace(unit, basis, energy, steep, kept[-1] if kept else None)


def _leading(found: Subspace, places: Sequence[int], rows: Tensor, rank: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """The leading directions of some of the residuals within their subspaces.

    Args:
        found: subspaces.
        places: of the residuals among them.
        rows: V_i A_iᵀ, (len(places), b, long side).
        rank: r.

    Returns:
        Rotations (r, b) of rows and bases, whether to trust them, and their gap, both (len(places),).
    """
    energy, dtype = found.energy[list(places)], found.unit.dtype
    trusted, gap = torch.isfinite(energy.sqrt()), torch.full((len(rows),), torch.nan, dtype=torch.float64)
    rotations = []
    for i, (place, y) in enumerate(zip(places, rows, strict=True)):
        values, vectors = _by_size(y, torch.float64 if found.steep[place] else dtype)
        rotations.append(vectors[:, :rank].T.to(y))
        if found.steep[place]:
            trusted[i] &= bool(values[rank:].sum() <= NOTHING_LOST[dtype] * values.sum())
            gap[i] = 0.0
        elif found.kept is not None:
            growth = (values.sum() - found.kept[place]).clamp_min(0)
            gap[i] = growth * (values[-1] / values[rank - 1]) ** RATE if values[rank - 1] > 0 else 0.0
    return rotations, trusted, gap * energy


def _times(residuals: Residuals, basis: Tensor, tall: bool) -> Tensor:
    """V_i A_iᵀ, (E, b, long side)."""
    rows = basis.new_empty(*basis.shape[:2], max(residuals.shape))

    def multiply(panel: list[slice]) -> None:
        for run in panel:
            for v, a, out in zip(basis, residuals.along(run, tall), rows, strict=True):
                torch.mm(v, a.T, out=out[:, run])

    for _ in parallel.for_each(multiply, long_panels(*residuals.shape), residuals.panels):
        pass
    return rows


def _there_and_back(residuals: Residuals, basis: Tensor, tall: bool) -> tuple[Tensor, Tensor]:
    """V_i A_iᵀA_i, (E, b, short side), and ‖A_i v‖² of every row v, (E, b) float64 on the CPU; A is read once."""
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
                    for start in range(0, len(y), PRODUCT_ROWS):
                        some = slice(start, start + PRODUCT_ROWS)
                        total[i, some] += y[some] @ a
        return total, energies

    total, energies = parallel.ordered_sum(of_panel, long_panels(*residuals.shape), residuals.panels)
    return total, energies.cpu()


def _descending(sketch: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows for each (b, short) block by descending singular value, and whether they fall too steeply.

    Rows of one size each make W = V AᵀA a matrix whose rows differ in size and not within: rounding its operands, or
    itself, to fewer bits then costs a row digits of its own, and not the small rows all of theirs.
    """
    basis, steep = torch.empty_like(sketch), torch.zeros(len(sketch), dtype=torch.bool)
    for i, block in enumerate(sketch):
        values, vectors = _by_size(block, block.dtype)
        steep[i] = not bool(values[-1] > STEEP[sketch.dtype] * values[0])  # NaN and zero are, too
        torch.mm((vectors * values.clamp_min(0).rsqrt().nan_to_num(0.0, 0.0, 0.0)).T.to(block), block, out=basis[i])
    return basis, steep


def _by_size(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of rows · rowsᵀ on the CPU, descending, in a dtype."""
    if dtype == rows.dtype:
        gram = (rows @ rows.T).cpu()
    else:
        gram = torch.zeros(len(rows), len(rows), dtype=dtype)
        for some in torch.split(rows, PRODUCT_COLUMNS, dim=1):
            wide = some.to(dtype)
            gram += (wide @ wide.T).cpu()
    if not bool(torch.isfinite(gram).all()):
        gram = torch.eye(len(gram), dtype=gram.dtype) * torch.nan  # LAPACK refuses it; NaN is seen by the caller
        return gram.diagonal(), gram
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0), vectors.flip(1)


def _orthonormal(rows: Tensor) -> Tensor:
    """Householder QR of (k, n) rows, k ≤ n, scaled to 1 first, in place."""
    least, most = rows.aminmax()
    largest = torch.maximum(most, -least)
    basis: Tensor = torch.linalg.qr((rows.div_(largest) if largest > 0 else rows).T).Q
    return basis.T
