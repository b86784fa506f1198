"""Step 3 for a group of tensors: subspace iteration with a shift, and no small problem at all (README §4).

On A = X or Xᵀ, tall, with V holding k = r orthonormal rows on the short side: V ← orth(SᵀA) with random signs S, then
V ← orth(V (AᵀA − a)) a few times, and A ≈ (A Vᵀ) V has rank r already. The shift a, below the mean energy of what V
leaves out, is what makes few steps without oversampling enough: it needs no knowledge of the spectrum, and no eigen-
or singular value problem, which on a GPU would cost more than all the products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._interface import Effort, ResidualGroup, ShiftedFactors
from .._stream.factors import SLOWEST
from . import launch
from .addresses import on_device, tensor_at, vectors_fit
from .orthonormalize import Blocks, inner_products
from .residual_matmul import SCALE, Shift, matrix_group, multiply, sketch
from .sums import summed

# Of the mean energy of the complement. Directions there are damped as long as the shift is below their largest energy.
SHIFT = 0.8
# Below it a residual counts as zero: what scales it to norm 1, and then to operands, would not fit float32.
SMALLEST_ENERGY = 1e-66
# Without oversampling the luck of the draw evens out over many columns only: at small ranks more steps, on matrices
# that cost next to nothing, take its place (measured: ranks 10, 20 and 40 of ten times as many, seven spectra).
EXTRA_STEPS = ((32, 4), (64, 2))
# A residual that loses less than this share of its energy has so steep a spectrum that squaring it with operands of 11
# bits may lose more than 2 per cent of what it loses; with shares of 5e-4 to 5e-3 it is 1.3 per cent at most.
STEEP = 1e-3


JUDGED = 6  # numbers of a group in the table of :func:`judge_kernel`


@triton.jit
def judge_kernel(
    energies,
    groups,
    kept,
    trusted,
    gap,
    STEEP: tl.constexpr,
    SLOWEST: tl.constexpr,
    KNOWN: tl.constexpr,
    JUDGED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """kept, trusted and gap of each residual, see :class:`r2m_kernels._interface.ShiftedFactors`.

    energies of all residuals, group after group. A row of ``groups``: the number of residuals up to its last one;
    addresses of sums of squares of tiles, as shares of the energies, of the products of the last two steps (KNOWN:
    there were two) and of the one that became a factor; and how many tiles a residual has in the former and the latter.
    """
    residual = tl.program_id(0).to(tl.int64)
    first, last = residual * 0, tl.load(groups)
    while residual >= last:
        first = last
        groups += JUDGED
        last = tl.load(groups)
    place, tiles, final_tiles = residual - first, tl.load(groups + 4).to(tl.int32), tl.load(groups + 5).to(tl.int32)
    final = tensor_at(groups + 3, True, tl.float64, False) + place * final_tiles
    energy = tl.load(energies + residual)
    reached = energy * summed(final, final_tiles, BLOCK)
    tl.store(kept + residual, reached)
    beyond = tl.where(energy - reached >= STEEP * energy, 1, 0)  # a NaN is not
    tl.store(trusted + residual, tl.where(energy > 0.0, beyond, 1).to(tl.int8))
    left_to_gain = energy * float("nan")
    if KNOWN:
        # What further steps would add: the last three energies continued as a geometric series (Aitken).
        first = energy * summed(tensor_at(groups + 1, True, tl.float64, False) + place * tiles, tiles, BLOCK)
        second = energy * summed(tensor_at(groups + 2, True, tl.float64, False) + place * tiles, tiles, BLOCK)
        former, growth = second - first, reached - second
        growth = tl.where(growth < 0.0, 0.0, growth)
        ratio = growth / tl.where(former < 1e-300, 1e-300, former)
        ratio = tl.where(ratio > SLOWEST, SLOWEST, ratio)
        left_to_gain = growth * ratio / (1.0 - ratio)
    tl.store(gap + residual, left_to_gain)


def shifted_truncation(groups: Sequence[ResidualGroup], mixing: Tensor, effort: Effort) -> list[ShiftedFactors]:
    """See :class:`r2m_kernels._interface.ShiftedTruncation`; components come in no order.

    Groups of as many steps go together: what makes their vectors orthonormal is small, and one launch serves them all.
    """
    together: dict[tuple[bool, int], list[int]] = {}
    for place, group in enumerate(groups):
        sides = len(group.bases[0]), group.bases[0].numel() // len(group.bases[0])
        steps = effort.iterations + next((extra for below, extra in EXTRA_STEPS if group.rank < below), 0)
        together.setdefault((vectors_fit(min(sides)), steps), []).append(place)
    made: dict[int, ShiftedFactors] = {}
    for (_, steps), places in together.items():
        found = _in_lock_step([groups[place] for place in places], mixing, steps, effort.products)
        made.update(zip(places, found, strict=True))
    return [made[place] for place in range(len(groups))]


class _Residuals:
    """Those of one shape at work.

    Attributes:
        unit, lengths: (L, N, N) mixing to norm 1, columns are experts, and (L, N) norms.
        keys: (L,) int64.
        kept: squares of what each step's first product kept, and the last one.
    """

    def __init__(self, group: ResidualGroup) -> None:
        self.inputs, self.rank = matrix_group(group.bases, group.experts), group.rank
        m = len(group.bases[0])
        self.sides = m, group.bases[0].numel() // m
        self.tall, self.short = self.sides[0] >= self.sides[1], min(self.sides)
        self.shape = len(group.bases), len(group.experts)
        self.unit = self.lengths = self.keys = torch.empty(0)
        self.kept: list[Tensor] = []

    @property
    def sort(self) -> tuple[int, int, int]:
        """Of the blocks of its vectors."""
        return self.shape[0] * self.shape[1], self.rank, self.short

    def sketched(self, rows: Tensor) -> None:
        """The sketch on the short side, into ``rows``."""
        sketch(self.inputs, self.unit, self.keys, self.rank, self.tall, rows)

    def step(self, basis: Tensor, rows: Tensor, half: bool) -> None:
        """AᵀA of a basis, shifted, into ``rows``."""
        outside = self.short - self.rank
        product, squares = multiply(self.inputs, self.unit, basis, not self.tall, "fp16", half=half)
        self.kept.append(squares)
        shift = Shift(squares, SHIFT / outside, basis)
        multiply(self.inputs, self.unit, product, self.tall, "fp16", shift, out=rows)

    def factors(self, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Of both sides, as rows."""
        product, squares = multiply(self.inputs, self.unit, basis, not self.tall, "fp16", lengths=self.lengths)
        self.kept.append(squares)
        return (product, basis) if self.tall else (basis, product)


