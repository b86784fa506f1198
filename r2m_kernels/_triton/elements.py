"""What goes element by element: sums, and what TIES and DARE leave of task vectors (README §8).

All are bound by memory: a block of elements a program, one read of every input and one write. Only the counts of
magnitudes meet in atomics, and those of integers have no order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .addresses import ELEMENT_TYPES, VECTOR_BYTES, Group, addresses_of, block_of, loaded, send, well_placed
from .outputs import Outputs, representable, write_rounded


@triton.jit(do_not_specialize=["elements", "count"])
def weighted_sum_kernel(
    table,
    outputs,
    largest,
    weights,
    elements: tl.int64,
    count,
    TYPE: tl.constexpr,
    OUTPUT: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHANGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[l] = Σ_j weights_j (θ_j − θ₀) with CHANGES, else Σ_j weights_j θ_j."""
    offsets, inside = block_of(elements, TYPE, ALIGNED, BLOCK)
    slots = table + tl.program_id(1).to(tl.int64) * (count + 1)
    total = tl.zeros((BLOCK,), COMPUTE)
    theta = loaded(slots, offsets, inside, TYPE, COMPUTE, ALIGNED) if CHANGES else total
    for j in range(count):
        total += tl.load(weights + j) * (loaded(slots + 1 + j, offsets, inside, TYPE, COMPUTE, ALIGNED) - theta)
    write_rounded(total, outputs, largest, offsets, inside, OUTPUT, COMPUTE, ALIGNED)


