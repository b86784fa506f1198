"""Step 3 for CPUs and plain PyTorch: shifted steps of subspace iteration from a sparse sketch (README §4).

On A = X or Xᵀ, tall, with V holding r orthonormal rows on the short side, so that products stream through A:

1. V = orth(SᵀA), S sparse signs;
2. V ← orth(V AᵀA − a V) two to five times, both products in one pass over A, or from AᵀA formed once where that is
   less work; the shift a is below the mean energy of what V leaves out;
3. F = (A Vᵀ) V.

There is no singular value problem, and an eigenvalue problem only where a sketch's rows depend on each other: rows are
made orthonormal by the Cholesky factor of their Gram, which is products. All products but the last only turn the
subspace, and may have operands in bfloat16 where the CPU multiplies those faster. At small ranks, where more rows cost
next to nothing, V has more, one step will do, and the leading r directions within its span are taken at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._interface import FEW, Effort, Pace, ShiftedFactors, sketch_rows
from .._stream import parallel
from .._stream.blocks import long_panels
from .._stream.factors import RATE, left_to_gain, row_squares, stacked
from .._stream.stored import Matrix
from .residuals import Residuals, SignMatrix

# Of the mean energy of the complement; directions there are damped as long as the shift is below their largest energy.
SHIFT = 0.8
# Rows of a product in bfloat16 that is made beside the sum it goes to. It is as fast as whole, and up to twice where
# what the library sums in, float32 of the same size, fits the cache.
PRODUCT_ROWS = 256
# Columns of a block of AᵀA: blocks above its diagonal are copies of those below.
GRAM_COLUMNS = 256
# Columns of a block that are widened to float64 or turned at once.
PRODUCT_COLUMNS = 1024
# Smallest diagonal entry of the Cholesky factor of a Gram of rows of length 1 that will do: CLEAR for rows that are
# orthonormal to float32's rounding, and for a sketch whose products may be rounded to bfloat16 as they are; ROUGH where
# only the span matters and how much energy is in it (orthonormal to 1e-4).
CLEAR, ROUGH = 2.0**-2, 2.0**-4
# Ratio of the smallest to the largest eigenvalue of the sketch's Gram: below it the spectrum is too steep for a step,
# which squares it, in float32 (k^-1 at rank 100: 2e-5) or float64.
STEEP = {torch.float32: 2.0**-18, torch.float64: 2.0**-40}
# A step knows the energy that is kept to this times the machine epsilon of its operands (measured: 1/30 on k^-1).
KEPT_ERROR = 1 / 32
# Where the block holds all of A, its smaller Ritz values are rounding: what is cut off has less than this share.
NOTHING_LOST = {torch.float32: 1e-12, torch.float64: 1e-26}


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
        of_tensors.append(_factors(_subspace(of_tensor, key, rank, effort), range(len(experts)), rank))
    left, right, trusted, gap = (stacked(each) for each in zip(*of_tensors, strict=True))
    return ShiftedFactors(left, right, rank < FEW, None, trusted, gap)


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
        found = _subspace(some, key, rank, effort)
        for place in range(some.count):
            left, right, trusted, gap = (one.unsqueeze(0) for one in _factors(found, [place], rank))
            yield ShiftedFactors(left, right, rank < FEW, None, trusted, gap)
            del left, right  # before the next ones are made
        del found  # before the next experts' is


class Subspace(NamedTuple):
    """Where the residuals A_i = X_i or X_iᵀ, tall, have most of their energy.

    Attributes:
        unit: the residuals scaled to norm 1.
        bases: of each (b, short side), orthonormal rows: b = r, or more if the best r of them are still to be found.
        energy: (E,) float64, ‖X_i‖².
        steep: whose spectrum is too steep for a step: their basis is the sketch's.
        kept: of each step (E,) float64, the energy of the unit residuals in their subspaces before it.
    """

    unit: Residuals
    bases: Sequence[Tensor]
    energy: Tensor
    steep: Sequence[int]
    kept: Sequence[Tensor]


def _subspace(residuals: Residuals, key: int, rank: int, effort: Effort) -> Subspace:
    (m, n), few = residuals.shape, rank < FEW
    width, short = sketch_rows(rank, effort.oversampling), min(m, n)
    sketch, energy = residuals.sketch(SignMatrix.random(key, max(m, n), width, residuals.dtype))
    norms = energy.sqrt()
    usable = torch.isfinite(norms) & (norms > 0)
    # Scaled to norm 1: a step squares the residual, and squares of large and small ones do not fit.
    inverse = torch.where(usable, norms, torch.inf).reciprocal()
    unit = residuals.scaled(inverse)
    sketch *= inverse.to(sketch).view(-1, 1, 1)
    basis = sketch.new_empty(len(sketch), width if few else rank, short)
    of_steep: dict[int, Tensor] = {}
    for i, rows in enumerate(sketch):
        basis[i], steep = _start(rows, basis.shape[1])
        if steep:
            of_steep[i] = _orthonormal(rows)
    del sketch, rows
    kept: list[Tensor] = []
    steps = 0 if len(of_steep) == len(basis) else effort.steps_on_cpu(rank, short)
    grams = _grams(unit, m >= n) if steps and effort.by_gram(rank, unit.shape) else None
    for step in range(steps):
        product, energies = _there_and_back(unit, basis, m >= n) if grams is None else _turned(basis, grams)
        kept.append(energies.sum(dim=1))
        # Not above any energy that the block holds, either: that would damp what is wanted.
        outside = (usable.double() - kept[-1]).clamp_min(0) / max(1, short - basis.shape[1])
        shift = torch.minimum(SHIFT * outside, energies.amin(dim=1)).to(basis)
        settled = effort.tolerance is not None and len(kept) > 1
        last = step == steps - 1 or (settled and _grown_less(kept, effort.tolerance))
        for w, a, v in zip(product, shift, basis, strict=True):
            w -= v.mul_(a)
            v.copy_(_orthonormal(w, CLEAR if last else ROUGH))
        del product
        if last:
            break
    return Subspace(unit, [of_steep.get(i, rows) for i, rows in enumerate(basis)], energy, list(of_steep), kept)


def _grown_less(kept: Sequence[Tensor], tolerance: float | None) -> bool:
    """Whether the last step added to no residual more than a share of what is kept of it."""
    return tolerance is not None and bool((kept[-1] - kept[-2] <= tolerance * kept[-1]).all())


def _factors(found: Subspace, places: Sequence[int], rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The leading directions of some of the residuals within their subspaces.

    Args:
        found: subspaces.
        places: of the residuals among them.
        rank: r.

    Returns:
        Left and right factors, (E, m, r) and (E, r, n), whether to trust them, and their gap, both (E,).
    """
    (m, n), bases, energy = found.unit.shape, [found.bases[place] for place in places], found.energy[list(places)]
    some = found.unit.only([found.unit.chosen[place] for place in places])
    # Where there are more rows than the rank, the leading ones take their place: another factor may not fit.
    long = bases[0].new_empty(len(bases), max(map(len, bases)), max(m, n))
    wide = [one[: len(v)] for one, v in zip(long, bases, strict=True)]
    _multiply(some, bases, m >= n, wide)
    short = torch.stack([v[:rank] for v in bases])
    trusted, gap = torch.isfinite(energy.sqrt()), torch.full((len(bases),), torch.nan, dtype=torch.float64)
    for i, (place, y, v) in enumerate(zip(places, wide, bases, strict=True)):
        kept, steep = [one[place] for one in found.kept], place in found.steep
        if len(v) == rank:
            final = row_squares(y).sum().cpu()
            rounding = KEPT_ERROR * torch.finfo(found.unit.fast_dtype).eps * final
            if len(kept) > 1 and min(kept[-1] - kept[-2], final - kept[-1]) > rounding:
                gap[i] = left_to_gain(kept[-2], kept[-1], final)
        else:
            values, vectors = _by_size(y, torch.float64 if steep else y.dtype)
            rotation = vectors[:, :rank].T.to(y)
            for start in range(0, y.shape[1], PRODUCT_COLUMNS):
                some_columns = y[:, start : start + PRODUCT_COLUMNS]
                some_columns[:rank] = rotation @ some_columns
            torch.mm(rotation, v, out=short[i])
            if steep:
                beyond = (min(m, n) - rank) * values[rank:].mean()
                trusted[i] &= bool(beyond <= NOTHING_LOST[y.dtype] * values.sum())
                gap[i] = 0.0
            elif kept:
                growth = (values.sum() - kept[-1]).clamp_min(0)
                gap[i] = growth * (values[-1] / values[rank - 1]) ** RATE if values[rank - 1] > 0 else 0.0
        y[:rank] *= energy[i].sqrt().to(y)
    # At small ranks, where there always are more, a copy lets them go.
    long = long[:, :rank].contiguous() if rank < FEW else long[:, :rank]
    left, right = (long.mT, short) if m >= n else (short.mT, long)
    return left, right, trusted, gap * energy