def _in_lock_step(groups: Sequence[ResidualGroup], mixing: Tensor, steps: int, products: bool) -> list[ShiftedFactors]:
    work = [_Residuals(group) for group in groups]
    device, dtype = work[0].inputs.device, work[0].inputs.compute_dtype
    half = dtype == torch.float32
    numbers = [torch.cat([group.energies.flatten() for group in groups])]
    for group in groups:
        # Scaled to norm 1: operands fit float16 then, and squares of large and small residuals fit float32.
        present = group.energies > SMALLEST_ENERGY
        scales = torch.where(present, group.energies, torch.inf).rsqrt()
        unit = mixing.to(scales) * scales.unsqueeze(1)  # columns are experts
        numbers += [unit.to(dtype), torch.where(present, group.energies, 0.0).sqrt().to(dtype), group.keys]
    energies, *numbers = on_device(numbers, device)
    for place, one in enumerate(work):
        one.unit, one.lengths, one.keys = numbers[3 * place : 3 * place + 3]
    blocks = Blocks([one.sort for one in work], device)

    def of_each(vectors: Tensor) -> list[Tensor]:
        return [
            rows.view(*one.shape, *rows.shape[1:]) for one, rows in zip(work, blocks.of_sorts(vectors), strict=True)
        ]

    def orthonormal(vectors: Tensor, last: bool) -> list[Tensor]:
        # Only the span of a basis matters to what follows it, but for the last one.
        passes, scale = (2, None) if last else (1, SCALE if half else None)
        return of_each(blocks.orthonormal(vectors, passes, scale))

    vectors = blocks.vectors(dtype)
    for one, rows in zip(work, of_each(vectors), strict=True):
        one.sketched(rows)
    bases = orthonormal(vectors, steps == 0)
    for step in range(steps):
        vectors = blocks.vectors(dtype)
        for one, basis, rows in zip(work, bases, of_each(vectors), strict=True):
            one.step(basis, rows, half)
        bases = orthonormal(vectors, step + 1 == steps)
    sides = [one.factors(basis) for one, basis in zip(work, bases, strict=True)]
    return [
        ShiftedFactors(left.transpose(-1, -2), right, False, inner_products(left, right) if products else None, *judged)
        for (left, right), judged in zip(sides, _judged(work, energies), strict=True)
    ]


def _judged(work: Sequence[_Residuals], energies: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each group whether truncations can be relied on, their gaps, and their energies: (L, N) each."""
    reached, gap = torch.empty_like(energies), torch.empty_like(energies)
    trusted, config = torch.empty_like(energies, dtype=torch.int8), launch.sums()
    rows, count = [], 0
    known = len(work[0].kept) > 2
    for one in work:
        count += one.shape[0] * one.shape[1]
        before, last, final = one.kept[-3:] if known else (one.kept[-1],) * 3
        addresses = [squares.data_ptr() for squares in (before, last, final)]
        rows.append([count, *addresses, last.shape[-1], final.shape[-1]])
    launch.start(
        judge_kernel,
        (count,),
        config,
        energies,
        torch.tensor(rows).to(energies.device, non_blocking=True),
        reached,
        trusted,
        gap,
        STEEP=STEEP,
        SLOWEST=SLOWEST,
        KNOWN=known,
        JUDGED=JUDGED,
        BLOCK=config.block,
    )
    sizes, shapes = [one.shape[0] * one.shape[1] for one in work], [one.shape for one in work]
    each = [torch.split(numbers, sizes) for numbers in (trusted.view(torch.bool), gap, reached)]
    return [
        (some.view(shape), of_gap.view(shape), of_energy.view(shape))
        for some, of_gap, of_energy, shape in zip(*each, shapes, strict=True)
    ]
