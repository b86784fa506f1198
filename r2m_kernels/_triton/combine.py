"""Step 5: the merged tensors in one read of each input and one write (README §6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._torch.combine import combine as portable
from .._torch.largest import magnitudes
from . import launch
from .addresses import (
    ELEMENT_TYPES,
    VECTOR_BYTES,
    Group,
    address_table,
    known_multiple,
    padded_rows,
    tensor_at,
    vectors_fit,
    well_placed,
)


@triton.jit
def merged_inputs(
    slots, core, offsets, inside, count, TYPE: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr
):
    """θ₀ + Σ_j core_j (θ_j − θ₀) at these offsets; an expert whose coefficient is 0 is not read."""
    theta = tl.load(tensor_at(slots, True, TYPE, ALIGNED) + offsets, mask=inside, other=0.0).to(COMPUTE)
    total = theta
    for j in range(count):
        weight = tl.load(core + j)
        if weight != 0.0:
            expert = tensor_at(slots + 1 + j, True, TYPE, ALIGNED)
            total += weight * (tl.load(expert + offsets, mask=inside, other=0.0).to(COMPUTE) - theta)
    return total


@triton.jit(do_not_specialize=["m", "n", "rank", "count", "left_stride", "right_stride", "column_tiles"])
def combine_matrix_kernel(
    table,
    outputs,
    core,
    scale,
    left,
    right,
    m,
    n,
    rank,
    count,
    left_stride,
    right_stride,
    column_tiles,
    TYPE: tl.constexpr,
    OUTPUT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """out[l] = θ₀ + Σ_j core_j τ_lj + Σ_i scale_i left[l, i]ᵀ right[l, i], a tile a program.

    table (L, N + 1), outputs (L,), core and scale (N,), left (L, N, rank, m), right (L, N, rank, n).
    """
    tensor = tl.program_id(1).to(tl.int64)
    row_tile, column_tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    if ALIGNED:
        m, n = known_multiple(m, 4), known_multiple(n, 128 // TYPE.primitive_bitwidth)
    left_stride, right_stride = known_multiple(left_stride, 16), known_multiple(right_stride, 16)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    steps = tl.cdiv(rank, INNER)
    total = tl.zeros((ROWS, COLUMNS), COMPUTE)
    for step in range(count * steps):
        i, depth = step // steps, (step % steps) * INNER + tl.arange(0, INNER)
        where = (tensor * count + i) * rank + depth[:, None]
        lefts = tl.load(left + where * left_stride + rows[None, :], mask=(depth < rank)[:, None] & (rows < m)[None, :])
        rights = tl.load(
            right + where * right_stride + columns[None, :], mask=(depth < rank)[:, None] & (columns < n)[None, :]
        )
        # Masked entries hold anything: zero them on both sides, since NaN · 0 is NaN.
        lefts = tl.where((depth < rank)[:, None] & (rows < m)[None, :], lefts, 0.0) * tl.load(scale + i)
        rights = tl.where((depth < rank)[:, None] & (columns < n)[None, :], rights, 0.0)
        total = tl.dot(tl.trans(lefts), rights, total, input_precision=PRECISION, out_dtype=COMPUTE)
    offsets = rows[:, None].to(tl.int64) * n + columns[None, :]
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    total += merged_inputs(table + tensor * (count + 1), core, offsets, inside, count, TYPE, COMPUTE, ALIGNED)
    out = tensor_at(outputs + tensor, True, OUTPUT, ALIGNED)
    tl.store(out + offsets, total.to(OUTPUT), mask=inside)


@triton.jit(do_not_specialize=["elements", "count"])
def combine_vector_kernel(
    table,
    outputs,
    core,
    elements: tl.int64,
    count,
    TYPE: tl.constexpr,
    OUTPUT: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[l] = θ₀ + Σ_j core_j τ_lj for tensors without a low-rank term, a block of elements a program."""
    block, tensor = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if ALIGNED:
        elements = known_multiple(elements, 128 // TYPE.primitive_bitwidth)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < elements
    total = merged_inputs(table + tensor * (count + 1), core, offsets, inside, count, TYPE, COMPUTE, ALIGNED)
    out = tensor_at(outputs + tensor, True, OUTPUT, ALIGNED)
    tl.store(out + offsets, total.to(OUTPUT), mask=inside)


def combine(
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    coefficients: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    scale: Tensor | None,
    outs: Sequence[Tensor],
) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`; coefficients of rows are the portable backend's."""
    if coefficients.ndim == 3 or bases[0].numel() == 0:
        return portable(bases, experts, coefficients, left, right, scale, outs)
    row = bases[0].numel() if left is None else bases[0].numel() // bases[0].shape[0]
    group = Group(bases, experts, row)
    targets, fits = _targets(group, outs, row)
    dtype = group.compute_dtype
    largest = torch.finfo(dtype).max  # a coefficient beyond the type becomes its largest number, not Inf · 0
    weights = coefficients.double().clamp(-largest, largest).to(group.device, dtype)
    if left is None or right is None or scale is None:
        _without_factors(group, weights, targets, fits)
    else:
        lefts = padded_rows(left.to(group.device, dtype).transpose(-1, -2))
        rights = padded_rows(right.to(group.device, dtype))
        _with_factors(group, weights, lefts, rights, scale.to(group.device, dtype).contiguous(), targets, fits)
    for out, tensor in zip(outs, targets, strict=True):
        if tensor is not out:
            out.copy_(tensor)
    return magnitudes(outs)


def _targets(group: Group, outs: Sequence[Tensor], row: int) -> tuple[list[Tensor], bool]:
    """What kernels write to, ``outs`` themselves where they can; and whether rows of all are whole vectors.

    A kernel writes the type it reads or the one it computes in; any other output is rounded from the latter.
    """
    kinds = {out.dtype for out in outs}
    written = kinds.pop() if len(kinds) == 1 and kinds <= {group.dtype, group.compute_dtype} else group.compute_dtype
    fits = group.aligned and row * written.itemsize % VECTOR_BYTES == 0
    targets = [
        out
        if out.dtype == written and out.is_contiguous() and (well_placed(out) or not fits)
        else torch.empty(out.shape, dtype=written, device=out.device)
        for out in outs
    ]
    return targets, fits


def _types(group: Group, targets: Sequence[Tensor]) -> dict[str, tl.dtype]:
    """Element types of inputs, outputs and sums."""
    types = {"TYPE": group.dtype, "OUTPUT": targets[0].dtype, "COMPUTE": group.compute_dtype}
    return {name: ELEMENT_TYPES[dtype] for name, dtype in types.items()}


def _without_factors(group: Group, weights: Tensor, targets: Sequence[Tensor], fits: bool) -> None:
    elements = group.bases[0].numel()
    config = launch.combine_vector(launch.target_of(group.device), fits)
    launch.start(
        combine_vector_kernel,
        (-(-elements // config.block), len(targets)),
        config,
        group.table,
        address_table([targets], group.device),
        weights,
        elements,
        len(group.experts),
        **_types(group, targets),
        ALIGNED=config.aligned,
        BLOCK=config.block,
    )


def _with_factors(
    group: Group, weights: Tensor, lefts: Tensor, rights: Tensor, scale: Tensor, targets: Sequence[Tensor], fits: bool
) -> None:
    """Factors lie in memory as rows, (L, N, r, m) and (L, N, r, n)."""
    rank, m, n = lefts.shape[-2], lefts.shape[-1], rights.shape[-1]
    config = launch.combine_matrix(launch.target_of(group.device), group.compute_dtype, fits and vectors_fit(m))
    column_tiles = -(-n // config.columns)
    launch.start(
        combine_matrix_kernel,
        (-(-m // config.rows) * column_tiles, len(targets)),
        config,
        group.table,
        address_table([targets], group.device),
        weights,
        scale,
        lefts,
        rights,
        m,
        n,
        rank,
        len(group.experts),
        lefts.stride(-2),
        rights.stride(-2),
        column_tiles,
        **_types(group, targets),
        PRECISION=config.input_precision,
        ALIGNED=config.aligned,
        ROWS=config.rows,
        COLUMNS=config.columns,
        INNER=config.inner,
    )