def _multiply(residuals: Residuals, bases: Sequence[Tensor], tall: bool, outs: Sequence[Tensor]) -> None:
    """V_i A_iᵀ into each (b, long side)."""

    def multiply(panel: list[slice]) -> None:
        for run in panel:
            for v, a, out in zip(bases, residuals.along(run, tall), outs, strict=True):
                torch.mm(v, a.T, out=out[:, run])

    for _ in parallel.for_each(multiply, long_panels(*residuals.shape), residuals.panels):
        pass


def _there_and_back(residuals: Residuals, basis: Tensor, tall: bool) -> tuple[Tensor, Tensor]:
    """V_i A_iᵀA_i, (E, b, short side), and ‖A_i v‖² of every row v, (E, b) float64 on the CPU; A is read once."""
    fast = basis.to(residuals.fast_dtype)
    lengths = torch.linalg.vector_norm(fast, dim=2, dtype=torch.float64)  # not 1 any more, once they are rounded

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
    return total, (energies / lengths.square().clamp_min(torch.finfo(torch.float64).tiny)).cpu()


def _grams(residuals: Residuals, tall: bool) -> Tensor:
    """A_iᵀA_i, (E, short side, short side), of precise operands: rounded small rows would have no size of their own."""
    short = min(residuals.shape)
    columns = [slice(start, start + GRAM_COLUMNS) for start in range(0, short, GRAM_COLUMNS)]

    def of_panel(panel: list[slice]) -> tuple[Tensor]:
        total = torch.zeros(residuals.count, short, short, dtype=residuals.dtype, device=residuals.device)
        for run in panel:
            for gram, a in zip(total, residuals.along(run, tall), strict=True):
                for some in columns:
                    gram[some.start :, some].addmm_(a[:, some.start :].T, a[:, some])
        return (total,)

    (grams,) = parallel.ordered_sum(of_panel, long_panels(*residuals.shape), residuals.panels)
    for some in columns:
        grams[:, some, some.stop :] = grams[:, some.stop :, some].mT
    return grams


