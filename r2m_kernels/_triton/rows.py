"""Residuals weighted row by row: Gram matrices of rows, and coefficients from them (README §6).

``row_grams`` reads what ``task_gram`` reads, at the same speed (predicted): its sums stay with a program's rows instead
of joining. Coefficients are a few numbers a row; a launch of their own keeps them off the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._interface import RowGrams
from . import launch
from .addresses import ELEMENT_TYPES, Group, known_multiple, tensor_at
from .sums import sum_tiles
from .task_gram import BLOCK_OF_EXPERTS

ROWS = 4  # of a program: what its sums take in registers


@triton.jit(do_not_specialize=["m", "n", "count", "pairs"], do_not_specialize_on_alignment=["squares"])
def row_grams_kernel(
    table,
    out,
    squares,
    m,
    n,
    count,
    pairs,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    DIAGONAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[l, pair, row] = Σ over the row of τ_i τ_j, of a block of four experts and another; squares[l, row] of θ₀²."""
    VECTOR: tl.constexpr = 128 // TYPE.primitive_bitwidth
    tensor = tl.program_id(1).to(tl.int64)
    tile, pair = tl.program_id(0) // pairs, tl.program_id(0) % pairs
    block, other = pair * 0, pair  # pair → (row, column) of the lower triangle of blocks
    while other > block:
        block += 1
        other -= block
    if ALIGNED:
        n = known_multiple(n, 128 // TYPE.primitive_bitwidth)
    rows = tile * ROWS + tl.arange(0, ROWS)
    slots = table + tensor * (count + 1)
    base = tensor_at(slots, True, TYPE, ALIGNED)
    lefts, rights, sums = (), (), ()
    for a in tl.static_range(4):
        lefts += (tensor_at(slots + 1 + block * 4 + a, block * 4 + a < count, TYPE, ALIGNED),)
        if not DIAGONAL:
            rights += (tensor_at(slots + 1 + other * 4 + a, other * 4 + a < count, TYPE, ALIGNED),)
        for _ in tl.static_range(a + 1 if DIAGONAL else 4):
            sums += (tl.zeros((ROWS, COLUMNS // VECTOR), tl.float64),)
    square = tl.zeros((ROWS, COLUMNS // 8), tl.float64)  # of eight: registers are short where inputs are float64
    for start in range(0, n, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        offsets = rows[:, None].to(tl.int64) * n + columns[None, :]
        inside = (rows < m)[:, None] & (columns < n)[None, :]
        theta = tl.load(base + offsets, mask=inside, other=0.0).to(tl.float64)
        left, right = (), ()
        for a in tl.static_range(4):
            here = (rows < tl.where(block * 4 + a < count, m, 0))[:, None] & (columns < n)[None, :]
            left += (tl.where(here, tl.load(lefts[a] + offsets, mask=here, other=0.0).to(tl.float64) - theta, 0.0),)
            if not DIAGONAL:
                here = (rows < tl.where(other * 4 + a < count, m, 0))[:, None] & (columns < n)[None, :]
                tau = tl.load(rights[a] + offsets, mask=here, other=0.0).to(tl.float64) - theta
                right += (tl.where(here, tau, 0.0),)
        added = ()
        for a in tl.static_range(4):
            for b in tl.static_range(a + 1 if DIAGONAL else 4):
                product = left[a] * (left[b] if DIAGONAL else right[b])
                # A thread adds up the elements of its vector first: one register pair a sum, not one an element.
                product = tl.sum(tl.reshape(product, (ROWS, COLUMNS // VECTOR, VECTOR)), axis=2)
                added += (sums[a * (a + 1) // 2 + b if DIAGONAL else 4 * a + b] + product,)
        sums = added
        square += tl.sum(tl.reshape(theta * theta, (ROWS, COLUMNS // 8, 8)), axis=2)
    of_tensor = out + tensor * (count * (count + 1) // 2) * m
    for a in tl.static_range(4):
        for b in tl.static_range(a + 1 if DIAGONAL else 4):
            i, j = block * 4 + a, other * 4 + b
            total = tl.sum(sums[a * (a + 1) // 2 + b if DIAGONAL else 4 * a + b], axis=1)
            where = of_tensor + (i * (i + 1) // 2 + j).to(tl.int64) * m + rows
            tl.store(where, total, mask=rows < tl.where((i < count) & (j <= i), m, 0))
    tl.store(squares + tensor * m + rows, tl.sum(square, axis=1), mask=rows < tl.where(pair == 0, m, 0))


@triton.jit
def lengths_to_shares(shares, weights, power, longest, inside, m, count, BLOCK: tl.constexpr):
    """Σ_i of what becomes of lengths of rows in ``shares``: weights_i · length^power, relative to the longest."""
    total = tl.zeros((BLOCK,), tl.float64)
    for i in range(count):
        # Relative to the longest, so that no power leaves float64's range; where nobody changed a row, all count.
        relative = tl.load(shares + i * m, mask=inside, other=0.0) / tl.where(longest == 0.0, 1.0, longest)
        raised = tl.where(relative == 0.0, 0.0, tl.exp2(power * tl.log2(tl.where(relative == 0.0, 1.0, relative))))
        raised = tl.where(longest == 0.0, 1.0, tl.where(power == 0.0, 1.0, raised))
        share = tl.load(weights + i) * raised
        tl.store(shares + i * m, share, mask=inside)
        total += share
    return total


@triton.jit(do_not_specialize=["m", "count"])
def row_coefficients_kernel(grams, numbers, shares, out, m, count, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """out[l, row, j] = core_j + eta Σ_i mixing_ji W_i, with W from the rows' Gram matrices; see ``ops.combine_rows``.

    numbers, float64: core, weights, scales (N each), mixing (N, N), eta and power; shares: room for (L, N, m).
    """
    tensor = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < m
    grams += tensor * (count * (count + 1) // 2) * m + rows
    shares += tensor * count * m + rows
    weights, scales, mixing = numbers + count, numbers + 2 * count, numbers + 3 * count
    # A kernel's own argument of Python's type float would be one of 32 bits.
    eta, power = tl.load(mixing + count * count), tl.load(mixing + count * count + 1)
    longest = tl.zeros((BLOCK,), tl.float64)
    for i in range(count):
        square = tl.zeros((BLOCK,), tl.float64)
        for a in range(count):
            for b in range(a + 1):
                gram = tl.load(grams + (a * (a + 1) // 2 + b) * m, mask=inside, other=0.0)
                twice = tl.where(a == b, 1.0, 2.0)
                square += twice * tl.load(mixing + a * count + i) * tl.load(mixing + b * count + i) * gram
        # Below 0 it is rounding; a NaN stays one.
        length = tl.load(scales + i) * tl.sqrt(tl.where(square < 0.0, 0.0, square))
        tl.store(shares + i * m, length, mask=inside)
        longest = tl.where(length <= longest, longest, length)
    tl.debug_barrier()
    total = lengths_to_shares(shares, weights, power, longest, inside, m, count, BLOCK)
    tl.debug_barrier()
    for j in range(count):
        mixed = tl.zeros((BLOCK,), tl.float64)
        for i in range(count):
            mixed += tl.load(mixing + j * count + i) * (tl.load(shares + i * m, mask=inside, other=0.0) / total)
        coefficient = tl.load(numbers + j) + eta * mixed
        tl.store(out + (tensor * m + rows) * count + j, coefficient.to(COMPUTE), mask=inside)


def row_grams(bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]]) -> RowGrams:
    """See :class:`r2m_kernels._interface.Operators`."""
    count, m = len(experts), bases[0].shape[0]
    n = bases[0].numel() // max(1, m)
    group = Group(bases, experts, n)
    size, all_pairs = len(bases), count * (count + 1) // 2
    out = torch.empty(size * (all_pairs + 1), m, dtype=torch.float64, device=group.device)
    rows = out[:-size].view(size, all_pairs, m)
    if m * n == 0:
        return RowGrams(rows.zero_(), out.new_zeros(size))
    config = launch.task_gram(launch.target_of(group.device), group.dtype, count, group.aligned)
    blocks = -(-count // BLOCK_OF_EXPERTS)
    pairs = blocks * (blocks + 1) // 2
    launch.start(
        row_grams_kernel,
        (-(-m // ROWS) * pairs, size),
        config,
        group.table,
        rows,
        out[-size:],
        m,
        n,
        count,
        pairs,
        TYPE=ELEMENT_TYPES[group.dtype],
        ALIGNED=config.aligned,
        DIAGONAL=config.diagonal,
        ROWS=ROWS,
        COLUMNS=config.block // ROWS,
    )
    sums, base = torch.split(sum_tiles(out), [size * all_pairs, size])
    return RowGrams(rows, base, sums.view(size, all_pairs))


def row_coefficients(
    rows: Tensor,
    core: Tensor,
    mixing: Tensor,
    weights: Tensor,
    scales: Tensor,
    eta: float,
    power: float,
    dtype: torch.dtype,
) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""
    (size, _, m), count = rows.shape, len(core)
    out = torch.empty(size, m, count, dtype=dtype, device=rows.device)
    if out.numel() == 0:
        return out
    rule = torch.tensor([eta, power], dtype=torch.float64, device=core.device)
    numbers = torch.cat([core.double(), weights.double(), scales.double(), mixing.double().flatten(), rule])
    config = launch.sums()
    launch.start(
        row_coefficients_kernel,
        (-(-m // config.block), size),
        config,
        rows.contiguous(),
        numbers.to(rows.device, non_blocking=True),
        torch.empty(size, count, m, dtype=torch.float64, device=rows.device),
        out,
        m,
        count,
        COMPUTE=ELEMENT_TYPES[dtype],
        BLOCK=config.block,
    )
    return out
