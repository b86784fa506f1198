"""Sums of float64 partial results, in an order that depends on their number alone: no atomics, the same bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch


@triton.jit
def summed(partial, tiles, BLOCK: tl.constexpr):
    """Σ_tile partial[tile]."""
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, tiles, BLOCK):
        where = start + tl.arange(0, BLOCK)
        sums += tl.load(partial + where, mask=where < tiles, other=0.0)
    return tl.sum(sums)


@triton.jit(do_not_specialize=["tiles"])
def sum_tiles_kernel(partial, total, tiles, BLOCK: tl.constexpr):
    """total[p] = Σ_tile partial[p, tile]."""
    index = tl.program_id(0).to(tl.int64)
    tl.store(total + index, summed(partial + index * tiles, tiles, BLOCK))


def sum_rows(rows: Tensor) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""
    return sum_tiles(rows.contiguous())


def sum_tiles(partial: Tensor) -> Tensor:
    """(…, tiles) → (…), float64, contiguous both."""
    total = torch.empty(partial.shape[:-1], dtype=torch.float64, device=partial.device)
    config = launch.sums()
    launch.start(sum_tiles_kernel, (total.numel(),), config, partial, total, partial.shape[-1], BLOCK=config.block)
    return total
