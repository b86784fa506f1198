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


RUN = 6  # numbers of a run in the table of :func:`sum_runs_kernel`


@triton.jit
def sum_runs_kernel(partial, runs, out, RUN: tl.constexpr, BLOCK: tl.constexpr):
    """As :func:`sum_tiles_kernel` for runs of sums that have as many tiles each, whose results go to two places.

    A run: the number of sums up to its last; where its partial ones start; how many tiles a sum has; where in ``out``
    its results go; where those after the first so many go; and how many these are.
    """
    index = tl.program_id(0).to(tl.int64)
    first, last = index * 0, tl.load(runs)
    while index >= last:
        first = last
        runs += RUN
        last = tl.load(runs)
    place, tiles, ahead = index - first, tl.load(runs + 2), tl.load(runs + 5)
    total = summed(partial + tl.load(runs + 1) + place * tiles, tiles.to(tl.int32), BLOCK)
    where = tl.where(place < ahead, tl.load(runs + 3) + place, tl.load(runs + 4) + place - ahead)
    tl.store(out + where, total)


def sum_runs(partial: Tensor, table: Tensor, sums: int, out: Tensor) -> None:
    """So many sums into ``out``, by a table as :func:`sum_runs_kernel` has it; float64."""
    config = launch.sums()
    launch.start(sum_runs_kernel, (sums,), config, partial, table, out, RUN=RUN, BLOCK=config.block)


def sum_rows(rows: Tensor) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""
    return sum_tiles(rows.contiguous())


def sum_tiles(partial: Tensor) -> Tensor:
    """(…, tiles) → (…), float64, contiguous both."""
    total = torch.empty(partial.shape[:-1], dtype=torch.float64, device=partial.device)
    config = launch.sums()
    launch.start(sum_tiles_kernel, (total.numel(),), config, partial, total, partial.shape[-1], BLOCK=config.block)
    return total