def _turned(basis: Tensor, grams: Tensor) -> tuple[Tensor, Tensor]:
    """V_i G_i, (E, b, short side), and v G_i vᵀ of every row v, (E, b) float64 on the CPU."""
    product = torch.empty_like(basis)
    for w, v, gram in zip(product, basis, grams, strict=True):  # one by one: the same bits whoever else is there
        torch.mm(v, gram, out=w)
    return product, torch.linalg.vecdot(product, basis).double().cpu()


def _start(sketch: Tensor, rows: int) -> tuple[Tensor, bool]:
    """Orthonormal rows that span a sketch or its leading directions, and whether it falls too steeply for a step."""
    basis = _by_cholesky(sketch[:rows], CLEAR)
    if basis is not None:
        return basis, False
    # Rows of one size each make W = V AᵀA a matrix whose rows differ in size and not within: rounding its operands, or
    # itself, to fewer bits then costs a row digits of its own, and not the small rows all of theirs.
    values, vectors = _by_size(sketch, sketch.dtype)
    steep = not bool(values[-1] > STEEP[sketch.dtype] * values[0])  # NaN and zero are, too
    turned = vectors * values.clamp_min(0).rsqrt().nan_to_num(0.0, 0.0, 0.0)
    return turned[:, :rows].T.to(sketch) @ sketch, steep


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


def _orthonormal(rows: Tensor, least: float | None = None) -> Tensor:
    """(k, n) rows, k ≤ n, made orthonormal; by Householder's QR, where a Cholesky factor is below ``least`` or unasked.

    QR works on the rows in place, scaled to 1 first.
    """
    basis = None if least is None else _by_cholesky(rows, least)
    if basis is not None:
        return basis
    lowest, highest = rows.aminmax()
    largest = torch.maximum(highest, -lowest)
    reflected: Tensor = torch.linalg.qr((rows.div_(largest) if largest > 0 else rows).T).Q
    return reflected.T


def _by_cholesky(rows: Tensor, least: float) -> Tensor | None:
    """L⁻¹ rows, LLᵀ their Gram; ``None`` where an entry of L's diagonal is below ``least`` times its row's length."""
    half = len(rows) // 2
    gram = rows.new_zeros(len(rows), len(rows))  # its lower triangle, but for the blocks on the diagonal
    torch.mm(rows[:half], rows[:half].T, out=gram[:half, :half])
    torch.mm(rows[half:], rows.T, out=gram[half:])
    lengths = gram.diagonal().sqrt()
    inverse = lengths.reciprocal()
    factor, failed = torch.linalg.cholesky_ex(gram.mul_(inverse).mul_(inverse.unsqueeze(1)))
    if bool(failed) or not bool(factor.diagonal().min() >= least):  # NaN is not
        return None
    # From the right, of columns that lie side by side: half the time of the same problem with rows.
    factor *= lengths.unsqueeze(1)
    basis: Tensor = torch.linalg.solve_triangular(factor.T, rows.T, upper=True, left=False)
    return basis.T
