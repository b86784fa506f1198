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
from .sums import sum_tiles


@triton.jit(do_not_specialize=["m", "rank", "left_stride", "other_stride"])
def row_lengths_kernel(
    left, other, lengths, m, rank, left_stride, other_stride, DIAGONAL: tl.constexpr, BLOCK: tl.constexpr
):
    """lengths[b, row] = √Σ_c left[b, c, row] · (what belongs to it), float64, in the order of components.

    left (B, rank, m). DIAGONAL: other (B, rank) are squares of components, and left's are taken; else other
    (B, rank, m) is half of what the components' Gram matrix makes of left.
    """
    block = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < m
    total = tl.zeros((BLOCK,), tl.float64)
    for component in range(rank):
        at = block * rank + component
        value = tl.load(left + at * left_stride + rows, mask=inside, other=0.0).to(tl.float64)
        if DIAGONAL:
            total += value * value * tl.load(other + at)
        else:
            total += 2.0 * value * tl.load(other + at * other_stride + rows, mask=inside, other=0.0)
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
        other, stride = sum_tiles(rights.double().square()), 0
    else:
        # Of v and a Gram matrix G vᵀGv is twice vᵀTv, T being the lower triangle of G with half of its diagonal.
        gram = vectors_gram(rights).tril_()
        gram.diagonal(dim1=1, dim2=2).mul_(0.5)
        other = triangular_product(gram, padded_rows(lefts.double()))
        stride = other.stride(-2)
    config = launch.sums()
    launch.start(
        row_lengths_kernel,
        (-(-m // config.block), size * count),
        config,
        lefts,
        other,
        lengths,
        m,
        rank,
        lefts.stride(-2),
        stride,
        DIAGONAL=orthogonal,
        BLOCK=config.block,
    )
    return lengths.view(size, count, m)
