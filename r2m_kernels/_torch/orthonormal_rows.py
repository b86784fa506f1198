"""Rows made orthonormal, by the Cholesky factor of their Gram where that will do (README §4)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._interface import ROWS_MULTIPLE

# Columns of a block that are widened to float64 or turned at once.
PRODUCT_COLUMNS = 1024
# Rows of a Gram matrix of rows that is one product; of more, halves and what is below the diagonal are.
GRAM_ROWS = 64
# Smallest diagonal entry of the Cholesky factor of a Gram of rows of length 1 that will do: CLEAR for rows that are
# orthonormal to float32's rounding, and for a sketch whose products may be rounded to bfloat16 as they are; ROUGH where
# only the span matters and how much energy is in it (orthonormal to 1e-4).
CLEAR, ROUGH = 2.0**-2, 2.0**-4
# Ratio of the smallest to the largest eigenvalue of the sketch's Gram: below it the spectrum is too steep for a step,
# which squares it, in float32 (k^-1 at rank 100: 2e-5) or float64.
STEEP = {torch.float32: 2.0**-18, torch.float64: 2.0**-40}


def start(sketch: Tensor, rows: int) -> tuple[Tensor, bool]:
    """Orthonormal rows that span a sketch or its leading directions, and whether it falls too steeply for a step."""
    basis = by_cholesky(sketch[:rows], CLEAR)
    if basis is not None:
        return basis, False
    # Rows of one size each make W = V AᵀA a matrix whose rows differ in size and not within: rounding its operands, or
    # itself, to fewer bits then costs a row digits of its own, and not the small rows all of theirs.
    values, vectors = by_size(sketch, sketch.dtype)
    steep = not bool(values[-1] > STEEP[sketch.dtype] * values[0])  # NaN and zero are, too
    turned = vectors * values.clamp_min(0).rsqrt().nan_to_num(0.0, 0.0, 0.0)
    return turned[:, :rows].T.to(sketch) @ sketch, steep


def by_size(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
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


def orthonormal(rows: Tensor, least: float | None = None) -> Tensor:
    """(k, n) rows, k ≤ n, made orthonormal; by Householder's QR, where a Cholesky factor is below ``least`` or unasked.

    QR works on the rows in place, scaled to 1 first.
    """
    basis = None if least is None else by_cholesky(rows, least)
    if basis is not None:
        return basis
    lowest, highest = rows.aminmax()
    largest = torch.maximum(highest, -lowest)
    reflected: Tensor = torch.linalg.qr((rows.div_(largest) if largest > 0 else rows).T).Q
    return reflected.T


def by_cholesky(rows: Tensor, least: float) -> Tensor | None:
    """L⁻¹ rows, LLᵀ their Gram; ``None`` where an entry of L's diagonal is below ``least`` times its row's length."""
    gram = _lower_gram(rows, rows.new_zeros(len(rows), len(rows)))
    lengths = gram.diagonal().sqrt()
    inverse = lengths.reciprocal()
    factor, failed = torch.linalg.cholesky_ex(gram.mul_(inverse).mul_(inverse.unsqueeze(1)))
    if bool(failed) or not bool(factor.diagonal().min() >= least):  # NaN is not
        return None
    # From the right, of columns that lie side by side: half the time of the same problem with rows.
    factor *= lengths.unsqueeze(1)
    basis: Tensor = torch.linalg.solve_triangular(factor.T, rows.T, upper=True, left=False)
    return basis.T


def _lower_gram(rows: Tensor, gram: Tensor) -> Tensor:
    """Products of rows below the diagonal and in small blocks on it; the rest stays as it is."""
    if len(rows) <= GRAM_ROWS:
        return torch.mm(rows, rows.T, out=gram)
    half = -(-len(rows) // 2 // ROWS_MULTIPLE) * ROWS_MULTIPLE
    _lower_gram(rows[:half], gram[:half, :half])
    _lower_gram(rows[half:], gram[half:, half:])
    torch.mm(rows[half:], rows[:half].T, out=gram[half:, :half])
    return gram
