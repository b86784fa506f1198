"""Step 5: the merged tensors in one read of each input and one write (README §6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._stream.blocks import empty_rows
from .._stream.factors import in_bfloat16
from . import launch
from .addresses import Group, block_of, known_multiple, loaded, padded_rows, tensor_at, tile_of, vectors_fit
from .outputs import Outputs, representable, write_rounded, write_tile

ROWS_OF_A_TILE = 4  # where each row has coefficients of its own


@triton.jit
def merged_inputs(
    slots,
    core,
    offsets,
    inside,
    count,
    TYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BY_ROW: tl.constexpr,
):
    """θ₀ + Σ_j core_j (θ_j − θ₀) at these offsets; an expert whose coefficient is 0 is not read.

    With BY_ROW each row of a tile has coefficients of its own, and ``core`` is a block of pointers to the first ones.
    """
    theta = loaded(slots, offsets, inside, TYPE, COMPUTE, ALIGNED)
    total = theta
    for j in range(count):
        weight = tl.load(core + j)
        expert = tensor_at(slots + 1 + j, True, TYPE, ALIGNED)  # loaded in a branch, it spills with Triton 3.6.0
        if BY_ROW:
            total += weight[:, None] * (tl.load(expert + offsets, mask=inside, other=0.0).to(COMPUTE) - theta)
        elif weight != 0.0:
            total += weight * (tl.load(expert + offsets, mask=inside, other=0.0).to(COMPUTE) - theta)
    return total


@triton.jit
def coefficients_of(core, tensor, rows, m, count, BY_ROW: tl.constexpr):
    """Where the coefficients of these rows start: core is (L, m, N) BY_ROW, else (N,)."""
    # Rows beyond the last are given its coefficients, and are written nowhere.
    return core + tensor * m * count + tl.minimum(rows, m - 1) * count if BY_ROW else core


@triton.jit(do_not_specialize=["elements", "count"])
def combine_vector_kernel(
    table,
    outputs,
    largest,
    core,
    elements: tl.int64,
    count,
    TYPE: tl.constexpr,
    OUTPUT: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[l] = θ₀ + Σ_j core_j τ_lj for tensors without a low-rank term, a block of elements a program."""
    offsets, inside = block_of(elements, TYPE, ALIGNED, BLOCK)
    slots = table + tl.program_id(1).to(tl.int64) * (count + 1)
    total = merged_inputs(slots, core, offsets, inside, count, TYPE, COMPUTE, ALIGNED, False)
    write_rounded(total, outputs, largest, offsets, inside, OUTPUT, COMPUTE, ALIGNED)


