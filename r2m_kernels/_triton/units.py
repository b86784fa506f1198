"""Blocks of rows of length 1 as float16 operands, made orthonormal on the matrix units: CholeskyQR of rounded rows.

A pass takes the Gram matrix of what is stored, whose products are exact and summed in float32, its inverse factor T,
and V = U + (T − I) U. Only T − I is rounded to float16: V is orthonormal to about 2⁻¹² ‖U‖ over the smallest diagonal
of the factor, and a second pass, of V rounded, leaves 2⁻¹² of that, but no less than float32 sums. Where a row is
nearly in the span of those before it, that is not enough: pivots say so, and :meth:`.orthonormalize.Blocks.orthonormal`
is for those.

Between the rows of units, which start at multiples of 16 numbers, are zeros: products run over them. A block has fewer
than 2³¹ numbers, as a matrix has whose short side is at most 46,340.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .addresses import SCALE, known_multiple, row_stride
from .orthonormalize import SORT, Blocks, eliminated, lower_tile, sort_of

# Squares of rows that are not above it lose digits to underflow: such rows count as zero.
SMALLEST_SQUARE = 1e-30
# The smallest pivot that is trusted: 2⁻⁸ of a row's length, which leaves float16's eleven bits three. Blocks with one
# below it are left as they are, so that nothing overflows that is made of them.
LEAST_PIVOT = 2.0**-16
# What T − I is multiplied with before it is rounded: in the second pass its numbers are 10⁻⁵ and less, where float16
# has fewer digits, and no number of T is above 2¹² where rows are fit for this.
TRIANGLE_SCALE = 2.0**4


@triton.jit
def differences(vectors, subtracted, amount, places, length, VECTOR_SCALE: tl.constexpr, SCALE: tl.constexpr):
    """Some numbers of a row, less a multiple of another row; subtracted: None where there is none."""
    found = tl.load(vectors + places, mask=places < length, other=0.0).to(tl.float32)
    if VECTOR_SCALE != 1.0:
        found *= 1.0 / VECTOR_SCALE
    if subtracted is not None:
        other = tl.load(subtracted + places, mask=places < length, other=0.0).to(tl.float32)
        found -= amount * (other * (1.0 / SCALE))
    return found


@triton.jit(do_not_specialize=["most"])
def unit_rows_kernel(
    vectors,
    amounts,
    subtracted,
    out,
    sorts,
    most,
    SORT: tl.constexpr,
    VECTOR_SCALE: tl.constexpr,
    SCALE: tl.constexpr,
    SMALLEST: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """SCALE · w / ‖w‖ of every row w = vectors / VECTOR_SCALE − amounts[b] · subtracted / SCALE: one a program.

    A row whose square is not above SMALLEST becomes zeros, one whose square is beyond float32 NaN. ``most`` rows a
    block, of the largest.
    """
    row, index = tl.program_id(0) % most, (tl.program_id(0) // most).to(tl.int64)
    block, k, length, of_vectors, _, _, _ = sort_of(sorts, index, SORT)
    stride = row_stride(length)
    first = known_multiple(of_vectors, 16) + (block * k + row) * stride
    if ALIGNED:
        length = known_multiple(length, 8)
    if row < k:  # others of the launch have more rows
        vectors, out, amount = vectors + first, out + first, 0.0
        if subtracted is not None:
            subtracted, amount = subtracted + first, tl.load(amounts + index)
        places = tl.arange(0, BLOCK)
        start = differences(vectors, subtracted, amount, places, length, VECTOR_SCALE, SCALE)  # stays in registers
        square = tl.sum(start * start, axis=0)
        for at in range(BLOCK, length, BLOCK):
            rest = differences(vectors, subtracted, amount, at + places, length, VECTOR_SCALE, SCALE)
            square += tl.sum(rest * rest, axis=0)
        # Numbers of a row that short are zero in float16 as they are; one over the root of infinity would be zero.
        square = tl.where(square <= SMALLEST, 1.0, square)
        factor = tl.where(square < float("inf"), 1.0 / tl.sqrt(square), float("nan"))
        tl.store(out + places, (start * factor * SCALE).to(out.dtype.element_ty), mask=places < stride)
        for at in range(BLOCK, stride, BLOCK):
            rest = differences(vectors, subtracted, amount, at + places, length, VECTOR_SCALE, SCALE)
            tl.store(out + at + places, (rest * factor * SCALE).to(out.dtype.element_ty), mask=at + places < stride)


@triton.jit(do_not_specialize=["pairs"])
def units_gram_kernel(
    units,
    gram,
    sorts,
    pairs,
    SORT: tl.constexpr,
    COMPUTE: tl.constexpr,
    DOT: tl.constexpr,
    DIVISOR: tl.constexpr,
    SIDE: tl.constexpr,
    INNER: tl.constexpr,
):
    """gram[b] = units[b] units[b]ᵀ / DIVISOR, the tiles of the lower triangle, one a program; zeros between rows."""
    block, k, length, of_units, _, _, of_gram = sort_of(sorts, (tl.program_id(0) // pairs).to(tl.int64), SORT)
    row, column = lower_tile(tl.program_id(0) % pairs)
    stride, width = row_stride(length), row_stride(k)
    rows, columns = row * SIDE + tl.arange(0, SIDE), column * SIDE + tl.arange(0, SIDE)
    units += known_multiple(of_units, 16) + block * k * stride
    gram += known_multiple(of_gram, 16) + block * k * width
    total = tl.zeros((SIDE, SIDE), COMPUTE)
    for start in range(0, tl.where(row * SIDE < k, stride, 0), INNER):  # others of the launch have more tiles
        depth = start + tl.arange(0, INNER)
        inside = (depth < stride)[None, :]
        left = tl.load(units + rows[:, None] * stride + depth[None, :], mask=(rows < k)[:, None] & inside, other=0.0)
        here = (columns < k)[:, None] & inside
        right = tl.load(units + columns[:, None] * stride + depth[None, :], mask=here, other=0.0)
        total = tl.dot(left.to(DOT), tl.trans(right).to(DOT), total, input_precision="ieee", out_dtype=COMPUTE)
    inside = (rows < k)[:, None] & (columns < width)[None, :]
    tl.store(gram + rows[:, None] * width + columns[None, :], total * (1.0 / DIVISOR), mask=inside)


@triton.jit
def units_factor_kernel(
    gram,
    out,
    pivots,
    sorts,
    SORT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE: tl.constexpr,
    LEAST: tl.constexpr,
    ROWS: tl.constexpr,
    SIDE: tl.constexpr,
):
    """out[b] = SCALE · (T − I) with T gram[b] Tᵀ = I, lower triangular: a matrix a program, SIDE columns at a time.

    In place of gram[b] come its factor L, below blocks on the diagonal, and Tᵀ on and above them. Block (i, j) of both
    is what of the Gram matrix is there, none of it above the diagonal, less Σ_q M_iq M_jqᵀ over the blocks q < j that
    M has already, times T_jjᵀ; ROWS, whole blocks, are made at once.

    pivots[b] is lowered to the smallest pivot of gram[b], 0 for one that is below LEAST or no number, unless the matrix
    is zero. Where it was 0 nothing is made.
    """
    index = tl.program_id(0).to(tl.int64)
    matrix, k, _, _, _, _, of_gram = sort_of(sorts, index, SORT)
    width = row_stride(k)
    first = known_multiple(of_gram, 16) + matrix * k * width
    gram, out, places = gram + first, out + first, tl.arange(0, SIDE)
    same = places[:, None] == places[None, :]
    smallest, trace, before = 4.0, 0.0, tl.load(pivots + index)  # of unit rows no pivot is as large
    for j in range(tl.where(before > 0.0, tl.cdiv(k, SIDE), 0)):
        made = j * SIDE  # rows of T, and columns of L
        own = made + places
        at_own, at_block = own[:, None] * width, (own < k)[:, None] & (own < width)[None, :]
        block = tl.load(gram + at_own + own[None, :], mask=at_block, other=0.0)
        trace += tl.sum(tl.sum(tl.where(same, block, 0.0), axis=1), axis=0)
        sums = tl.zeros((SIDE, SIDE), COMPUTE)
        for start in range(0, made, SIDE):
            done = tl.load(gram + at_own + start + places[None, :], mask=(own < k)[:, None], other=0.0)
            sums = tl.dot(done, tl.trans(done), sums, input_precision=PRECISION, out_dtype=COMPUTE)
        inverse = eliminated(block - sums, tl.minimum(SIDE, k - made), LEAST, SIDE)
        square = tl.sum(tl.where(same, inverse * inverse, 0.0), axis=1)
        fit = (square * LEAST < 0.99) & (square > 0.0)  # of a NaN neither is true
        pivot = tl.where(fit, 1.0 / tl.where(fit, square, 1.0), 0.0)
        smallest = tl.minimum(smallest, tl.min(tl.where(own < k, pivot, 4.0), axis=0))
        tl.store(gram + at_own + own[None, :], tl.trans(inverse), mask=at_block)
        beside = (inverse - tl.where(same, 1.0, 0.0)) * SCALE
        tl.store(out + at_own + own[None, :], beside.to(out.dtype.element_ty), mask=at_block)
        tiles_above = tl.cdiv(made, ROWS)
        for tile in range(tiles_above + tl.cdiv(tl.maximum(k - made - SIDE, 0), ROWS)):
            above = tile < tiles_above
            top = tl.where(above, tile * ROWS, made + SIDE + (tile - tiles_above) * ROWS)
            rows, last = top + tl.arange(0, ROWS), tl.where(above, made, k)
            at_rows = rows[:, None] * width
            taken = tl.zeros((ROWS, SIDE), COMPUTE)
            for start in range(tl.where(above, top, 0), made, SIDE):
                # Left of its blocks on the diagonal Tᵀ is zero, and L is there.
                there = rows < tl.where(above, tl.minimum(start + SIDE, made), k)
                left = tl.load(gram + at_rows + start + places[None, :], mask=there[:, None], other=0.0)
                right = tl.load(gram + at_own + start + places[None, :], mask=(own < k)[:, None], other=0.0)
                taken = tl.dot(left, tl.trans(right), taken, input_precision=PRECISION, out_dtype=COMPUTE)
            below = (rows < tl.where(above, 0, k))[:, None] & (own < width)[None, :]
            given = tl.load(gram + at_rows + own[None, :], mask=below, other=0.0) - taken
            found = tl.dot(given, tl.trans(inverse), input_precision=PRECISION, out_dtype=COMPUTE)
            here = (rows < last)[:, None] & (own < width)[None, :]
            tl.store(gram + at_rows + own[None, :], found, mask=here)
            if above:
                tl.store(out + at_rows + own[None, :], tl.zeros((ROWS, SIDE), out.dtype.element_ty), mask=here)
                across = (own < k)[:, None] & (rows < made)[None, :]
                tl.store(out + at_own + rows[None, :], tl.trans(found * SCALE).to(out.dtype.element_ty), mask=across)
        tl.debug_barrier()
    tl.store(pivots + index, tl.where(smallest < before, smallest, before), mask=trace != 0.0)


@triton.jit(do_not_specialize=["row_tiles", "column_tiles"])
def units_product_kernel(
    triangle,
    units,
    pivots,
    out,
    whole,
    sorts,
    row_tiles,
    column_tiles,
    SORT: tl.constexpr,
    COMPUTE: tl.constexpr,
    DOT: tl.constexpr,
    SCALE: tl.constexpr,
    TRIANGLE_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """out[b] = units[b] + triangle[b] units[b] / TRIANGLE_SCALE, in operands; whole (or None) the same over SCALE.

    The triangle is lower: its blocks of zeros are not read, nor is any of one that has no pivots.
    """
    column_tile, rest = tl.program_id(0) % column_tiles, tl.program_id(0) // column_tiles
    row_tile, index = rest % row_tiles, (rest // row_tiles).to(tl.int64)
    block, k, length, of_units, _, _, of_triangle = sort_of(sorts, index, SORT)
    stride, width = row_stride(length), row_stride(k)
    first = known_multiple(of_units, 16) + block * k * stride
    units, out = units + first, out + first
    triangle += known_multiple(of_triangle, 16) + block * k * width
    k = tl.where(column_tile * COLUMNS < length, k, 0)  # others of the launch have more tiles
    rows, columns = row_tile * ROWS + tl.arange(0, ROWS), column_tile * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), COMPUTE)
    made = (row_tile * ROWS < k) & (tl.load(pivots + index) > 0.0)
    for start in range(0, tl.where(made, tl.minimum(k, (row_tile + 1) * ROWS), 0), INNER):
        depth = start + tl.arange(0, INNER)
        inside = (rows < k)[:, None] & (depth < width)[None, :]
        left = tl.load(triangle + rows[:, None] * width + depth[None, :], mask=inside, other=0.0)
        inside = (depth < k)[:, None] & (columns < stride)[None, :]
        right = tl.load(units + depth[:, None] * stride + columns[None, :], mask=inside, other=0.0)
        total = tl.dot(left.to(DOT), right.to(DOT), total, input_precision="ieee", out_dtype=COMPUTE)
    inside = (rows < k)[:, None] & (columns < stride)[None, :]
    where = rows[:, None] * stride + columns[None, :]
    total = tl.load(units + where, mask=inside, other=0.0).to(COMPUTE) + total * (1.0 / TRIANGLE_SCALE)
    tl.store(out + where, total.to(out.dtype.element_ty), mask=inside)
    if whole is not None:
        tl.store(whole + first + where, total * (1.0 / SCALE), mask=inside)


def unit_rows(
    blocks: Blocks,
    vectors: Tensor,
    amounts: Tensor | None = None,
    subtracted: Tensor | None = None,
    vector_scale: float = 1.0,
) -> Tensor:
    """Rows of length 1: float16 times :data:`SCALE`, zeros where a row is too short to be divided by its length.

    Args:
        blocks: how all of them lie.
        vectors: float16 or float32, times ``vector_scale``.
        amounts: (blocks,) float32; of ``subtracted``, float16 times :data:`SCALE`, what each block's rows are less.
    """
    aligned = all(length % 8 == 0 for _, _, length in blocks.sorts)
    out, most = blocks.vectors(torch.float16), max(k for _, k, _ in blocks.sorts)
    config = launch.unit_rows(launch.target_of(blocks.device), aligned)
    launch.start(
        unit_rows_kernel,
        (most * blocks.count,),
        config,
        *(vectors, amounts, subtracted, out, blocks.table, most),
        SORT=SORT,
        VECTOR_SCALE=vector_scale,
        SCALE=SCALE,
        SMALLEST=SMALLEST_SQUARE,
        ALIGNED=config.aligned,
        BLOCK=config.block,
    )
    return out


def quick_pass(blocks: Blocks, units: Tensor, pivots: Tensor, last: bool = False) -> tuple[Tensor, Tensor | None]:
    """Orthonormal rows that span those of every block: float16 times :data:`SCALE`, and with ``last`` in float32 too.

    Args:
        blocks: how all of them lie.
        units: as :func:`unit_rows` and this make them.
        pivots: (blocks,) float32, each lowered to the smallest pivot of its block: what of a row the rows before it
            do not have, squared; 0 below :data:`LEAST_PIVOT` and where there are NaN, and such blocks stay what they
            are. Blocks of zeros stay so and leave theirs.
    """
    target, dot = launch.target_of(blocks.device), launch.multiplied(tl.float16, tl.float32)
    config = launch.units_gram(target)
    gram = torch.empty(blocks.padded_squares, dtype=torch.float32, device=blocks.device)
    across = blocks.tiles(1, config.rows)
    pairs = across * (across + 1) // 2
    launch.start(
        units_gram_kernel,
        (pairs * blocks.count,),
        config,
        *(units, gram, blocks.table, pairs),
        SORT=SORT,
        COMPUTE=tl.float32,
        DOT=dot,
        DIVISOR=SCALE * SCALE,
        SIDE=config.rows,
        INNER=config.inner,
    )
    config, triangle = launch.units_factor(target), torch.empty_like(gram, dtype=torch.float16)
    launch.start(
        units_factor_kernel,
        (blocks.count,),
        config,
        *(gram, triangle, pivots, blocks.table),
        SORT=SORT,
        COMPUTE=tl.float32,
        PRECISION=config.input_precision,
        SCALE=TRIANGLE_SCALE,
        LEAST=LEAST_PIVOT,
        ROWS=config.rows,
        SIDE=config.columns,
    )
    config, out = launch.units_product(target), blocks.vectors(torch.float16)
    whole = blocks.vectors(torch.float32) if last else None
    row_tiles, column_tiles = blocks.tiles(1, config.rows), blocks.tiles(2, config.columns)
    launch.start(
        units_product_kernel,
        (row_tiles * column_tiles * blocks.count,),
        config,
        *(triangle, units, pivots, out, whole, blocks.table, row_tiles, column_tiles),
        SORT=SORT,
        COMPUTE=tl.float32,
        DOT=dot,
        SCALE=SCALE,
        TRIANGLE_SCALE=TRIANGLE_SCALE,
        ROWS=config.rows,
        COLUMNS=config.columns,
        INNER=config.inner,
    )
    return out, whole
