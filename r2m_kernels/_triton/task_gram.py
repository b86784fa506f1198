"""Step 1: the Gram matrices of the task vectors, in one read of all inputs (README §2).

A program takes one chunk of one tensor and a pair of blocks of four experts. Differences and products are float64: ten
multiply-adds and four conversions for 16 bytes (8 of 16-bit inputs) should hide behind the loads on data-centre GPUs
(predicted; not on consumer ones, whose float64 is slow), no bound has to be argued, and nothing finite overflows. More
than four experts are read in pairs of blocks; the pairs of one chunk are neighbours in the grid, so that all but the
first find it in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._interface import Grams
from . import launch
from .addresses import ELEMENT_TYPES, Group, known_multiple, tensor_at
from .sums import sum_tiles

BLOCK_OF_EXPERTS = 4
# Elements of one launch, 1 GiB in float32; panels are summed in order, so that a tensor may also come in parts.
PANEL = 2**28


@triton.jit(do_not_specialize=["elements", "count", "chunks", "pairs"])
def task_gram_kernel(
    table,
    partial,
    elements: tl.int64,
    count,
    chunks,
    pairs,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    DIAGONAL: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partial[l, pair, a, b, chunk] = Σ over the chunk of τ_(4·block + a) τ_(4·block' + b)."""
    VECTOR: tl.constexpr = 128 // TYPE.primitive_bitwidth
    tensor = tl.program_id(1).to(tl.int64)
    chunk, pair = tl.program_id(0) // pairs, tl.program_id(0) % pairs
    # pair → (row, column) of the lower triangle of blocks
    row, column = pair * 0, pair
    while column > row:
        row += 1
        column -= row
    if ALIGNED:
        elements = known_multiple(elements, 128 // TYPE.primitive_bitwidth)
    slots = table + tensor * (count + 1)
    base = tensor_at(slots, True, TYPE, ALIGNED)
    lefts, rights, sums = (), (), ()
    for a in tl.static_range(4):
        j = row * 4 + a
        lefts += (tensor_at(slots + 1 + j, j < count, TYPE, ALIGNED),)
        if not DIAGONAL:
            j = column * 4 + a
            rights += (tensor_at(slots + 1 + j, j < count, TYPE, ALIGNED),)
        for _ in tl.static_range(a + 1 if DIAGONAL else 4):
            sums += (tl.zeros((BLOCK // VECTOR,), tl.float64),)
    start = chunk.to(tl.int64) * (STEPS * BLOCK)
    for step in range(STEPS):
        offsets = start + step * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < elements
        theta = tl.load(base + offsets, mask=inside, other=0.0).to(tl.float64)
        left, right = (), ()
        for a in tl.static_range(4):
            here = offsets < tl.where(row * 4 + a < count, elements, 0)
            tau = tl.load(lefts[a] + offsets, mask=here, other=0.0).to(tl.float64) - theta
            left += (tl.where(here, tau, 0.0),)
            if not DIAGONAL:
                here = offsets < tl.where(column * 4 + a < count, elements, 0)
                tau = tl.load(rights[a] + offsets, mask=here, other=0.0).to(tl.float64) - theta
                right += (tl.where(here, tau, 0.0),)
        added = ()
        for a in tl.static_range(4):
            for b in tl.static_range(a + 1 if DIAGONAL else 4):
                product = left[a] * (left[b] if DIAGONAL else right[b])
                # A thread adds up the elements of its vector first: one register pair a sum, not one an element.
                product = tl.sum(tl.reshape(product, (BLOCK // VECTOR, VECTOR)), axis=1)
                added += (sums[a * (a + 1) // 2 + b if DIAGONAL else 4 * a + b] + product,)
        sums = added
    out = partial + (tensor * pairs + pair) * 16 * chunks + chunk
    for a in tl.static_range(4):
        for b in tl.static_range(a + 1 if DIAGONAL else 4):
            total = tl.sum(sums[a * (a + 1) // 2 + b if DIAGONAL else 4 * a + b])
            tl.store(out + (4 * a + b) * chunks, total)
            if DIAGONAL and a != b:
                tl.store(out + (4 * b + a) * chunks, total)


def gram_panel_elements(precise: bool) -> int:
    """Elements of the panels that a Gram is summed from."""
    return PANEL


def task_gram(bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], precise: bool = False) -> Grams:
    """See :class:`r2m_kernels._interface.Operators`. All of it is ``precise``."""
    count = len(experts)
    alike: dict[tuple[int, tuple[torch.dtype, ...]], list[int]] = {}
    for index, base in enumerate(bases):
        dtypes = tuple(tensor.dtype for tensor in (base, *(expert[index] for expert in experts)))
        alike.setdefault((base.numel(), dtypes), []).append(index)
    result = torch.zeros(len(bases), count, count, dtype=torch.float64, device=bases[0].device)
    for (elements, _), indices in alike.items():
        group_bases, group_experts = [bases[i] for i in indices], [[expert[i] for i in indices] for expert in experts]
        total = _panel_grams(group_bases, group_experts, slice(0, min(elements, PANEL)))
        for start in range(PANEL, elements, PANEL):
            total += _panel_grams(group_bases, group_experts, slice(start, start + PANEL))
        if len(alike) == 1:
            result = total
        else:
            result[indices] = total
    squares = [torch.linalg.vector_norm(base, dtype=torch.float64).square() for base in bases]
    return Grams(result, torch.stack(squares))


def _panel_grams(bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], panel: slice) -> Tensor:
    elements = min(bases[0].numel(), panel.stop) - panel.start
    if elements == 0:
        return torch.zeros(len(bases), len(experts), len(experts), dtype=torch.float64, device=bases[0].device)
    if elements < bases[0].numel():
        bases = [tensor.reshape(-1)[panel] for tensor in bases]
        experts = [[tensor.reshape(-1)[panel] for tensor in expert] for expert in experts]
    return _grams(Group(bases, experts, elements), elements, len(experts))


def _grams(group: Group, elements: int, count: int) -> Tensor:
    size, device = len(group.bases), group.device
    config = launch.task_gram(launch.target_of(device), group.dtype, count, group.aligned)
    chunks = -(-elements // (config.steps * config.block))
    blocks = -(-count // BLOCK_OF_EXPERTS)
    pairs = blocks * (blocks + 1) // 2
    # Entries above the diagonal of a block of its own are mirrored by the kernel; those of absent experts are zeros.
    partial = torch.empty(size, pairs, 4, 4, chunks, dtype=torch.float64, device=device)
    launch.start(
        task_gram_kernel,
        (chunks * pairs, size),
        config,
        group.table,
        partial,
        elements,
        count,
        chunks,
        pairs,
        TYPE=ELEMENT_TYPES[group.dtype],
        ALIGNED=config.aligned,
        DIAGONAL=config.diagonal,
        STEPS=config.steps,
        BLOCK=config.block,
    )
    total = sum_tiles(partial)
    grams = torch.empty(size, 4 * blocks, 4 * blocks, dtype=torch.float64, device=device)
    triangle = [(row, column) for row in range(blocks) for column in range(row + 1)]
    for pair, (row, column) in enumerate(triangle):
        rows, columns = slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4)
        grams[:, rows, columns] = total[:, pair]
        grams[:, columns, rows] = total[:, pair].transpose(1, 2)
    return grams[:, :count, :count]
