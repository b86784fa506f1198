"""Products with the residuals X_i = Σ_j mixing[j, i] (θ_j − θ₀), which exist in registers only (README §4).

A program owns a tile of rows of the result and up to four experts: it reads a tile of every input once, forms the
experts' residual tiles, and multiplies each with that expert's right-hand side on the matrix units. Blocks of vectors
lie in memory as rows, (N, k, length): tf32 matrix instructions want both operands contiguous along the inner dimension.

Products of a truncation have float16 operands. They are rounded, where matrix units cut tf32 ones off after as many
bits, cost half of what tf32 does, and vectors that are kept as float16 are half the traffic. What is rounded has a norm
that is known, so that a power of two brings it into float16's range: :data:`SCALE`.

The sketch multiplies with random signs that are made in registers too. ±1 is exact in every operand precision, and the
pass waits for memory, not for the matrix units: a sparse test matrix would save nothing here and would need atomics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._stream.blocks import empty_rows
from . import launch
from .addresses import ELEMENT_TYPES, Group, known_multiple, padded_rows, tensor_at, vectors_fit
from .sums import summed

# What numbers of a matrix or vector of norm 1, none above 1, are multiplied with before they become float16: the
# largest has room to spare, and those of a matrix of 10⁹ equal ones are still normal numbers.
SCALE = 2.0**14
# The same of vectors that are rounded as they are read: bases, and others that may be longer than 1.
VECTOR_SCALE = 2.0**8


@triton.jit
def tile_mask(depth, rows, TRANSPOSE: tl.constexpr):
    """The mask of an input's tile: (depth, rows) with TRANSPOSE, else (rows, depth)."""
    return depth[:, None] & rows[None, :] if TRANSPOSE else rows[:, None] & depth[None, :]


