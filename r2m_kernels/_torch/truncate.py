"""Step 3 for CPUs and plain PyTorch: shifted steps of subspace iteration from a sparse sketch (README §4).

On A = X or Xᵀ, tall, with V holding r orthonormal rows on the short side, so that products stream through A:

1. V = orth(SᵀA), S sparse signs;
2. V ← orth(V AᵀA − a V) two to five times, both products in one pass over A, or from AᵀA formed once where that is
   less work; the shift a is below the mean energy of what V leaves out;
3. F = (A Vᵀ) V.

Where much is kept of a spectrum that falls slowly, :mod:`.gram_start` takes the place of 1 and 2.

There is no singular value problem, and an eigenvalue problem only where a sketch's rows depend on each other: rows are
made orthonormal by the Cholesky factor of their Gram, which is products. All products but the last only turn the
subspace, and may have operands in bfloat16 where the CPU multiplies those faster; the last may where far more is cut
off than that rounds. At small ranks, where more rows cost next to nothing, V has more, one step will do, and the
leading r directions within its span are taken at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._interface import CUT_OFF, FEW, Effort, Pace, ResidualGroup, ShiftedFactors, sketch_rows
from .._stream import parallel
from .._stream.blocks import long_panels
from .._stream.factors import RATE, left_to_gain, row_squares, stacked
from .._stream.stored import Matrix
from . import gram_start, orthonormal_rows
from .orthonormal_rows import CLEAR, PRODUCT_COLUMNS, ROUGH
from .residuals import Residuals, SignMatrix

# Of the mean energy of the complement; directions there are damped as long as the shift is below their largest energy.
SHIFT = 0.8
# Rows of a product in bfloat16 that is made beside the sum it goes to. It is as fast as whole, and up to twice where
# what the library sums in, float32 of the same size, fits the cache.
PRODUCT_ROWS = 256
# A step knows the energy that is kept to this times the machine epsilon of its operands (measured: 1/30 on k^-1).
KEPT_ERROR = 1 / 32
# Where the block holds all of A, its smaller Ritz values are rounding: what is cut off has less than this share.
NOTHING_LOST = {torch.float32: 1e-12, torch.float64: 1e-26}


def shifted_truncation(
    groups: Sequence[ResidualGroup],
    mixing: Tensor,
    effort: Effort,
    residuals: Callable[..., Residuals] = Residuals.of,
) -> list[ShiftedFactors]:
    """See :class:`r2m_kernels._interface.ShiftedTruncation`; where energies may be rounding they are measured here.

    ``residuals`` makes a tensor's: another backend's may form blocks and sketches faster.
    """
    return [_truncated(group, mixing, effort, residuals) for group in groups]


def _truncated(
    group: ResidualGroup, mixing: Tensor, effort: Effort, residuals: Callable[..., Residuals]
) -> ShiftedFactors:
    of_tensors, rank = [], group.rank
    for index, key in enumerate(group.keys.tolist()):
        of_tensor = residuals(group.bases[index], [expert[index] for expert in group.experts], mixing)
        found = _subspace(of_tensor, key, group.energies[index], rank, effort)
        of_tensors.append(_factors(found, range(len(group.experts)), rank))
    left, right, trusted, gap = (stacked(each) for each in zip(*of_tensors, strict=True))
    return ShiftedFactors(left, right, rank < FEW, None, trusted, gap)


def truncate_by_expert(
    base: Matrix,
    experts: Sequence[Matrix],
    mixing: Tensor,
    key: int,
    energies: Tensor,
    rank: int,
    effort: Effort,
    pace: Pace,
    residuals: Callable[..., Residuals] = Residuals.of,
) -> Iterator[ShiftedFactors]:
    """See :class:`r2m_kernels._interface.Operators`."""
    of_tensor = residuals(base, experts, mixing)
    for start in range(0, len(experts), pace.experts):
        at_once = slice(start, start + pace.experts)
        some = of_tensor.only(range(len(experts))[at_once], pace.panels)
        found = _subspace(some, key, energies[at_once], rank, effort)
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
        kept: of each the energies of the unit residual in its subspace before every step, float64 numbers.
    """

    unit: Residuals
    bases: Sequence[Tensor]
    energy: Tensor
    steep: Sequence[int]
    kept: Sequence[Sequence[Tensor]]


