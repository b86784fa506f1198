"""Subspaces from AᵀA alone, formed once: where much is kept of a spectrum that falls slowly (README §4).

1. K = AᵀA, float16 as A is, of every residual that is kept;
2. V = orth(SᵀK), S random signs: a whole step of subspace iteration without a product;
3. V ← orth(V (K − a)), one step fewer than from a sketch of A.

Only the span of a basis matters to what follows it, and operands are rounded to 11 bits anyway: so bases are made
orthonormal in operands of 11 bits, too. What that and K lose of directions that hardly stand out, pivots tell: of a row
of length 1 the square of what the rows before it do not have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._stream.blocks import padded
from . import launch
from .addresses import known_multiple, row_stride, tensor_at
from .residuals import SHAPE, Kept, Matrices, Residuals, shape_of, shape_with, sides_of, tiles_of
from .sums import summed
from .units import quick_pass, unit_rows

# K is no more work than what it saves where the rank is more than this share of the short side (sketch and two steps
# are 5 products of rank · long · short, K is one of short² · long, but the former wait for memory and the L2 cache).
LEAST_SHARE = 1 / 12
LEAST_RANK = 16  # below it, matrices are tiny, and steps with A cost nothing either
# Shifts, of the mean energy of the complement: directions there are damped as long as a shift is below their largest
# energy. The last one is all of that, for there is a step less than from a sketch of A.
SHIFT, LAST_SHIFT = 0.8, 1.0
# What a sketch is multiplied with, that has rows of K added up: sums of random signs are no 2⁵ times their rows.
SKETCH_SCALE = 2.0**9


@triton.jit
def residual_gram_kernel(
    residuals,
    out,
    grams,
    SHAPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    DIVISOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """out[b] = residuals[b]ᵀ residuals[b] / DIVISOR, on both sides of the diagonal: a tile on or below it a program.

    grams is the table of what is formed, each shape's source the row of its residuals in theirs.
    """
    grams, place = shape_of(grams, 0, SHAPE)
    short, _, _, _ = sides_of(grams, ALIGNED)
    of_residuals = tensor_at(grams + 7, True, tl.int64, False)
    m, n, _, _ = sides_of(of_residuals, ALIGNED)
    long = tl.maximum(m, n).to(tl.int64)
    tiles = tiles_below(short, ROWS, COLUMNS)
    block, column = place // tiles, (place % tiles).to(tl.int32)
    row, in_row = column * 0, column * 0 + 1
    while column >= in_row:
        column -= in_row
        row += 1
        in_row = row * ROWS // COLUMNS + 1
    rows, columns = row * ROWS + tl.arange(0, ROWS), column * COLUMNS + tl.arange(0, COLUMNS)
    stride = row_stride(short)
    matrix = residuals + known_multiple(tl.load(of_residuals + 8), 16) + block * long * stride
    total = tl.zeros((ROWS, COLUMNS), COMPUTE)
    for start in range(0, long, INNER):
        depth = start + tl.arange(0, INNER)
        line, inside = matrix + depth[:, None].to(tl.int64) * stride, (depth < long)[:, None]
        left = tl.load(line + rows[None, :], mask=inside & (rows < short)[None, :], other=0.0)
        right = tl.load(line + columns[None, :], mask=inside & (columns < short)[None, :], other=0.0)
        total = tl.dot(tl.trans(left).to(DOT), right.to(DOT), total, input_precision=PRECISION, out_dtype=COMPUTE)
    made = (total * (1.0 / DIVISOR)).to(out.dtype.element_ty)
    out += known_multiple(tl.load(grams + 8), 16) + block * short.to(tl.int64) * stride
    # Every number has one program: sums on the other side of the diagonal may be rounded in another order.
    below = (rows < short)[:, None] & (columns[None, :] <= rows[:, None])
    tl.store(out + rows[:, None].to(tl.int64) * stride + columns[None, :], made, mask=below)
    above = (rows < short)[None, :] & (columns[:, None] < rows[None, :])
    tl.store(out + columns[:, None].to(tl.int64) * stride + rows[None, :], tl.trans(made), mask=above)


@triton.jit
def tiles_below(short, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """How many tiles of a square have a number on the diagonal or below it; COLUMNS is a multiple of ROWS."""
    rows, EACH = tl.cdiv(short, ROWS), COLUMNS // ROWS
    whole = rows // EACH  # EACH rows of tiles have one tile, as many two, …
    return EACH * (whole * (whole + 1) // 2) + rows % EACH * (whole + 1)


@triton.jit(do_not_specialize=["count"])
def shift_kernel(reached, amounts, shapes, count, SHAPE: tl.constexpr, DAMPING: tl.constexpr, BLOCK: tl.constexpr):
    """amounts[b] = DAMPING · (1 − Σ reached[b]) / (short side − k), 0 where that is negative; reached as tiles."""
    block = tl.program_id(0).to(tl.int64)
    shapes = shape_with(shapes, block, count, SHAPE)
    first_tensor, tiles, start = tiles_of(shapes, block, count, SHAPE)
    short, _, k, _ = sides_of(shapes, False)
    left_out = 1.0 - summed(reached + start + (block - first_tensor * count) * tiles, tiles, BLOCK)
    amount = left_out * DAMPING / (short - k).to(tl.float64)
    tl.store(amounts + block, tl.where(amount < 0.0, 0.0, amount).to(tl.float32))  # a NaN stays one


def worth_it(short: int, rank: int) -> bool:
    """Whether K is no more work than what it saves, and numbers of a block of vectors have 32-bit places."""
    return rank >= max(LEAST_SHARE * short, LEAST_RANK) and rank * padded(short) < 2**31


class Grams(Kept):
    """AᵀA of residuals that are kept: square, times :data:`.addresses.SCALE` as they are, and none above 1."""

    def __init__(self, residuals: Residuals) -> None:
        target = launch.target_of(residuals.device)
        self._config = launch.residual_gram(target)
        # What pairs are summed with takes registers that a wide tile has not.
        product = launch.residual_product(target, residuals.dtype, residuals.aligned, rank=0)
        rows, squares = self._config.rows, []
        row_bytes = SHAPE * residuals.table.element_size()
        for place, one in enumerate(residuals.shapes):
            short = min(one.m, one.n)
            tiles = sum(row * rows // self._config.columns + 1 for row in range(-(-short // rows)))
            programs = one.tensors * residuals.count * tiles
            source = residuals.table.data_ptr() + place * row_bytes
            squares.append(Matrices(one.tensors, short, short, one.rank, source, programs))
        super().__init__(squares, product, residuals.count, residuals.dtype, residuals.device, residuals.aligned)
        self._of = residuals

    def form(self) -> None:
        """Of residuals that have been formed."""
        config = self._config
        self.numbers = torch.empty(self.size, dtype=self.operand, device=self.device)
        launch.start(
            residual_gram_kernel,
            (self.forming,),
            config,
            *(self._of.numbers, self.numbers, self.table),
            SHAPE=SHAPE,
            COMPUTE=tl.float32,
            DOT=self.multiplied,
            PRECISION=config.input_precision,
            DIVISOR=self.scale,
            ALIGNED=config.aligned,
            ROWS=config.rows,
            COLUMNS=config.columns,
            INNER=config.inner,
        )

    def shifts(self, reached: Tensor, damping: float) -> Tensor:
        """Of every block, ``damping`` of the mean energy of what a basis leaves out: (blocks,) float32."""
        amounts, config = torch.empty(self.short.count, dtype=torch.float32, device=self.device), launch.sums()
        grid = (self.short.count,)
        numbers = (reached, amounts, self.table, self.count)
        launch.start(shift_kernel, grid, config, *numbers, SHAPE=SHAPE, DAMPING=damping, BLOCK=config.block)
        return amounts


def subspaces(residuals: Residuals, keys: Tensor, steps: int) -> tuple[Tensor, Tensor, Sequence[Tensor], Tensor, Grams]:
    """Of residuals that are kept.

    Args:
        keys: (tensors,) int64, on the device.
        steps: beside the first one.

    Returns:
        Bases as operands, times SCALE, and float32; of each step how much of every residual its basis had, tile by
        tile of the Grams; the least pivot of every block, (blocks,) float32; and the Grams, which are given back.
    """
    grams = Grams(residuals)
    grams.form()
    blocks, reached = grams.short, list[Tensor]()
    pivots = torch.ones(blocks.count, dtype=torch.float32, device=residuals.device)
    units = unit_rows(blocks, grams.sketch(keys, SKETCH_SCALE), vector_scale=SKETCH_SCALE)
    basis, _ = quick_pass(blocks, units, pivots)
    for left in reversed(range(steps)):
        product, energies = grams.along(basis, paired=True)
        amounts = grams.shifts(energies, SHIFT if left else LAST_SHIFT)
        units = unit_rows(blocks, product, amounts, basis, grams.scale)
        basis, _ = quick_pass(blocks, units, pivots)
        reached.append(energies)
    grams.forget()
    basis, exact = quick_pass(blocks, basis, pivots, last=True)
    assert exact is not None
    return basis, exact, reached, pivots, grams
