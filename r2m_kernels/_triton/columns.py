"""Columns of a merged change brought to the specialists' mean length (README §6): ``scale="column"``.

Two reads: the squares of all columns, then what is written. Rows are summed in runs whose length depends on nothing,
and the runs in their order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..update_scale import MOST
from . import launch
from .addresses import (
    ELEMENT_TYPES,
    VECTOR_BYTES,
    Group,
    addresses_of,
    known_multiple,
    loaded,
    send,
    tensor_at,
    tile_of,
    well_placed,
)
from .outputs import Outputs, write_rounded

ROWS = 16  # of a tile: narrow matrices have columns for few threads
RUN = 256  # rows that are summed by one program


@triton.jit(do_not_specialize=["m", "n", "count", "runs", "column_tiles"])
def column_squares_kernel(
    table,
    squares,
    m,
    n,
    count,
    runs,
    column_tiles,
    TYPE: tl.constexpr,
    OTHER: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """squares[l, j, run, column] = Σ over the run's rows of (θ_j − θ₀)², float64, θ_j of type OTHER."""
    tensor = tl.program_id(1).to(tl.int64)
    # Programs that read the same rows of the base are neighbours: all but the first find them in the L2 cache.
    j, tile = tl.program_id(0) % count, tl.program_id(0) // count
    run, column_tile = tile // column_tiles, tile % column_tiles
    if ALIGNED:
        n = known_multiple(n, 128 // TYPE.primitive_bitwidth)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    base = tensor_at(table + tensor * (count + 1), True, TYPE, ALIGNED)
    other = tensor_at(table + tensor * (count + 1) + 1 + j, True, OTHER, ALIGNED)
    sums = tl.zeros((ROWS, COLUMNS), tl.float64)
    for step in range(RUN // ROWS):
        rows = run * RUN + step * ROWS + tl.arange(0, ROWS)
        offsets = rows[:, None].to(tl.int64) * n + columns[None, :]
        inside = (rows < m)[:, None] & (columns < n)[None, :]
        theta = tl.load(base + offsets, mask=inside, other=0.0).to(COMPUTE)
        change = (tl.load(other + offsets, mask=inside, other=0.0).to(COMPUTE) - theta).to(tl.float64)
        sums += change * change
    where = ((tensor * count + j) * runs + run) * n + columns
    tl.store(squares + where, tl.sum(sums, axis=0), mask=columns < n)


@triton.jit(do_not_specialize=["n", "count", "runs"])
def column_factors_kernel(
    specialists,
    reached,
    counts,
    factors,
    n,
    count,
    runs,
    MOST: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """factors[l, column]: the mean by ``counts`` of the specialists' lengths over the length that was reached."""
    tensor = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    wanted, total = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for j in range(count):
        square = tl.zeros((BLOCK,), tl.float64)
        for run in range(runs):
            where = ((tensor * count + j) * runs + run) * n + columns
            square += tl.load(specialists + where, mask=inside, other=0.0)
        wanted += tl.load(counts + j) * tl.sqrt(square)
    for run in range(runs):
        total += tl.load(reached + (tensor * runs + run) * n + columns, mask=inside, other=0.0)
    factor = tl.where(total > 0, wanted * tl.rsqrt(tl.where(total > 0, total, 1.0)), 1.0)
    factor = tl.where(factor > MOST, MOST, factor)
    tl.store(factors + tensor * n + columns, factor.to(COMPUTE), mask=inside)


@triton.jit(do_not_specialize=["m", "n", "column_tiles"])
def scale_columns_kernel(
    table,
    outputs,
    largest,
    factors,
    m,
    n,
    column_tiles,
    TYPE: tl.constexpr,
    OUTPUT: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[l] = θ₀ + factors[l, column] (θ* − θ₀), θ* of type COMPUTE; table (L, 2)."""
    tensor = tl.program_id(1).to(tl.int64)
    _, columns, offsets, inside = tile_of(m, n, column_tiles, TYPE, ALIGNED, ROWS, COLUMNS)
    theta = loaded(table + tensor * 2, offsets, inside, TYPE, COMPUTE, ALIGNED)
    merged = loaded(table + tensor * 2 + 1, offsets, inside, COMPUTE, COMPUTE, ALIGNED)
    factor = tl.load(factors + tensor * n + columns, mask=columns < n, other=0.0)
    total = theta + factor[None, :] * (merged - theta)
    write_rounded(total, outputs, largest, offsets, inside, OUTPUT, COMPUTE, ALIGNED)


def match_columns(
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    merged: Sequence[Tensor],
    counts: Tensor,
    outs: Sequence[Tensor],
) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""
    m = bases[0].shape[0]
    n = bases[0].numel() // max(1, m)
    group = Group(bases, experts, n)
    outputs, dtype = Outputs(group, outs, n), group.compute_dtype
    fits = all(well_placed(one) for one in merged) and n * dtype.itemsize % VECTOR_BYTES == 0
    target = launch.target_of(group.device)
    shares = counts.double() / counts.double().sum().clamp_min(torch.finfo(torch.float64).tiny)
    pairs, shares = send([group], group.device, addresses_of([group.bases, merged]), shares)
    inputs = launch.combine_vector(target, group.aligned)
    specialists = _squares(group, group.table, len(experts), group.dtype, inputs)
    reached = _squares(group, pairs, 1, dtype, launch.combine_vector(target, group.aligned and fits))
    factors = torch.empty(len(bases), n, dtype=dtype, device=group.device)
    sums = launch.sums()
    launch.start(
        *(column_factors_kernel, (-(-n // sums.block), len(bases)), sums),
        *(specialists, reached, shares, factors, n, len(experts)),
        reached.shape[2],
        MOST=MOST,
        COMPUTE=ELEMENT_TYPES[dtype],
        BLOCK=sums.block,
    )
    config = launch.combine_vector(target, outputs.aligned and fits)
    columns = config.block // ROWS
    column_tiles = -(-n // columns)
    return outputs.write(
        *(scale_columns_kernel, -(-m // ROWS) * column_tiles, config, factors, m, n, column_tiles),
        table=pairs,
        ROWS=ROWS,
        COLUMNS=columns,
    )


def _squares(group: Group, table: Tensor, count: int, other: torch.dtype, config: launch.VectorConfig) -> Tensor:
    """(L, count, runs, n) float64, of the differences of a table's other tensors from its first."""
    m = group.bases[0].shape[0]
    n = group.bases[0].numel() // max(1, m)
    columns, runs = config.block // ROWS, -(-m // RUN)
    column_tiles = -(-n // columns)
    squares = torch.empty(len(group.bases), count, runs, n, dtype=torch.float64, device=group.device)
    launch.start(
        *(column_squares_kernel, (count * runs * column_tiles, len(group.bases)), config),
        *(table, squares, m, n, count, runs, column_tiles),
        TYPE=ELEMENT_TYPES[group.dtype],
        OTHER=ELEMENT_TYPES[other],
        COMPUTE=ELEMENT_TYPES[group.compute_dtype],
        ALIGNED=config.aligned,
        RUN=RUN,
        ROWS=ROWS,
        COLUMNS=columns,
    )
    return squares