def _subspace(residuals: Residuals, key: int, energies: Tensor, rank: int, effort: Effort) -> Subspace:
    count, (m, n), energy = residuals.count, residuals.shape, energies.double().cpu()
    unit = residuals.scaled(_inverse_norms(energy)[0])
    found: dict[int, gram_start.Found] = {}
    if effort.from_gram(rank, unit.shape):
        found = gram_start.subspaces(unit, key, rank, effort.steps_on_cpu(rank, min(m, n)) - 1)
    left = [place for place in range(count) if place not in found]
    steep: list[int] = []
    if left:
        some = residuals if not found else residuals.only([residuals.chosen[place] for place in left])
        signs = SignMatrix.random(key, max(m, n), sketch_rows(rank, effort.oversampling), residuals.dtype)
        sketch, measured = some.sketch(signs)
        inverse, usable = _inverse_norms(measured)
        some, energy = some.scaled(inverse), energy.index_copy(0, torch.tensor(left), measured)
        sketch *= inverse.to(sketch).view(-1, 1, 1)
        basis, of_steep = _started(some, sketch, rank)
        del sketch
        stepped = _stepped(some, basis, of_steep, usable, rank, effort)
        steep = [left[place] for place in of_steep]
        found |= zip(left, stepped, strict=True)
        unit = residuals.scaled(_inverse_norms(energy)[0])
    bases, kept = zip(*(found[place] for place in range(count)), strict=True)
    return Subspace(unit, bases, energy, sorted(steep), kept)


def _inverse_norms(energy: Tensor) -> tuple[Tensor, Tensor]:
    """What scales residuals to norm 1, and which have one: a step squares them, and squares of any size do not fit."""
    norms = energy.sqrt()
    usable = torch.isfinite(norms) & (norms > 0)
    return torch.where(usable, norms, torch.inf).reciprocal(), usable


def _started(unit: Residuals, sketch: Tensor, rank: int) -> tuple[Tensor, dict[int, Tensor]]:
    """Bases from sketches of A, and by place those of all of a sketch whose spectrum is too steep for a step."""
    basis = sketch.new_empty(len(sketch), sketch.shape[1] if rank < FEW else rank, sketch.shape[2])
    of_steep: dict[int, Tensor] = {}

    def start(place: int) -> None:
        basis[place], steep = orthonormal_rows.start(sketch[place], basis.shape[1])
        if steep:
            of_steep[place] = orthonormal_rows.orthonormal(sketch[place])

    _for_all(start, range(len(sketch)), unit)
    return basis, of_steep


def _stepped(
    unit: Residuals, basis: Tensor, of_steep: Mapping[int, Tensor], usable: Tensor, rank: int, effort: Effort
) -> list[gram_start.Found]:
    """Subspaces by steps with A, but of those that are too steep."""
    (m, n), short = unit.shape, min(unit.shape)
    kept: list[Tensor] = []
    steps = 0 if len(of_steep) == len(basis) else effort.steps_on_cpu(rank, short)
    # Of precise operands: rounded small rows would have no size of their own.
    grams = gram_start.grams(unit, unit.dtype) if steps and effort.by_gram(rank, unit.shape) else None
    for step in range(steps):
        product, energies = _there_and_back(unit, basis, m >= n) if grams is None else _turned(unit, basis, grams)
        kept.append(energies.sum(dim=1))
        # Not above any energy that the block holds, either: that would damp what is wanted.
        outside = (usable.double() - kept[-1]).clamp_min(0) / max(1, short - basis.shape[1])
        shift = torch.minimum(SHIFT * outside, energies.amin(dim=1)).to(basis)
        settled = effort.tolerance is not None and len(kept) > 1
        last = step == steps - 1 or (settled and _grown_less(kept, effort.tolerance))

        def turn(place: int, product: Tensor = product, shift: Tensor = shift, last: bool = last) -> None:
            product[place] -= basis[place].mul_(shift[place])
            basis[place] = orthonormal_rows.orthonormal(product[place], CLEAR if last else ROUGH)

        _for_all(turn, range(len(basis)), unit)
        del product, turn
        if last:
            break
    return [gram_start.Found(of_steep.get(i, rows), [one[i] for one in kept]) for i, rows in enumerate(basis)]