@triton.jit
def mixed_bits(x):
    """A 32-bit hash: every input bit changes half of the output's (two rounds of xor-shift and odd multiplier)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_signs(key, rows, columns):
    """±1 for every (row, column), independent for all practical purposes; a function of the 64-bit key and the two."""
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    bits = mixed_bits(mixed_bits(rows.to(tl.uint32) ^ low) + columns.to(tl.uint32) * 0x9E3779B1 + high)
    return 1.0 - 2.0 * (bits >> 31).to(tl.float32)


@triton.jit(do_not_specialize=["m", "n", "k", "count", "rhs_stride", "out_stride", "energy_tiles"])
def residual_matmul_kernel(
    table,
    mixing,
    rhs,
    out,
    squares,
    energies,
    shifted,
    lengths,
    damping,
    m,
    n,
    k,
    count,
    rhs_stride,
    out_stride,
    energy_tiles,
    TYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    OPERAND: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    SIGNS: tl.constexpr,
    SHIFTED: tl.constexpr,
    LENGTHS: tl.constexpr,
    ROUNDED: tl.constexpr,
    RESIDUAL_SCALE: tl.constexpr,
    RHS_SCALE: tl.constexpr,
    SHIFTED_SCALE: tl.constexpr,
    OUT_SCALE: tl.constexpr,
    ALIGNED: tl.constexpr,
    INPUTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[l, i] = (X_li rhs[l, i]ᵀ − shift_li · shifted[l, i]ᵀ)ᵀ for a block of experts i; X_liᵀ with TRANSPOSE.

    table (L, N + 1), mixing (L, N, N), rhs (L, N, k, inner), out and shifted (L, N, k, outer);
    squares[l, i, column tile, row tile] = sum of the squares of the tile before the shift, float64;
    shift_li = damping · (1 − Σ energies[l, i]), 0 where that is negative, energies (L, N, energy_tiles).
    INPUTS > 0 unrolls the loop over inputs (N ≤ INPUTS), so that all their loads are in flight at once.
    SIGNS: rhs holds L keys instead, and row c of every expert's right-hand side is the random signs of column c.
    Residuals become operands times RESIDUAL_SCALE, vectors times RHS_SCALE, where they are ROUNDED here; products are
    divided by both. What is written is times OUT_SCALE, and lengths[l, i] with LENGTHS; what is subtracted is
    shifted times SHIFTED_SCALE.
    """
    tensor = tl.program_id(1).to(tl.int64)
    # Programs that read the same tile of the inputs are neighbours: all but the first find it in the L2 cache.
    blocks, column_tiles = tl.cdiv(count, EXPERTS), tl.cdiv(k, COLUMNS)
    tile, block = tl.program_id(0) // (blocks * column_tiles), tl.program_id(0) % (blocks * column_tiles)
    first, column_tile = (block % blocks) * EXPERTS, block // blocks
    if ALIGNED:
        m, n = known_multiple(m, 4), known_multiple(n, 128 // TYPE.primitive_bitwidth)
    rhs_stride, out_stride = known_multiple(rhs_stride, 16), known_multiple(out_stride, 16)
    outer, inner = (n, m) if TRANSPOSE else (m, n)
    rows = tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)

    slots, mixing = table + tensor * (count + 1), mixing + tensor * count * count
    base = tensor_at(slots, True, TYPE, ALIGNED)
    inputs, weights, sums = (), (), ()
    for j in tl.static_range(INPUTS):
        inputs += (tensor_at(slots + 1 + j, j < count, TYPE, ALIGNED),)
        for i in tl.static_range(EXPERTS):
            known = (j < count) & (first + i < count)
            weights += (tl.load(mixing + j * count + first + i, mask=known, other=0.0) * RESIDUAL_SCALE,)
    for _ in tl.static_range(EXPERTS):
        sums += (tl.zeros((ROWS, COLUMNS), COMPUTE),)

    for start in range(0, inner, INNER):
        depth = start + tl.arange(0, INNER)
        if TRANSPOSE:
            offsets = depth[:, None].to(tl.int64) * n + rows[None, :]
        else:
            offsets = rows[:, None].to(tl.int64) * n + depth[None, :]
        inside = tile_mask(depth < inner, rows < outer, TRANSPOSE)
        theta = tl.load(base + offsets, mask=inside, other=0.0).to(COMPUTE)
        residuals = ()
        for _ in tl.static_range(EXPERTS):
            residuals += (tl.zeros(theta.shape, COMPUTE),)
        if INPUTS > 0:
            for j in tl.static_range(INPUTS):
                # An unused slot is not read: 0 − θ₀ meets weights of 0.
                used = tile_mask(depth < inner, rows < tl.where(j < count, outer, 0), TRANSPOSE)
                tau = tl.load(inputs[j] + offsets, mask=used, other=0.0).to(COMPUTE) - theta
                mixed = ()
                for i in tl.static_range(EXPERTS):
                    mixed += (residuals[i] + weights[j * EXPERTS + i] * tau,)
                residuals = mixed
        else:
            for j in range(count):
                expert = tensor_at(slots + 1 + j, True, TYPE, ALIGNED)
                tau = tl.load(expert + offsets, mask=inside, other=0.0).to(COMPUTE) - theta
                mixed = ()
                for i in tl.static_range(EXPERTS):
                    weight = tl.load(mixing + j * count + first + i, mask=first + i < count, other=0.0)
                    mixed += (residuals[i] + weight * RESIDUAL_SCALE * tau,)
                residuals = mixed
        if SIGNS:  # one tile for all experts
            here = (columns < k)[:, None] & (depth < inner)[None, :]
            signs = tl.where(here, random_signs(tl.load(rhs + tensor), depth[None, :], columns[:, None]), 0.0)
        products = ()
        for i in tl.static_range(EXPERTS):
            if SIGNS:
                vectors = signs
            else:
                here = (columns < tl.where(first + i < count, k, 0))[:, None] & (depth < inner)[None, :]
                block_of = ((tensor * count + first + i) * k + columns[:, None]) * rhs_stride
                vectors = tl.load(rhs + block_of + depth[None, :], mask=here, other=0.0)
                if ROUNDED:
                    vectors = vectors.to(COMPUTE) * RHS_SCALE
            vectors, residual = vectors.to(OPERAND).to(DOT), residuals[i].to(OPERAND).to(DOT)
            if TRANSPOSE:
                residual = tl.trans(residual)
            products += (tl.dot(residual, tl.trans(vectors), sums[i], input_precision=PRECISION, out_dtype=COMPUTE),)
        sums = products

    for i in tl.static_range(EXPERTS):
        if first + i < count:
            expert = tensor * count + first + i
            result = sums[i] * (1.0 / (RESIDUAL_SCALE * RHS_SCALE))
            slot = (expert * column_tiles + column_tile) * tl.cdiv(outer, ROWS) + tile
            # In float32, for want of registers: whoever uses the energies scales residuals to norm 1.
            tl.store(squares + slot, tl.sum(tl.sum(result * result, axis=1).to(tl.float64)))
            where = (expert * k + columns[None, :]) * out_stride + rows[:, None]
            here = (rows < outer)[:, None] & (columns < k)[None, :]
            if SHIFTED:
                amount = damping * (1.0 - summed(energies + expert * energy_tiles, energy_tiles, 32))
                amount = tl.where(amount < 0.0, 0.0, amount).to(COMPUTE)  # a NaN stays one
                result -= amount * (tl.load(shifted + where, mask=here, other=0.0).to(COMPUTE) * SHIFTED_SCALE)
            if LENGTHS:
                result *= tl.load(lengths + expert)
            tl.store(out + where, (result * OUT_SCALE).to(out.dtype.element_ty), mask=here)