@triton.jit(do_not_specialize=["m", "n", "count", "column_tiles"])
def combine_rows_kernel(
    table,
    outputs,
    largest,
    core,
    m,
    n,
    count,
    column_tiles,
    TYPE: tl.constexpr,
    OUTPUT: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[l] = θ₀ + Σ_j core[l, row, j] τ_lj, a tile a program."""
    tensor = tl.program_id(1).to(tl.int64)
    rows, _, offsets, inside = tile_of(m, n, column_tiles, TYPE, ALIGNED, ROWS, COLUMNS)
    core = coefficients_of(core, tensor, rows, m, count, True)
    total = merged_inputs(table + tensor * (count + 1), core, offsets, inside, count, TYPE, COMPUTE, ALIGNED, True)
    write_rounded(total, outputs, largest, offsets, inside, OUTPUT, COMPUTE, ALIGNED)


@triton.jit(do_not_specialize=["m", "n", "rank", "count", "left_stride", "right_stride", "column_tiles"])
def combine_matrix_kernel(
    table,
    outputs,
    largest,
    core,
    scale,
    left,
    right,
    squares,
    m,
    n,
    rank,
    count,
    left_stride,
    right_stride,
    column_tiles,
    TYPE: tl.constexpr,
    OUTPUT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    BY_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """out[l] = θ₀ + Σ_j core_j τ_lj + Σ_i scale_i left[l, i]ᵀ right[l, i], a tile a program.

    table (L, N + 1), outputs (L,), core (N,) or (L, m, N) BY_ROW, scale (N,), left (L, N, rank, m), right
    (L, N, rank, n); squares[l, tile] = sum of the squares of the tile's low-rank term, float64.
    """
    tensor = tl.program_id(1).to(tl.int64)
    row_tile, column_tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    if ALIGNED:
        n = known_multiple(n, 128 // TYPE.primitive_bitwidth)
    left_stride, right_stride = known_multiple(left_stride, 16), known_multiple(right_stride, 16)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    steps = tl.cdiv(rank, INNER)
    # Whole vectors of left factors are read, the last one with zeros beyond m: which kernel a matrix meets must not
    # depend on how many of its rows come at once.
    vectors = known_multiple(m + 3, 4)
    total = tl.zeros((ROWS, COLUMNS), COMPUTE)
    for step in range(count * steps):
        i, depth = step // steps, (step % steps) * INNER + tl.arange(0, INNER)
        where = (tensor * count + i) * rank + depth[:, None]
        lefts = tl.load(
            left + where * left_stride + rows[None, :], mask=(depth < rank)[:, None] & (rows < vectors)[None, :]
        )
        rights = tl.load(
            right + where * right_stride + columns[None, :], mask=(depth < rank)[:, None] & (columns < n)[None, :]
        )
        # Masked entries hold anything: zero them on both sides, since NaN · 0 is NaN.
        lefts = tl.where((depth < rank)[:, None] & (rows < vectors)[None, :], lefts, 0.0) * tl.load(scale + i)
        rights = tl.where((depth < rank)[:, None] & (columns < n)[None, :], rights, 0.0)
        total = tl.dot(tl.trans(lefts), rights, total, input_precision=PRECISION, out_dtype=COMPUTE)
    wide = total.to(tl.float64)  # 0 outside
    square = tl.sum(tl.sum(wide * wide, axis=1), axis=0)
    tl.store(squares + tensor * tl.num_programs(0) + tl.program_id(0), square)
    offsets = rows[:, None].to(tl.int64) * n + columns[None, :]
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    core = coefficients_of(core, tensor, rows, m, count, BY_ROW)
    total += merged_inputs(table + tensor * (count + 1), core, offsets, inside, count, TYPE, COMPUTE, ALIGNED, BY_ROW)
    write_rounded(total, outputs, largest, offsets, inside, OUTPUT, COMPUTE, ALIGNED)


@triton.jit
def merged_at_once(
    slots,
    core,
    offsets,
    inside,
    count,
    TYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BY_ROW: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """:func:`merged_inputs` of at most INPUTS experts, loaded at once: nothing branches, or waits for an address."""
    theta = loaded(slots, offsets, inside, TYPE, COMPUTE, ALIGNED)
    total = theta
    one = tl.arange(0, 1)
    if not BY_ROW:
        core += one  # a block of one row, which stands for all
    for j in tl.static_range(INPUTS):
        weight = tl.load(core + j, mask=one + j < count, other=0.0)[:, None]
        expert = tensor_at(slots + 1 + j, j < count, TYPE, ALIGNED)
        total += weight * (tl.load(expert + offsets, mask=inside & (weight != 0.0), other=0.0).to(COMPUTE) - theta)
    return total


@triton.jit
def halved(tile):
    """The left and the right half of a tile's columns: on the matrix units' layout other names of registers."""
    rows: tl.constexpr = tile.shape[0]
    half: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, half)), (0, 2, 1)))


@triton.jit
def all_halved(tiles):
    """Twice as many tiles, of half as many columns, from the left to the right."""
    halves = ()
    for i in tl.static_range(len(tiles)):
        halves += halved(tiles[i])
    return halves


@triton.jit(do_not_specialize=["m", "n", "rank", "count", "left_stride", "right_stride", "column_tiles"])
def combine_rounded_kernel(
    table,
    outputs,
    largest,
    core,
    left,
    right,
    squares,
    m,
    n,
    rank,
    count,
    left_stride,
    right_stride,
    column_tiles,
    TYPE: tl.constexpr,
    OUTPUT: tl.constexpr,
    COMPUTE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    BY_ROW: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PIECES: tl.constexpr,
):
    """out[l] = θ₀ + Σ_j core_j τ_lj + left[l]ᵀ right[l], a tile a program: factors are bfloat16, their products exact.

    As :func:`combine_matrix_kernel`, but left (L, rank, m) and right (L, rank, n): the components of all experts are
    those of one product. A tile's columns are finished in PIECES, 8 at most: all inputs at once would take more
    registers than there are.
    """
    tensor = tl.program_id(1).to(tl.int64)
    row_tile, column_tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    left_stride, right_stride = known_multiple(left_stride, 16), known_multiple(right_stride, 16)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    # Whole vectors are read, to where rows are padded: what lies there meets no number that is written.
    row_inside, column_inside = rows < known_multiple(m + 7, 8), columns < known_multiple(n + 7, 8)
    total = tl.zeros((ROWS, COLUMNS), COMPUTE)
    for start in range(0, rank, INNER):
        depth = start + tl.arange(0, INNER)
        where, inside = tensor * rank + depth, depth < rank
        # Loaded as the operand that it is: what is transposed afterwards is not loaded ahead on sm_80.
        lefts = tl.load(
            left + where[None, :] * left_stride + rows[:, None],
            mask=row_inside[:, None] & inside[None, :],
            other=0.0,
        )
        rights = tl.load(
            right + where[:, None] * right_stride + columns[None, :],
            mask=inside[:, None] & column_inside[None, :],
            other=0.0,
        )
        total = tl.dot(lefts.to(DOT), rights.to(DOT), total, input_precision=PRECISION, out_dtype=COMPUTE)

    if ALIGNED:
        n = known_multiple(n, 128 // TYPE.primitive_bitwidth)
    # In float32 within a row of the tile, for want of registers.
    written = tl.where((rows < m)[:, None] & (columns < n)[None, :], total, 0.0)
    square = tl.sum(tl.sum(written * written, axis=1).to(tl.float64))
    tl.store(squares + tensor * tl.num_programs(0) + tl.program_id(0), square)
    slots, out = table + tensor * (count + 1), tensor_at(outputs + tensor, True, OUTPUT, ALIGNED)
    core = coefficients_of(core, tensor, rows, m, count, BY_ROW)
    pieces = (total,)
    if PIECES >= 2:
        pieces = all_halved(pieces)
    if PIECES >= 4:
        pieces = all_halved(pieces)
    if PIECES >= 8:
        pieces = all_halved(pieces)
    bits = tl.zeros((ROWS,), tl.int32)
    WIDTH: tl.constexpr = COLUMNS // PIECES
    for piece in tl.static_range(PIECES):
        some = column_tile * COLUMNS + piece * WIDTH + tl.arange(0, WIDTH)
        inside = (rows < m)[:, None] & (some < n)[None, :]
        offsets = rows[:, None].to(tl.int64) * n + some[None, :]
        if INPUTS == 0:
            merged = merged_inputs(slots, core, offsets, inside, count, TYPE, COMPUTE, ALIGNED, BY_ROW)
        else:
            merged = merged_at_once(slots, core, offsets, inside, count, TYPE, COMPUTE, ALIGNED, BY_ROW, INPUTS)
        found = write_tile(pieces[piece] + merged, out, offsets, inside, OUTPUT, COMPUTE)
        bits = tl.maximum(bits, tl.max(found, axis=1))
    tl.store(largest + tensor * tl.num_programs(0) + tl.program_id(0), tl.max(bits))


def combine(
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    coefficients: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    scale: Tensor | None,
    outs: Sequence[Tensor],
    squares: list[Tensor] | None = None,
) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""
    elements, count = bases[0].numel(), len(experts)
    by_row = coefficients.ndim == 3
    in_rows = by_row or left is not None
    n = elements // max(1, bases[0].shape[0]) if in_rows else elements
    m = elements // max(1, n)
    group = Group(bases, experts, n)
    outputs = Outputs(group, outs, n)
    target, dtype = launch.target_of(group.device), group.compute_dtype
    core = coefficients if by_row else representable(coefficients, dtype)
    core = core.to(dtype).contiguous()
    if left is not None and right is not None:
        rounded = in_bfloat16(left, right, scale, dtype)
        # Factors lie in memory as rows, (L, N, r, m) and (L, N, r, n).
        kind = torch.bfloat16 if rounded else dtype
        lefts, rights = padded_rows(left.to(group.device, kind).mT), padded_rows(right.to(group.device, kind))
        scales, rank = [], lefts.shape[-2]
        if rounded:
            matrix, rank = launch.combine_rounded(target, outputs.aligned, count), count * rank
        else:
            matrix = launch.combine_matrix(target, dtype, outputs.aligned)
            each = torch.ones(count, dtype=dtype) if scale is None else scale
            scales = [each.to(dtype).contiguous()]
            if not vectors_fit(m):
                lefts = empty_rows(lefts.shape[:-1], m, dtype, group.device, zero=True).copy_(lefts)
        column_tiles = -(-n // matrix.columns)
        tiles = -(-m // matrix.rows) * column_tiles
        of_tiles = torch.empty(len(bases), tiles, dtype=torch.float64, device=group.device)
        if squares is not None:
            squares.append(of_tiles)
        operand = launch.multiplied(tl.bfloat16, tl.float32)
        return outputs.write(
            combine_rounded_kernel if rounded else combine_matrix_kernel,
            tiles,
            matrix,
            *(core, *scales, lefts, rights, of_tiles),
            *(m, n, rank, count, lefts.stride(-2), rights.stride(-2), column_tiles),
            PRECISION=matrix.input_precision,
            BY_ROW=by_row,
            ROWS=matrix.rows,
            COLUMNS=matrix.columns,
            INNER=matrix.inner,
            **({"DOT": operand, "INPUTS": matrix.inputs, "PIECES": matrix.pieces} if rounded else {}),
        )
    config = launch.combine_vector(target, outputs.aligned)
    if by_row:
        columns = config.block // ROWS_OF_A_TILE
        column_tiles = -(-n // columns)
        return outputs.write(
            *(combine_rows_kernel, -(-m // ROWS_OF_A_TILE) * column_tiles, config, core, m, n, count, column_tiles),
            ROWS=ROWS_OF_A_TILE,
            COLUMNS=columns,
        )
    tiles = -(-elements // config.block)
    return outputs.write(combine_vector_kernel, tiles, config, core, elements, count, BLOCK=config.block)
