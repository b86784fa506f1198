"""Subspaces from AᵀA alone, formed once: where much is kept of a spectrum that falls slowly (README §4).

1. K = AᵀA, blocks on its diagonal and below;
2. V = orth(SᵀK), S sparse signs: a whole step of subspace iteration without a product;
3. V ← orth(V K − a V), one step fewer than from a sketch of A.

Products have operands, and come out, in a dtype that the CPU may multiply faster. What that rounds is noise in K, as
large for small eigenvalues as for large ones: fine where the rows of SᵀK depend little enough on each other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._stream import parallel
from .._stream.blocks import long_panels
from .orthonormal_rows import CLEAR, ROUGH, by_cholesky, orthonormal
from .residuals import Residuals, SignMatrix

# Columns of a block of AᵀA: blocks above its diagonal are copies of those below.
GRAM_COLUMNS = 128
# Rows of a sketch of some of A that tell whether it is worth a try.
TRIED_ROWS = 128
# How far the trace of AᵀA may be from 1 where the length that A was divided by is no rounding.
TRACE_ERROR = 2.0**-6
# What of each row of SᵀK no other row has, as a share of its length: well above bfloat16's rounding, 1e-3.
MILD = 2.0**-6
# Shifts, of the mean energy of the complement: as from a sketch of A, and the last one that, for there is a step less.
SHIFT, LAST_SHIFT = 0.8, 1.0


class Found(NamedTuple):
    """The subspace of one residual A of norm 1.

    Attributes:
        basis: (r, short side), orthonormal rows.
        kept: of each step a float64 number, the energy of A in the subspace before it.
    """

    basis: Tensor
    kept: list[Tensor]


def subspaces(unit: Residuals, key: int, rank: int, steps: int) -> dict[int, Found]:
    """Those of residuals whose spectra fall slowly, by their place.

    Args:
        unit: residuals of norm 1, but for those whose norm was not known.
        key: that random numbers are made from.
        rank: r.
        steps: beside the first one.
    """
    mild = _mild(unit, key, rank)
    if not mild:
        return {}
    formed = grams(unit.only([unit.chosen[place] for place in mild]), unit.fast_dtype)
    signs = SignMatrix.random(key, formed.shape[1], rank, unit.dtype)

    def of_one(gram: Tensor) -> Found | None:
        return _of_gram(gram, signs, steps, unit)

    found = zip(mild, parallel.for_each(of_one, formed, unit.panels), strict=True)
    return {place: one for place, one in found if one is not None}


def _mild(unit: Residuals, key: int, rank: int) -> list[int]:
    """Which residuals have rows that depend little on each other in a sketch of their first run."""
    (m, n), (first, *_), whole = unit.shape, long_panels(*unit.shape)[0], slice(None)
    blocks = unit.block(first, whole) if m >= n else unit.block(whole, first)
    signs = SignMatrix.random(key, max(blocks.shape[1:]), min(TRIED_ROWS, rank), unit.dtype)
    tried = (_sketched(block, signs, unit) for block in blocks)
    return [place for place, rows in enumerate(tried) if by_cholesky(rows, CLEAR) is not None]


def _sketched(matrix: Tensor, signs: SignMatrix, unit: Residuals) -> Tensor:
    """A sketch of a matrix that is there, as residuals of ``unit``'s kind are sketched."""
    nothing = matrix.new_zeros(1, matrix.shape[1]).expand_as(matrix)
    sketches, _ = type(unit)(nothing, [matrix], unit.mixing.new_ones(1, 1)).sketch(signs)
    return sketches[0]


def _of_gram(gram: Tensor, signs: SignMatrix, steps: int, unit: Residuals) -> Found | None:
    """From K, or ``None`` where it does not tell its small eigenvalues from rounding, or is not of norm 1."""
    if not bool((gram.trace() - 1).abs() <= TRACE_ERROR):  # NaN is not
        return None
    basis = by_cholesky(_sketched(gram, signs, unit), MILD)
    if basis is None:
        return None
    kept: list[Tensor] = []
    for left in reversed(range(steps)):
        product = (basis.to(gram.dtype) @ gram).to(basis.dtype)
        energies = torch.linalg.vecdot(product, basis).double().cpu()
        kept.append(energies.sum())
        outside = (1 - kept[-1]).clamp_min(0) / (len(gram) - len(basis))
        shift = torch.minimum((SHIFT if left else LAST_SHIFT) * outside, energies.amin()).to(basis)
        basis = orthonormal(product.sub_(basis.mul_(shift)), ROUGH if left else CLEAR)
    return Found(basis, kept)


def grams(residuals: Residuals, dtype: torch.dtype) -> Tensor:
    """A_iᵀA_i of A = X or Xᵀ, tall: (E, short side, short side) in ``dtype``, as operands and products of a run are."""
    (m, n), short = residuals.shape, min(residuals.shape)
    columns = [slice(start, start + GRAM_COLUMNS) for start in range(0, short, GRAM_COLUMNS)]
    together = residuals.dtype.itemsize // dtype.itemsize  # runs of narrower operands, in as many bytes as one

    def of_panel(panel: list[slice]) -> tuple[Tensor]:
        total = torch.empty(residuals.count, short, short, dtype=residuals.dtype, device=residuals.device)
        for first in range(0, len(panel), together):
            run = slice(panel[first].start, panel[first : first + together][-1].stop)
            for gram, a in zip(total, residuals.along(run, m >= n, dtype), strict=True):
                for some in columns:
                    below, product = gram[some.start :, some], (a[:, some.start :].T, a[:, some])
                    if a.dtype == gram.dtype:
                        torch.addmm(below, *product, beta=float(first > 0), out=below)
                    elif first == 0:
                        below.copy_(torch.mm(*product))
                    else:
                        below += torch.mm(*product)
        return (total,)

    (found,) = parallel.ordered_sum(of_panel, long_panels(m, n), residuals.panels)
    whole = found if dtype == found.dtype else torch.empty_like(found, dtype=dtype)
    for some in columns:
        if whole is not found:
            whole[:, some.start :, some] = found[:, some.start :, some]
        whole[:, some, some.stop :] = whole[:, some.stop :, some].mT
    return whole