class Shift(NamedTuple):
    """What a product is shifted by: max(0, damping · (1 − energy_li)) · of_li.

    Attributes:
        squares: (L, N, tiles) float64, whose sums are the energies: of what :func:`multiply` gave.
        damping: not 0.
        of: rows as the result's; as float16 times :data:`SCALE`.
    """

    squares: Tensor
    damping: float
    of: Tensor


def residual_matmul(
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    mixing: Tensor,
    rhs: Tensor,
    transpose: bool = False,
    precision: str = "ieee",
) -> Tensor:
    """(L, N, m, k), a transposed view of rows; see :func:`r2m_kernels.ops.residual_matmul`."""
    group = matrix_group(bases, experts)
    rows, _ = multiply(group, mixing, rhs.transpose(-1, -2), transpose, precision)
    return rows.transpose(-1, -2)


def matrix_group(bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]]) -> Group:
    """The group of tensors seen as (first dimension, the rest)."""
    return Group(bases, experts, row=math.prod(bases[0].shape[1:]))


def sketch(group: Group, mixing: Tensor, keys: Tensor, k: int, transpose: bool, out: Tensor | None = None) -> Tensor:
    """X_li times k columns of random signs, the same for all experts, as rows: (L, N, k, m), (L, N, k, n) transposed.

    Args:
        mixing: (N, N), or (L, N, N) with one for each tensor, so that no number of X_li is above 1.
        keys: (L,) int64.
        out: takes the result.
    """
    return _launch(group, mixing, keys.to(group.device, non_blocking=True), k, transpose, "fp16", out=out)[0]


