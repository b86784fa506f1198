"""Products with the residuals X_i = Σ_j mixing[j, i] (θ_j − θ₀), which exist in registers only (README §4).

A program owns a tile of rows of the result and up to four experts: it reads a tile of every input once, forms the
experts' residual tiles, and multiplies each with that expert's right-hand side on the matrix units. Blocks of vectors
lie in memory as rows, (N, k, length): tf32 matrix instructions want both operands contiguous along the inner dimension.
What is multiplied more than once is kept instead: :mod:`.residuals`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._stream.blocks import empty_rows
from . import launch
from .addresses import ELEMENT_TYPES, Group, known_multiple, padded_rows, tensor_at, vectors_fit


@triton.jit
def tile_mask(depth, rows, TRANSPOSE: tl.constexpr):
    """The mask of an input's tile: (depth, rows) with TRANSPOSE, else (rows, depth)."""
    return depth[:, None] & rows[None, :] if TRANSPOSE else rows[:, None] & depth[None, :]


@triton.jit(do_not_specialize=["m", "n", "k", "count", "rhs_stride", "out_stride"])
def residual_matmul_kernel(
    table,
    mixing,
    rhs,
    out,
    m,
    n,
    k,
    count,
    rhs_stride,
    out_stride,
    TYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    ALIGNED: tl.constexpr,
    INPUTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[l, i] = (X_li rhs[l, i]ᵀ)ᵀ for a block of experts i; X_liᵀ with TRANSPOSE.

    table (L, N + 1), mixing (N, N), rhs (L, N, k, inner), out (L, N, k, outer).
    INPUTS > 0 unrolls the loop over inputs (N ≤ INPUTS), so that all their loads are in flight at once.
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

    slots = table + tensor * (count + 1)
    base = tensor_at(slots, True, TYPE, ALIGNED)
    inputs, weights, sums = (), (), ()
    for j in tl.static_range(INPUTS):
        inputs += (tensor_at(slots + 1 + j, j < count, TYPE, ALIGNED),)
        for i in tl.static_range(EXPERTS):
            known = (j < count) & (first + i < count)
            weights += (tl.load(mixing + j * count + first + i, mask=known, other=0.0),)
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
                    mixed += (residuals[i] + weight * tau,)
                residuals = mixed
        products = ()
        for i in tl.static_range(EXPERTS):
            here = (columns < tl.where(first + i < count, k, 0))[:, None] & (depth < inner)[None, :]
            block_of = ((tensor * count + first + i) * k + columns[:, None]) * rhs_stride
            vectors = tl.load(rhs + block_of + depth[None, :], mask=here, other=0.0)
            residual = tl.trans(residuals[i]) if TRANSPOSE else residuals[i]
            products += (tl.dot(residual, tl.trans(vectors), sums[i], input_precision=PRECISION, out_dtype=COMPUTE),)
        sums = products

    for i in tl.static_range(EXPERTS):
        if first + i < count:
            expert = tensor * count + first + i
            where = (expert * k + columns[None, :]) * out_stride + rows[:, None]
            tl.store(out + where, sums[i], mask=(rows < outer)[:, None] & (columns < k)[None, :])


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
    wide = torch.promote_types(group.compute_dtype, rhs.dtype) == torch.float64
    dtype = torch.float64 if wide else torch.float32
    rhs = padded_rows(rhs.to(group.device, dtype, non_blocking=True).transpose(-1, -2))
    size, count, k = len(group.bases), len(group.experts), rhs.shape[2]
    m, n = group.bases[0].shape[0], math.prod(group.bases[0].shape[1:])
    outer = n if transpose else m
    out = empty_rows((size, count, k), outer, dtype, group.device)
    if out.numel() == 0 or m * n == 0:
        return out.zero_().transpose(-1, -2)
    aligned = group.aligned and vectors_fit(m)
    config = launch.residual_matmul(launch.target_of(group.device), dtype, precision, aligned, count)
    tiles, column_tiles = -(-outer // config.rows), -(-k // config.columns)
    launch.start(
        residual_matmul_kernel,
        (tiles * -(-count // config.experts) * column_tiles, size),
        config,
        *(group.table, mixing.to(group.device, dtype, non_blocking=True).contiguous(), rhs, out),
        *(m, n, k, count, rhs.stride(-2), out.stride(-2)),
        TYPE=ELEMENT_TYPES[group.dtype],
        COMPUTE=ELEMENT_TYPES[dtype],
        PRECISION=config.input_precision,
        TRANSPOSE=transpose,
        ALIGNED=config.aligned,
        INPUTS=config.inputs,
        EXPERTS=config.experts,
        ROWS=config.rows,
        INNER=config.inner,
        COLUMNS=config.columns,
    )
    return out.transpose(-1, -2)


def matrix_group(bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]]) -> Group:
    """The group of tensors seen as (first dimension, the rest)."""
    return Group(bases, experts, row=math.prod(bases[0].shape[1:]))
