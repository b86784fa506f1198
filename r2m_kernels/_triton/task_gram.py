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


@triton.jit(do_not_specialize=["elements", "count", "chunks", "pairs"], do_not_specialize_on_alignment=["squares"])
def task_gram_kernel(
    table,
    partial,
    squares,
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
    """partial[l, i, j, chunk] = Σ over the chunk of τ_li τ_lj, and squares[l, chunk] of θ₀².

    A program has a block of four experts and another; with DIAGONAL there is only one, N ≤ 4.
    """
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
    square = tl.zeros((BLOCK // VECTOR,), tl.float64)
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
        square += tl.sum(tl.reshape(theta * theta, (BLOCK // VECTOR, VECTOR)), axis=1)
    out = partial + tensor * count * count * chunks + chunk
    for a in tl.static_range(4):
        for b in tl.static_range(a + 1 if DIAGONAL else 4):
            i, j = row * 4 + a, column * 4 + b
            total = tl.sum(sums[a * (a + 1) // 2 + b if DIAGONAL else 4 * a + b])
            if (i < count) & (j <= i):
                tl.store(out + (i * count + j) * chunks, total)
                if j < i:
                    tl.store(out + (j * count + i) * chunks, total)
    if pair == 0:
        tl.store(squares + tensor * chunks + chunk, tl.sum(square))


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
    found = []
    for (elements, _), indices in alike.items():
        group_bases, group_experts = [bases[i] for i in indices], [[expert[i] for i in indices] for expert in experts]
        total = _panel_sums(group_bases, group_experts, slice(0, min(elements, PANEL)))
        for start in range(PANEL, elements, PANEL):
            total += _panel_sums(group_bases, group_experts, slice(start, start + PANEL))
        tasks, base = torch.split(total, [len(indices) * count**2, len(indices)])
        found.append(Grams(tasks.view(-1, count, count), base))
    if len(found) == 1:
        return found[0]
    places = [place for indices in alike.values() for place in indices]
    order = sorted(range(len(places)), key=places.__getitem__)
    return Grams(*(torch.cat(of_all)[order] for of_all in zip(*found, strict=True)))


def _panel_sums(bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], panel: slice) -> Tensor:
    """Of a run of elements: L · N² times ⟨τ_li, τ_lj⟩, then L times ‖θ₀‖², float64."""
    elements = min(bases[0].numel(), panel.stop) - panel.start
    sums = len(bases) * (len(experts) ** 2 + 1)
    if elements == 0:
        return torch.zeros(sums, dtype=torch.float64, device=bases[0].device)
    if elements < bases[0].numel():
        bases = [tensor.reshape(-1)[panel] for tensor in bases]
        experts = [[tensor.reshape(-1)[panel] for tensor in expert] for expert in experts]
    group, count = Group(bases, experts, elements), len(experts)
    config = launch.task_gram(launch.target_of(group.device), group.dtype, count, group.aligned)
    chunks = -(-elements // (config.steps * config.block))
    blocks = -(-count // BLOCK_OF_EXPERTS)
    pairs = blocks * (blocks + 1) // 2
    partial = torch.empty(sums, chunks, dtype=torch.float64, device=group.device)
    launch.start(
        task_gram_kernel,
        (chunks * pairs, len(bases)),
        config,
        group.table,
        partial[: -len(bases)].view(len(bases), count, count, chunks),
        partial[-len(bases) :],
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
    return sum_tiles(partial)
