"""Step 5: the merged tensors in one read of each input and one write (README §6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._torch import combine as portable
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

ROWS_OF_A_TILE = 4  # where each row has coefficients of its own


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


@triton.jit
def magnitude_bits(values, COMPUTE: tl.constexpr):
    """The largest magnitude by its bits, which compare as numbers do: those of Inf and NaN are above all others."""
    if COMPUTE.primitive_bitwidth == 64:
        bits = values.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return bits


@triton.jit(do_not_specialize=["m", "n", "count", "column_tiles"])
def combine_rows_kernel(
    table,
    outputs,
    coefficients,
    largest,
    m,
    n,
    count,
    column_tiles,
    TYPE: tl.constexpr,
    OUTPUT: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[l] = θ₀ + Σ_j coefficients[l, row, j] τ_lj, a tile a program; largest[l, tile] by its bits."""
    tensor = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) // column_tiles * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    if ALIGNED:
        n = known_multiple(n, 128 // TYPE.primitive_bitwidth)
    offsets = rows[:, None].to(tl.int64) * n + columns[None, :]
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    slots = table + tensor * (count + 1)
    theta = tl.load(tensor_at(slots, True, TYPE, ALIGNED) + offsets, mask=inside, other=0.0).to(COMPUTE)
    total = theta
    for j in range(count):
        weight = tl.load(coefficients + (tensor * m + rows) * count + j, mask=rows < m, other=0.0)
        expert = tensor_at(slots + 1 + j, True, TYPE, ALIGNED)
        total += weight[:, None] * (tl.load(expert + offsets, mask=inside, other=0.0).to(COMPUTE) - theta)
    rounded = total.to(OUTPUT)
    tl.store(tensor_at(outputs + tensor, True, OUTPUT, ALIGNED) + offsets, rounded, mask=inside)
    bits = tl.where(inside, magnitude_bits(rounded.to(COMPUTE), COMPUTE), 0)
    tl.store(largest + tensor * tl.num_programs(0) + tl.program_id(0), tl.max(tl.max(bits, axis=1), axis=0))


@triton.jit(do_not_specialize=["m", "n", "rank", "count", "left_stride", "right_stride", "column_tiles"])
def combine_matrix_kernel(
    table,
    outputs,
    core,
    largest,
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
    rounded = total.to(OUTPUT)
    tl.store(tensor_at(outputs + tensor, True, OUTPUT, ALIGNED) + offsets, rounded, mask=inside)
    bits = tl.where(inside, magnitude_bits(rounded.to(COMPUTE), COMPUTE), 0)
    tl.store(largest + tensor * tl.num_programs(0) + tl.program_id(0), tl.max(tl.max(bits, axis=1), axis=0))


@triton.jit(do_not_specialize=["elements", "count"])
def combine_vector_kernel(
    table,
    outputs,
    core,
    largest,
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
    rounded = total.to(OUTPUT)
    tl.store(tensor_at(outputs + tensor, True, OUTPUT, ALIGNED) + offsets, rounded, mask=inside)
    bits = tl.where(inside, magnitude_bits(rounded.to(COMPUTE), COMPUTE), 0)
    tl.store(largest + tensor * tl.num_programs(0) + tl.program_id(0), tl.max(bits, axis=0))


def combine(
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    coefficients: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    scale: Tensor | None,
    outs: Sequence[Tensor],
) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""
    if bases[0].numel() == 0:
        return torch.zeros(len(bases), device=bases[0].device)
    by_rows = coefficients.ndim == 3
    if by_rows and left is not None:  # no method has both
        return portable(bases, experts, coefficients, left, right, scale, outs)
    row = bases[0].numel() // bases[0].shape[0] if by_rows or left is not None else bases[0].numel()
    group = Group(bases, experts, row)
    targets, fits = _targets(group, outs, row)
    dtype = group.compute_dtype
    largest = torch.finfo(dtype).max  # a coefficient beyond the type becomes its largest number, not Inf · 0
    weights = coefficients.double().clamp(-largest, largest) if not by_rows else coefficients
    weights = weights.to(group.device, dtype, non_blocking=True).contiguous()
    if by_rows:
        bits = _by_rows(group, weights, targets, fits)
    elif left is None or right is None or scale is None:
        bits = _without_factors(group, weights, targets, fits)
    else:
        lefts = padded_rows(left.to(group.device, dtype).transpose(-1, -2))
        rights = padded_rows(right.to(group.device, dtype))
        scale = scale.to(group.device, dtype, non_blocking=True).contiguous()
        bits = _with_factors(group, weights, lefts, rights, scale, targets, fits)
    for out, tensor in zip(outs, targets, strict=True):
        if tensor is not out:
            out.copy_(tensor)
    found = bits.amax(dim=1).view(dtype)
    # Rounded as the outputs are where kernels wrote a wider type.
    return found if targets[0].dtype == outs[0].dtype else found.to(outs[0].dtype).to(dtype)


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


def _room(group: Group, targets: Sequence[Tensor], tiles: int) -> Tensor:
    """For the largest magnitude of every tile of the outputs, as bits."""
    kind = torch.int64 if group.compute_dtype == torch.float64 else torch.int32
    return torch.empty(len(targets), tiles, dtype=kind, device=group.device)


def _without_factors(group: Group, weights: Tensor, targets: Sequence[Tensor], fits: bool) -> Tensor:
    elements = group.bases[0].numel()
    config = launch.combine_vector(launch.target_of(group.device), fits)
    largest = _room(group, targets, -(-elements // config.block))
    launch.start(
        combine_vector_kernel,
        (largest.shape[1], len(targets)),
        config,
        group.table,
        address_table([targets], group.device),
        weights,
        largest,
        elements,
        len(group.experts),
        **_types(group, targets),
        ALIGNED=config.aligned,
        BLOCK=config.block,
    )
    return largest


def _by_rows(group: Group, weights: Tensor, targets: Sequence[Tensor], fits: bool) -> Tensor:
    m, n = group.bases[0].shape[0], group.bases[0].numel() // group.bases[0].shape[0]
    config = launch.combine_vector(launch.target_of(group.device), fits)
    column_tiles = -(-n // (config.block // ROWS_OF_A_TILE))
    largest = _room(group, targets, -(-m // ROWS_OF_A_TILE) * column_tiles)
    launch.start(
        combine_rows_kernel,
        (largest.shape[1], len(targets)),
        config,
        group.table,
        address_table([targets], group.device),
        weights,
        largest,
        m,
        n,
        len(group.experts),
        column_tiles,
        **_types(group, targets),
        ALIGNED=config.aligned,
        ROWS=ROWS_OF_A_TILE,
        COLUMNS=config.block // ROWS_OF_A_TILE,
    )
    return largest


def _with_factors(
    group: Group, weights: Tensor, lefts: Tensor, rights: Tensor, scale: Tensor, targets: Sequence[Tensor], fits: bool
) -> Tensor:
    """Factors lie in memory as rows, (L, N, r, m) and (L, N, r, n)."""
    rank, m, n = lefts.shape[-2], lefts.shape[-1], rights.shape[-1]
    config = launch.combine_matrix(launch.target_of(group.device), group.compute_dtype, fits and vectors_fit(m))
    column_tiles = -(-n // config.columns)
    largest = _room(group, targets, -(-m // config.rows) * column_tiles)
    launch.start(
        combine_matrix_kernel,
        (largest.shape[1], len(targets)),
        config,
        group.table,
        address_table([targets], group.device),
        weights,
        largest,
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
    return largest