def _for_all(function: Callable[[int], None], places: Iterable[int], residuals: Residuals) -> None:
    """For every residual, as many at once as panels may be."""
    for _ in parallel.for_each(function, places, residuals.panels):
        pass


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
    # Where there are more rows than the rank, the leading ones take their place: another factor may not fit.
    long = bases[0].new_empty(len(bases), max(map(len, bases)), max(m, n))
    wide = [one[: len(v)] for one, v in zip(long, bases, strict=True)]
    for dtype, some in _by_precision(found, places, rank):
        if some:
            chosen = found.unit.only([found.unit.chosen[places[i]] for i in some])
            _multiply(chosen, [bases[i] for i in some], m >= n, [wide[i] for i in some], dtype)
    short = torch.stack([v[:rank] for v in bases])
    trusted, gap = torch.isfinite(energy.sqrt()), torch.full((len(bases),), torch.nan, dtype=torch.float64)
    for i, (place, y, v) in enumerate(zip(places, wide, bases, strict=True)):
        kept, steep = found.kept[place], place in found.steep
        if len(v) == rank:
            final = row_squares(y).sum().cpu()
            rounding = KEPT_ERROR * torch.finfo(found.unit.fast_dtype).eps * final
            if len(kept) > 1 and min(kept[-1] - kept[-2], final - kept[-1]) > rounding:
                gap[i] = left_to_gain(kept[-2], kept[-1], final)
        else:
            values, vectors = orthonormal_rows.by_size(y, torch.float64 if steep else y.dtype)
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


def _by_precision(found: Subspace, places: Sequence[int], rank: int) -> list[tuple[torch.dtype, list[int]]]:
    """Which of some residuals may have their last product rounded, and which may not."""

    def quick(place: int) -> bool:
        kept, last = found.kept[place], len(found.bases[place]) == rank
        return last and bool(kept) and bool(1 - kept[-1] >= CUT_OFF)

    of_all = [quick(place) for place in places]
    unit = found.unit
    return [
        (dtype, [i for i, one in enumerate(of_all) if one == fast])
        for dtype, fast in ((unit.fast_dtype, True), (unit.dtype, False))
    ]


def _multiply(
    residuals: Residuals, bases: Sequence[Tensor], tall: bool, outs: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """V_i A_iᵀ into each (b, long side), of operands in ``dtype``."""
    turned = [basis.to(dtype) for basis in bases]

    def multiply(panel: list[slice]) -> None:
        for run in panel:
            for v, a, out in zip(turned, residuals.along(run, tall, dtype), outs, strict=True):
                if out.dtype == dtype:
                    torch.mm(v, a.T, out=out[:, run])
                else:
                    out[:, run] = v @ a.T

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


def _turned(residuals: Residuals, basis: Tensor, grams: Tensor) -> tuple[Tensor, Tensor]:
    """V_i G_i, (E, b, short side), and v G_i vᵀ of every row v, (E, b) float64 on the CPU."""
    product = torch.empty_like(basis)

    def multiply(place: int) -> None:
        torch.mm(basis[place], grams[place], out=product[place])

    _for_all(multiply, range(len(basis)), residuals)  # one by one: the same bits whoever else is there
    return product, torch.linalg.vecdot(product, basis).double().cpu()
