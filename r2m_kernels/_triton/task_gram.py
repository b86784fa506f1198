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
from .addresses import ELEMENT_TYPES, Group, known_multiple, send, tensor_at
from .sums import sum_runs

BLOCK_OF_EXPERTS = 4
# Elements of one launch, 1 GiB in float32; panels are summed in order, so that a tensor may also come in parts.
PANEL = 2**28


@triton.jit(
    do_not_specialize=["elements", "count", "chunks", "pairs"], do_not_specialize_on_alignment=["partial", "squares"]
)
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
    count, size = len(experts), len(bases)
    out = torch.empty(size * (count**2 + 1), dtype=torch.float64, device=bases[0].device)
    grams = Grams(out[: size * count**2].view(size, count, count), out[size * count**2 :])
    # One launch for each run of tensors alike, and one that sums what they all left.
    launches: list[tuple[slice, Group, launch.GramConfig, int]] = []
    for some in _runs(bases, experts):
        of_run, elements = (bases[some], [expert[some] for expert in experts]), bases[some.start].numel()
        if elements > PANEL:
            panels = [slice(start, start + PANEL) for start in range(0, elements, PANEL)]
            for whole, parts in zip(grams, zip(*(_of_panel(*of_run, one) for one in panels), strict=True), strict=True):
                whole[some] = sum(parts[1:], parts[0])
        else:
            group = Group(*of_run, elements)
            config = launch.task_gram(launch.target_of(group.device), group.dtype, count, group.aligned)
            launches.append((some, group, config, -(-elements // (config.steps * config.block))))
    if launches:
        _summed(launches, count, out)
    return grams


def _runs(bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]]) -> list[slice]:
    """Of tensors that have as many elements, and are of the same dtypes."""
    kinds = [
        (base.numel(), base.dtype, *(expert[index].dtype for expert in experts)) for index, base in enumerate(bases)
    ]
    starts = [index for index in range(len(kinds)) if index == 0 or kinds[index] != kinds[index - 1]]
    return [slice(*ends) for ends in zip(starts, [*starts[1:], len(kinds)], strict=True)]


def _of_panel(bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], panel: slice) -> Grams:
    """Of a run of elements of each tensor."""
    parts = [[tensor.reshape(-1)[panel] for tensor in some] for some in (bases, *experts)]
    return task_gram(parts[0], parts[1:])


def _summed(launches: list[tuple[slice, Group, launch.GramConfig, int]], count: int, out: Tensor) -> None:
    """N² numbers of every tensor into ``out``, and after those of all tensors one of every base."""
    runs: list[tuple[int, int, int, int, int, int]] = []
    sums = start = 0
    tasks = len(out) // (count**2 + 1) * count**2  # of all tensors
    for some, _, _, chunks in launches:
        size = some.stop - some.start
        sums += size * (count**2 + 1)
        runs.append((sums, start, chunks, some.start * count**2, tasks + some.start, size * count**2))
        start += size * (count**2 + 1) * chunks
    partial = torch.empty(start, dtype=torch.float64, device=out.device)
    (table,) = send([group for _, group, _, _ in launches], out.device, torch.tensor(runs))
    for (some, group, config, chunks), (_, first, *_, ahead) in zip(launches, runs, strict=True):
        size, blocks = some.stop - some.start, -(-count // BLOCK_OF_EXPERTS)
        of_tasks, of_bases = torch.split(
            partial[first:][: size * (count**2 + 1) * chunks], [ahead * chunks, size * chunks]
        )
        if not chunks:
            continue
        pairs = blocks * (blocks + 1) // 2
        launch.start(
            task_gram_kernel,
            (chunks * pairs, size),
            config,
            group.table,
            of_tasks.view(size, count, count, chunks),
            of_bases.view(size, chunks),
            group.bases[0].numel(),
            count,
            chunks,
            pairs,
            TYPE=ELEMENT_TYPES[group.dtype],
            ALIGNED=config.aligned,
            DIAGONAL=config.diagonal,
            STEPS=config.steps,
            BLOCK=config.block,
        )
    sum_runs(partial, table, sums, out)
