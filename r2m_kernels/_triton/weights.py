"""Rows of left factors weighed by their residuals' lengths (README §6), by one launch a group."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._stream.blocks import empty_rows
from . import launch
from .addresses import ELEMENT_TYPES, padded_rows
from .lengths import DEPTH
from .rows import lengths_to_shares


@triton.jit(do_not_specialize=["m", "rank", "count", "stride", "out_stride"])
def weigh_rows_kernel(
    left,
    lengths,
    numbers,
    shares,
    out,
    m,
    rank,
    count,
    stride,
    out_stride,
    COMPUTE: tl.constexpr,
    OUTPUT: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out[l, i] = factor_i left[l, i] with row r times W_ri ∝ w_i (s_i lengths[l, i, r])^p, Σ_i W_ri = 1.

    left and out (L, N, rank, m), lengths (L, N, m); numbers, float64: weights, scales (N each), power and factors (N);
    shares: room for (L, N, m). A program has some rows of all experts.
    """
    tensor = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < m
    shares += tensor * count * m + rows
    power = tl.load(numbers + 2 * count)
    longest = tl.zeros((BLOCK,), tl.float64)
    for i in range(count):
        length = tl.load(lengths + (tensor * count + i) * m + rows, mask=inside, other=0.0)
        length *= tl.load(numbers + count + i)
        tl.store(shares + i * m, length, mask=inside)
        longest = tl.where(length <= longest, longest, length)
    tl.debug_barrier()
    total = lengths_to_shares(shares, numbers, power, longest, inside, m, count, BLOCK)
    tl.debug_barrier()
    for i in range(count):
        share = (tl.load(shares + i * m, mask=inside, other=0.0) / total).to(COMPUTE)
        factor = tl.load(numbers + 2 * count + 1 + i).to(COMPUTE)
        of_left, of_out = left + (tensor * count + i) * rank * stride, out + (tensor * count + i) * rank * out_stride
        for start in range(0, rank, DEPTH):
            depth = start + tl.arange(0, DEPTH)
            here = (depth < rank)[:, None] & inside[None, :]
            block = tl.load(of_left + depth[:, None] * stride + rows[None, :], mask=here, other=0.0)
            weighed = block * share[None, :] * factor
            tl.store(of_out + depth[:, None] * out_stride + rows[None, :], weighed.to(OUTPUT), mask=here)


def weigh_rows(
    left: Tensor,
    lengths: Tensor,
    weights: Tensor,
    scales: Tensor,
    power: float,
    factors: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""
    size, count, m, rank = left.shape
    rows, out = padded_rows(left.mT), empty_rows((size, count, rank), m, dtype, left.device)
    if out.numel() == 0:
        return out.mT
    config = launch.sums()
    power_of_all = weights.new_tensor([power], dtype=torch.float64)
    numbers = torch.cat([weights.double(), scales.double(), power_of_all, factors.double()])
    shares = torch.empty(size, count, m, dtype=torch.float64, device=left.device)
    launch.start(
        weigh_rows_kernel,
        (-(-m // config.block), size),
        config,
        rows,
        lengths.contiguous(),
        numbers.to(left.device, non_blocking=True),
        shares,
        out,
        m,
        rank,
        count,
        rows.stride(-2),
        out.stride(-2),
        COMPUTE=ELEMENT_TYPES[left.dtype],
        OUTPUT=ELEMENT_TYPES[dtype],
        BLOCK=config.block,
        DEPTH=DEPTH,
    )
    return out.mT