def multiply(
    group: Group,
    mixing: Tensor,
    rhs: Tensor,
    transpose: bool,
    precision: str,
    shift: Shift | None = None,
    lengths: Tensor | None = None,
    half: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One launch: (X_li rhs_liᵀ)ᵀ, shifted, as rows, and the sums of squares of its tiles before that.

    Args:
        mixing: (N, N), or (L, N, N) with one for each tensor; for float16 operands so that no number of X is above 1.
        rhs: (L, N, k, n); (L, N, k, m) with ``transpose``. As float16 times :data:`SCALE`.
        precision: of the operands, at least: one of ``ops.PRECISIONS``, or "fp16".
        shift: what is subtracted.
        lengths: (L, N) in the compute dtype, what the result is multiplied with at last.
        half: the result is float16, times :data:`SCALE`.
        out: takes the result, which is not ``half`` then.

    Returns:
        (L, N, k, m) ((L, N, k, n) with ``transpose``) and (L, N, tiles) float64, both on the device.
    """
    if rhs.dtype != torch.float16:
        wide = torch.promote_types(group.compute_dtype, rhs.dtype) == torch.float64
        rhs = rhs.to(group.device, torch.float64 if wide else torch.float32, non_blocking=True)
    return _launch(group, mixing, padded_rows(rhs), rhs.shape[2], transpose, precision, shift, lengths, half, out)


def _launch(
    group: Group,
    mixing: Tensor,
    rhs: Tensor,
    k: int,
    transpose: bool,
    precision: str,
    shift: Shift | None = None,
    lengths: Tensor | None = None,
    half: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    signs, scaled = rhs.dtype == torch.int64, rhs.dtype == torch.float16
    dtype = group.compute_dtype if signs or scaled else rhs.dtype
    size, count = len(group.bases), len(group.experts)
    m, n = group.bases[0].shape[0], math.prod(group.bases[0].shape[1:])
    outer = n if transpose else m
    if out is None:
        out = empty_rows((size, count, k), outer, torch.float16 if half else dtype, group.device)
    if out.numel() == 0 or m * n == 0:
        return out.zero_(), torch.zeros(size, count, 1, dtype=torch.float64, device=group.device)
    target = launch.target_of(group.device)
    aligned = group.aligned and vectors_fit(m)
    config = launch.residual_matmul(target, dtype, precision, aligned, count)
    operand = tl.float16 if config.precision == "fp16" else ELEMENT_TYPES[dtype]
    rounded = precision == "fp16" and dtype == torch.float32 and not signs and not scaled
    residual_scale = SCALE if precision == "fp16" and dtype == torch.float32 else 1.0
    rhs_scale = SCALE if scaled else VECTOR_SCALE if rounded else 1.0
    tiles, column_tiles = -(-outer // config.rows), -(-k // config.columns)
    squares = torch.empty(size, count, column_tiles * tiles, dtype=torch.float64, device=group.device)
    energies, damping, shifted = shift or Shift(squares, 0.0, out)
    mixing = mixing.to(group.device, dtype, non_blocking=True).expand(size, count, count).contiguous()
    launch.start(
        residual_matmul_kernel,
        (tiles * -(-count // config.experts) * column_tiles, size),
        config,
        group.table,
        mixing,
        rhs,
        out,
        squares,
        energies,
        padded_rows(shifted),
        squares if lengths is None else lengths,
        damping,
        m,
        n,
        k,
        count,
        0 if signs else rhs.stride(-2),
        out.stride(-2),
        energies.shape[-1],
        TYPE=ELEMENT_TYPES[group.dtype],
        COMPUTE=ELEMENT_TYPES[dtype],
        OPERAND=operand,
        # The interpreter would sum products of float16 operands in float16: there they are rounded and widened.
        DOT=ELEMENT_TYPES[dtype] if launch.INTERPRETED else operand,
        PRECISION=config.input_precision,
        TRANSPOSE=transpose,
        SIGNS=signs,
        SHIFTED=shift is not None,  # products without one need fewer registers
        LENGTHS=lengths is not None,
        ROUNDED=rounded,
        RESIDUAL_SCALE=residual_scale,
        RHS_SCALE=rhs_scale,
        SHIFTED_SCALE=1.0 / SCALE if shifted.dtype == torch.float16 else 1.0,
        OUT_SCALE=SCALE if half else 1.0,
        ALIGNED=config.aligned,
        INPUTS=config.inputs,
        EXPERTS=config.experts,
        ROWS=config.rows,
        INNER=config.inner,
        COLUMNS=config.columns,
    )
    return out, squares
