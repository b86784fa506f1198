"""Orthonormal bases of blocks of vectors: CholeskyQR twice, all blocks at once (Fukaya et al. 2014; README §4).

The Gram matrices and their factors are float64, so that the first pass survives any conditioning that float32 vectors
can have; the second removes what rounding the product to float32 left.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .addresses import ELEMENT_TYPES, empty_rows, known_multiple, padded_rows, vectors_fit
from .sums import sum_tiles

# Added to the Gram matrix of k vectors of length 1, so that it stays positive definite whatever their rank: at least
# this, and four times its rounding √m · k · 2⁻⁵³ where that is more; far below what the second pass can repair.
RELATIVE_SHIFT = 1e-11
# Of the inner products' Gram matrices at once; three of them are in use.
PRODUCTS_BYTES = 2**27
# Libraries have other algorithms for single matrices and small batches, and bits would depend on the batch: smaller
# ones are filled up to this (CUDA's triangular solve loops over fewer than 8 matrices).
SMALLEST_BATCH = 16


@triton.jit(do_not_specialize=["length", "k", "stride", "pairs"])
def vectors_gram_kernel(
    vectors, gram, length, k, stride, pairs, ALIGNED: tl.constexpr, SIDE: tl.constexpr, INNER: tl.constexpr
):
    """gram[b] = vectors[b] vectors[b]ᵀ, float64, (k, length) → (k, k): a tile of the lower triangle a program."""
    block, pair = (tl.program_id(0) // pairs).to(tl.int64), tl.program_id(0) % pairs
    row, column = pair * 0, pair
    while column > row:
        row += 1
        column -= row
    stride = known_multiple(stride, 16)
    if ALIGNED:
        length = known_multiple(length, 4)
    rows, columns = row * SIDE + tl.arange(0, SIDE), column * SIDE + tl.arange(0, SIDE)
    of_rows = vectors + (block * k + rows[:, None]) * stride
    of_columns = vectors + (block * k + columns[:, None]) * stride
    total = tl.zeros((SIDE, SIDE), tl.float64)
    for start in range(0, length, INNER):
        depth = start + tl.arange(0, INNER)
        inside = (depth < length)[None, :]
        left = tl.load(of_rows + depth[None, :], mask=(rows < k)[:, None] & inside, other=0.0).to(tl.float64)
        right = tl.load(of_columns + depth[None, :], mask=(columns < k)[:, None] & inside, other=0.0).to(tl.float64)
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee", out_dtype=tl.float64)
    inside = (rows < k)[:, None] & (columns < k)[None, :]
    tl.store(gram + block * k * k + rows[:, None] * k + columns[None, :], total, mask=inside)
    tl.store(gram + block * k * k + columns[None, :] * k + rows[:, None], total, mask=inside)


@triton.jit(do_not_specialize=["length", "k", "stride", "row_tiles", "column_tiles"])
def triangular_product_kernel(
    triangle,
    vectors,
    out,
    length,
    k,
    stride,
    row_tiles,
    column_tiles,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """out[b] = triangle[b] vectors[b]: (k, k) lower triangular times (k, length); what is zero is not read."""
    column_tile, rest = tl.program_id(0) % column_tiles, tl.program_id(0) // column_tiles
    row_tile, block = rest % row_tiles, (rest // row_tiles).to(tl.int64)
    stride = known_multiple(stride, 16)
    if ALIGNED:
        length = known_multiple(length, 4)
    rows, columns = row_tile * ROWS + tl.arange(0, ROWS), column_tile * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), COMPUTE)
    for start in range(0, tl.minimum(k, (row_tile + 1) * ROWS), INNER):
        depth = start + tl.arange(0, INNER)
        inside = (rows < k)[:, None] & (depth < k)[None, :]
        left = tl.load(triangle + (block * k + rows[:, None]) * k + depth[None, :], mask=inside, other=0.0)
        inside = (depth < k)[:, None] & (columns < length)[None, :]
        right = tl.load(vectors + (block * k + depth[:, None]) * stride + columns[None, :], mask=inside, other=0.0)
        total = tl.dot(left.to(COMPUTE), right, total, input_precision=PRECISION, out_dtype=COMPUTE)
    inside = (rows < k)[:, None] & (columns < length)[None, :]
    tl.store(out + (block * k + rows[:, None]) * stride + columns[None, :], total, mask=inside)


def orthonormalize(y: Tensor) -> Tensor:
    """(…, m, k), a transposed view of rows; see :func:`r2m_kernels.ops.orthonormalize`."""
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    if y.numel() == 0:
        return y.to(dtype, copy=True)
    leading, (m, k) = y.shape[:-2], y.shape[-2:]
    rows = y.to(dtype).transpose(-1, -2).reshape(-1, k, m)
    return orthonormal_rows(rows).reshape(*leading, k, m).transpose(-1, -2)


def orthonormal_rows(vectors: Tensor) -> Tensor:
    """Orthonormal rows spanning those of every block: (B, k, length) → the same; rows left with nothing are zero."""
    vectors = padded_rows(vectors)
    # Rows this short count as zero: their reciprocal length would overflow the vectors' type.
    smallest = (1e3 * torch.finfo(vectors.dtype).tiny) ** 2
    for _ in range(2):
        vectors = _triangular_product(_inverse_factor(_gram(vectors), smallest, vectors.shape[-1]), vectors)
    return vectors


def inner_products(left: Tensor, right: Tensor) -> Tensor:
    """Σ over (left_i left_jᵀ) ∘ (right_i right_jᵀ), for rows (L, N, r, m) and (L, N, r, n): (L, N, N) float64."""
    size, count, rank, _ = left.shape
    dtype = torch.float64 if left.dtype == torch.float64 else torch.float32
    total = torch.empty(size, count, count, dtype=torch.float64, device=left.device)
    # A few tensors at a time: their Gram matrices, all experts' rows in one, grow with N²r².
    step = max(1, PRODUCTS_BYTES // (8 * (count * rank) ** 2))
    for start in range(0, size, step):
        some = slice(start, start + step)
        lefts, rights = (_gram(padded_rows(rows[some].to(dtype).flatten(1, 2))) for rows in (left, right))
        products = lefts.mul_(rights).view(-1, count, rank, count, rank).transpose(2, 3)
        total[some] = sum_tiles(products.flatten(3))
    return total


def _gram(vectors: Tensor) -> Tensor:
    count, k, length = vectors.shape
    config = launch.vectors_gram(launch.target_of(vectors.device), vectors_fit(length))
    gram = torch.empty(count, k, k, dtype=torch.float64, device=vectors.device)
    tiles = -(-k // config.rows)
    pairs = tiles * (tiles + 1) // 2
    launch.start(
        vectors_gram_kernel,
        (pairs * count,),
        config,
        vectors,
        gram,
        length,
        k,
        vectors.stride(-2),
        pairs,
        ALIGNED=config.aligned,
        SIDE=config.rows,
        INNER=config.inner,
    )
    return gram


def _inverse_factor(gram: Tensor, smallest: float, length: int) -> Tensor:
    """T with T G Tᵀ = I, lower triangular, (B, k, k) float64, by one batched call a step: no loop over matrices."""
    count, k, _ = gram.shape
    shift = max(RELATIVE_SHIFT, 4 * math.sqrt(length) * k * 2.0**-53)
    squares = gram.diagonal(dim1=-2, dim2=-1)
    present = ~(squares <= smallest)  # not "squares > smallest": a NaN is to stay one
    lengths = torch.where(present, squares, 1.0).rsqrt() * present  # 1/‖row‖, and 0 for rows without anything
    unit = gram * lengths.unsqueeze(-1) * lengths.unsqueeze(-2)
    unit.diagonal(dim1=-2, dim2=-1).copy_(torch.where(squares.isnan(), squares, 1.0 + shift))
    if count < SMALLEST_BATCH:
        unit = torch.cat([unit, unit[:1].expand(SMALLEST_BATCH - count, k, k)])
    factor, failed = torch.linalg.cholesky_ex(unit)
    factor = torch.where((failed == 0)[:, None, None], factor, torch.nan)  # never a half-done factor
    identity = torch.eye(k, dtype=torch.float64, device=gram.device).expand_as(factor)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)[:count]
    return (inverse * lengths.unsqueeze(-2)).contiguous()  # rows: LAPACK's order is by columns


def _triangular_product(triangle: Tensor, vectors: Tensor) -> Tensor:
    count, k, length = vectors.shape
    config = launch.triangular_product(launch.target_of(vectors.device), vectors.dtype, vectors_fit(length))
    out = empty_rows((count, k), length, vectors.dtype, vectors.device)
    row_tiles, column_tiles = -(-k // config.rows), -(-length // config.columns)
    launch.start(
        triangular_product_kernel,
        (row_tiles * column_tiles * count,),
        config,
        triangle,
        vectors,
        out,
        length,
        k,
        vectors.stride(-2),
        row_tiles,
        column_tiles,
        COMPUTE=ELEMENT_TYPES[vectors.dtype],
        PRECISION=config.input_precision,
        ALIGNED=config.aligned,
        ROWS=config.rows,
        COLUMNS=config.columns,
        INNER=config.inner,
    )
    return out