@triton.jit(do_not_specialize=["elements"])
def add_kernel(
    table,
    outputs,
    largest,
    elements: tl.int64,
    TYPE: tl.constexpr,
    OUTPUT: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHANGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[l] = θ₀ + change, of their own types; table (L, 2)."""
    offsets, inside = block_of(elements, TYPE, ALIGNED, BLOCK)
    slots = table + tl.program_id(1).to(tl.int64) * 2
    total = loaded(slots, offsets, inside, TYPE, COMPUTE, ALIGNED)
    total += loaded(slots + 1, offsets, inside, CHANGE, COMPUTE, ALIGNED)
    write_rounded(total, outputs, largest, offsets, inside, OUTPUT, COMPUTE, ALIGNED)


@triton.jit(do_not_specialize=["elements", "count"])
def combine_ties_kernel(
    table,
    outputs,
    largest,
    numbers,
    thresholds,
    elements: tl.int64,
    count,
    TYPE: tl.constexpr,
    OUTPUT: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[l] = θ₀ + scale · the weighted mean of those τ_j beyond their threshold that agree in sign with their sum.

    numbers: scale and N weights; thresholds (N,) float32.
    """
    offsets, inside = block_of(elements, TYPE, ALIGNED, BLOCK)
    slots = table + tl.program_id(1).to(tl.int64) * (count + 1)
    theta = loaded(slots, offsets, inside, TYPE, COMPUTE, ALIGNED)
    # Which sign wins is known at the end only: both sums, so that nothing is read twice.
    above, below = tl.zeros((BLOCK,), COMPUTE), tl.zeros((BLOCK,), COMPUTE)
    share_above, share_below = tl.zeros((BLOCK,), COMPUTE), tl.zeros((BLOCK,), COMPUTE)
    total = tl.zeros((BLOCK,), COMPUTE)
    for j in range(count):
        weight = tl.load(numbers + 1 + j)
        tau = loaded(slots + 1 + j, offsets, inside, TYPE, COMPUTE, ALIGNED) - theta
        kept = tl.abs(tau).to(tl.float32) >= tl.load(thresholds + j)
        tau = tl.where(kept, tau, 0.0 * tau)  # NaN and Inf stay to be seen
        total += weight * tau
        above += tl.where(tau > 0, weight * tau, 0.0)
        below += tl.where(tau < 0, weight * tau, 0.0)
        share_above += tl.where(tau > 0, weight, 0.0)
        share_below += tl.where(tau < 0, weight, 0.0)
    winner, share = tl.where(total > 0, above, below), tl.where(total > 0, share_above, share_below)
    mean = winner / tl.where(share > 0, share, 1.0)
    mean = tl.where((total > 0) | (total < 0), mean, total)  # 0, or NaN
    total = theta + tl.load(numbers) * mean
    write_rounded(total, outputs, largest, offsets, inside, OUTPUT, COMPUTE, ALIGNED)


@triton.jit
def upper_half_of_splitmix(key, place):
    """The upper 32 of the 64 bits at a place, from 1, of the sequence that starts at key; see ``_interface``."""
    z = key.to(tl.uint64) + 0x9E3779B97F4A7C15 * place.to(tl.uint64)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return (z ^ (z >> 31)) >> 32


@triton.jit(do_not_specialize=["limit", "first", "elements", "count"])
def combine_dare_kernel(
    table,
    outputs,
    largest,
    coefficients,
    keys,
    limit: tl.int64,
    first: tl.int64,
    elements: tl.int64,
    count,
    TYPE: tl.constexpr,
    OUTPUT: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[l] = θ₀ + Σ_j coefficients_j τ_lj over the elements whose random number is below ``limit``; keys (L, N)."""
    tensor = tl.program_id(1).to(tl.int64)
    offsets, inside = block_of(elements, TYPE, ALIGNED, BLOCK)
    slots = table + tensor * (count + 1)
    theta = loaded(slots, offsets, inside, TYPE, COMPUTE, ALIGNED)
    total = theta
    for j in range(count):
        number = upper_half_of_splitmix(tl.load(keys + tensor * count + j), offsets + first + 1)
        tau = loaded(slots + 1 + j, offsets, inside, TYPE, COMPUTE, ALIGNED) - theta
        tau = tl.where(number.to(tl.int64) < limit, tau, 0.0 * tau)  # NaN and Inf stay to be seen
        total += tl.load(coefficients + j) * tau
    write_rounded(total, outputs, largest, offsets, inside, OUTPUT, COMPUTE, ALIGNED)


@triton.jit(do_not_specialize=["count"])
def count_magnitudes_kernel(
    table,
    sizes,
    upper,
    counts,
    count,
    TYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    LOWER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """counts[j, half of the bits of |τ_lj| as float32] += 1: the upper, or of those that have ``upper_j`` the LOWER.

    sizes (L,): elements of each tensor; upper (N,); counts (N, 65536).
    """
    tensor = tl.program_id(1).to(tl.int64)
    offsets, inside = block_of(tl.load(sizes + tensor), TYPE, ALIGNED, BLOCK)
    slots = table + tensor * (count + 1)
    theta = loaded(slots, offsets, inside, TYPE, COMPUTE, ALIGNED)
    for j in range(count):
        tau = loaded(slots + 1 + j, offsets, inside, TYPE, COMPUTE, ALIGNED) - theta
        bits = tl.abs(tau).to(tl.float32).to(tl.int32, bitcast=True)
        bucket, counted = bits >> 16, inside
        if LOWER:
            bucket, counted = bits & 0xFFFF, inside & (bucket == tl.load(upper + j).to(tl.int32))
        tl.atomic_add(counts + j * 65536 + bucket, tl.full((BLOCK,), 1, tl.int64), mask=counted, sem="relaxed")


def weighted_sum(
    bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], coefficients: Tensor, dtype: torch.dtype
) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""
    m = bases[0].shape[0] if bases[0].ndim else 1
    sums = torch.empty(len(bases), m, bases[0].numel() // max(1, m), dtype=dtype, device=bases[0].device)
    group = Group(bases, experts, bases[0].numel())
    _weighted_sum(group, coefficients, sums.unbind(), dtype, changes=True)
    return sums


def mean(experts: Sequence[Sequence[Tensor]], weights: Tensor, outs: Sequence[Tensor]) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""
    group = Group(experts[0], experts, outs[0].numel())  # there is no base, and none is read
    return _weighted_sum(group, weights, outs, torch.float64, changes=False)


def _weighted_sum(group: Group, weights: Tensor, outs: Sequence[Tensor], dtype: torch.dtype, changes: bool) -> Tensor:
    outputs, elements = Outputs(group, outs, outs[0].numel(), dtype), outs[0].numel()
    config = launch.combine_vector(launch.target_of(group.device), outputs.aligned)
    weights = representable(weights, dtype).to(dtype)
    arguments = (weights, elements, len(group.experts))
    return outputs.write(
        weighted_sum_kernel, -(-elements // config.block), config, *arguments, CHANGES=changes, BLOCK=config.block
    )


def add(bases: Sequence[Tensor], changes: Tensor, outs: Sequence[Tensor]) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""
    elements, changes = bases[0].numel(), changes.contiguous()
    group = Group(bases, [], elements)
    outputs = Outputs(group, outs, elements, torch.promote_types(group.compute_dtype, changes.dtype))
    fits = well_placed(changes) and elements * changes.element_size() % VECTOR_BYTES == 0
    config = launch.combine_vector(launch.target_of(group.device), outputs.aligned and fits)
    return outputs.write(
        *(add_kernel, -(-elements // config.block), config, elements),
        table=addresses_of([group.bases, changes.unbind()]),
        CHANGE=ELEMENT_TYPES[changes.dtype],
        BLOCK=config.block,
    )


def combine_ties(
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    weights: Tensor,
    scale: float,
    thresholds: Tensor,
    outs: Sequence[Tensor],
) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""
    elements = bases[0].numel()
    group = Group(bases, experts, elements)
    outputs, dtype = Outputs(group, outs, elements), group.compute_dtype
    config = launch.combine_vector(launch.target_of(group.device), outputs.aligned)
    numbers = representable(torch.cat([weights.new_tensor([scale]), weights]), dtype)
    return outputs.write(
        *(combine_ties_kernel, -(-elements // config.block), config),
        *(numbers.to(dtype), thresholds.to(torch.float32)),
        *(elements, len(experts)),
        BLOCK=config.block,
    )


def combine_dare(
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    weights: Tensor,
    scale: float,
    density: float,
    keys: Tensor,
    first: int,
    outs: Sequence[Tensor],
) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""
    elements = bases[0].numel()
    group = Group(bases, experts, elements)
    outputs, dtype = Outputs(group, outs, elements), group.compute_dtype
    config = launch.combine_vector(launch.target_of(group.device), outputs.aligned)
    coefficients = representable(weights.double() * (scale / density), dtype)
    return outputs.write(
        *(combine_dare_kernel, -(-elements // config.block), config),
        *(coefficients.to(dtype), keys.contiguous()),
        *(int(density * 2**32), first, elements, len(experts)),
        BLOCK=config.block,
    )


def count_magnitudes(
    bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], upper: Tensor | None, counts: Tensor
) -> None:
    """See :class:`r2m_kernels._interface.Operators`."""
    sizes = [base.numel() for base in bases]
    group = Group(bases, experts, math.gcd(*sizes))
    config = launch.combine_vector(launch.target_of(group.device), group.aligned)
    there = send([group], group.device, torch.tensor(sizes), counts if upper is None else upper)
    launch.start(
        *(count_magnitudes_kernel, (-(-max(sizes) // config.block), len(bases)), config),
        *(group.table, *there, counts, len(experts)),
        TYPE=ELEMENT_TYPES[group.dtype],
        COMPUTE=ELEMENT_TYPES[group.compute_dtype],
        ALIGNED=config.aligned,
        LOWER=upper is not None,
        BLOCK=config.block,
    )
