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
from .orthonormalize import vectors_gram

DEPTH = 8  # components at once: their loads are on their way together


@triton.jit(do_not_specialize=["m", "n", "rank", "left_stride", "right_stride"])
def row_lengths_kernel(
    left,
    right,
    lengths,
    m,
    n,
    rank,
    left_stride,
    right_stride,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """lengths[b, row] = √Σ_c left[b, c, row]² ‖right[b, c]‖², float64, a few components after others.

    left (B, rank, m), right (B, rank, n), whose components are orthogonal, and with UNIT of length 1: else every
    program of a matrix sums their squares again, for one launch less.
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
        value *= value
        if not UNIT:
            squares = tl.zeros((DEPTH, BLOCK), tl.float64)
            for start in range(0, n, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                within = there[:, None] & (columns < n)[None, :]
                one = tl.load(right + (at * right_stride)[:, None] + columns[None, :], mask=within, other=0.0)
                squares += one.to(tl.float64) * one.to(tl.float64)
            value *= tl.sum(squares, axis=1)[:, None]
        total += tl.sum(value, axis=0)
    tl.store(lengths + block * m + rows, tl.sqrt(total), mask=inside)


@triton.jit(do_not_specialize=["m", "rank", "stride"])
def mixed_lengths_kernel(left, gram, lengths, m, rank, stride, SIDE: tl.constexpr):
    """lengths[b, row] = √(vᵀ gram[b] v), v = left[b, :, row], float64: SIDE rows a program, SIDE components at once.

    left (B, rank, m), gram (B, rank, rank) of the right factor's components.
    """
    block = tl.program_id(1).to(tl.int64)
    rows, places = tl.program_id(0) * SIDE + tl.arange(0, SIDE), tl.arange(0, SIDE)
    left, gram = left + block * rank * stride, gram + block * rank * rank
    total = tl.zeros((SIDE,), tl.float64)
    for start in range(0, rank, SIDE):
        depth = start + places
        here = (rows < m)[:, None] & (depth < rank)[None, :]
        value = tl.load(left + depth[None, :] * stride + rows[:, None], mask=here, other=0.0).to(tl.float64)
        mixed = tl.zeros((SIDE, SIDE), tl.float64)
        for other in range(0, rank, SIDE):
            others = other + places
            there = (rows < m)[:, None] & (others < rank)[None, :]
            one = tl.load(left + others[None, :] * stride + rows[:, None], mask=there, other=0.0).to(tl.float64)
            inside = (others < rank)[:, None] & (depth < rank)[None, :]
            products = tl.load(gram + others[:, None] * rank + depth[None, :], mask=inside, other=0.0)
            mixed = tl.dot(one, products, mixed, input_precision="ieee", out_dtype=tl.float64)
        total += tl.sum(value * mixed, axis=1)
    # Below 0 it is rounding; a NaN stays one.
    tl.store(lengths + block * m + rows, tl.sqrt(tl.where(total < 0.0, 0.0, total)), mask=rows < m)


def row_lengths(left: Tensor, right: Tensor, orthogonal: bool, orthonormal: bool = False) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""
    size, count, m, rank = left.shape
    lengths = torch.empty(size * count, m, dtype=torch.float64, device=left.device)
    if left.numel() == 0 or right.numel() == 0:
        return lengths.zero_().view(size, count, m)
    lefts, rights = padded_rows(left.mT.flatten(0, 1)), padded_rows(right.flatten(0, 1))
    if orthogonal:
        config = launch.sums()
        launch.start(
            row_lengths_kernel,
            (-(-m // config.block), size * count),
            config,
            lefts,
            rights,
            lengths,
            m,
            right.shape[-1],
            rank,
            lefts.stride(-2),
            rights.stride(-2),
            UNIT=orthonormal,
            BLOCK=config.block,
            DEPTH=DEPTH,
        )
    else:
        config = launch.inverse_factor()
        launch.start(
            mixed_lengths_kernel,
            (-(-m // config.block), size * count),
            config,
            lefts,
            vectors_gram(rights),
            lengths,
            m,
            rank,
            lefts.stride(-2),
            SIDE=config.block,
        )
    return lengths.view(size, count, m)
