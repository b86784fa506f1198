"""Lengths of the rows of low-rank products, in an order that depends on a matrix alone (README §6).

A library's batched products, and PyTorch's sums, are added up in an order of their own for every size of a batch;
shares of rows are to be the same bits whoever else is in the group, and however many rows come at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .addresses import padded_rows
from .orthonormalize import triangular_product, vectors_gram

DEPTH = 8  # components at once: their loads are on their way together


@triton.jit(do_not_specialize=["m", "n", "rank", "left_stride", "other_stride"])
def row_lengths_kernel(
    left,
    other,
    lengths,
    m,
    n,
    rank,
    left_stride,
    other_stride,
    DIAGONAL: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """lengths[b, row] = √Σ_c left[b, c, row] · (what belongs to it), float64, a few components after others.

    left (B, rank, m). DIAGONAL: other (B, rank, n) are the components, each of which has its length alone, and squares
    of both are taken: every program of a matrix sums these again, of which there are few, for one launch less. Else
    other (B, rank, m) is half of what the components' Gram matrix makes of left.
    """
    block = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < m
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, rank, DEPTH):
        components = first + tl.arange(0, DEPTH)
        there = components < rank
        at = block * rank + components
        mask = there[:, None] & inside[None, :]
        value = tl.load(left + (at * left_stride)[:, None] + rows[None, :], mask=mask, other=0.0).to(tl.float64)
        if DIAGONAL:
            squares = tl.zeros((DEPTH, BLOCK), tl.float64)
            for start in range(0, n, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                within = there[:, None] & (columns < n)[None, :]
                one = tl.load(other + (at * other_stride)[:, None] + columns[None, :], mask=within, other=0.0)
                squares += one.to(tl.float64) * one.to(tl.float64)
            total += tl.sum(value * value * tl.sum(squares, axis=1)[:, None], axis=0)
        else:
            made = tl.load(other + (at * other_stride)[:, None] + rows[None, :], mask=mask, other=0.0)
            total += 2.0 * tl.sum(value * made, axis=0)
    # Below 0 it is rounding; a NaN stays one.
    tl.store(lengths + block * m + rows, tl.sqrt(tl.where(total < 0.0, 0.0, total)), mask=inside)


def row_lengths(left: Tensor, right: Tensor, orthogonal: bool) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""
    size, count, m, rank = left.shape
    lengths = torch.empty(size * count, m, dtype=torch.float64, device=left.device)
    if left.numel() == 0 or right.numel() == 0:
        return lengths.zero_().view(size, count, m)
    lefts, rights = padded_rows(left.mT.flatten(0, 1)), padded_rows(right.flatten(0, 1))
    if orthogonal:
        other = rights
    else:
        # Of v and a Gram matrix G vᵀGv is twice vᵀTv, T being the lower triangle of G with half of its diagonal.
        gram = vectors_gram(rights).tril_()
        gram.diagonal(dim1=1, dim2=2).mul_(0.5)
        other = triangular_product(gram, padded_rows(lefts.double()))
    config = launch.sums()
    launch.start(
        row_lengths_kernel,
        (-(-m // config.block), size * count),
        config,
        lefts,
        other,
        lengths,
        m,
        right.shape[-1],
        rank,
        lefts.stride(-2),
        other.stride(-2),
        DIAGONAL=orthogonal,
        BLOCK=config.block,
        DEPTH=DEPTH,
    )
    return lengths.view(size, count, m)
