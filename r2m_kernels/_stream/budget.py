"""What a merge will take, from shapes alone: how a memory budget is split, and what each tensor costs (README §10).

The engine deals its work by these numbers, and the application predicts a merge with them before any tensor is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..config import MergeConfig
from .compatibility import PlannedTensor

COMPUTE_BYTES = 4  # of an element of intermediate results and factors; 8 where the base is float64
# Tensors begun and not yet finished, per thread: one at work and one that is read or written meanwhile.
AHEAD = 2
# Multiply-adds of a truncation per element, expert and rank: three products with blocks of 1.4 times the rank.
TRUNCATION_PRODUCTS = 4.2
# What a core does while it reads a byte of inputs from memory and subtracts it: 30 GFLOP/s against 4 GB/s.
FLOPS_PER_BYTE = 15


@dataclass(frozen=True)
class Shares:
    """How a budget is split, in bytes.

    Attributes:
        flight: inputs, intermediate results and outputs of what is at work.
        factors: low-rank factors that stay in memory.
        kept: inputs that stay in memory from the first pass to the last.
        piece: what one tensor, or the part of it at work, may take of ``flight``.
    """

    flight: int
    factors: int
    kept: int
    piece: int


def working_bytes(tensor: PlannedTensor, read: int) -> int:
    """What a tensor takes while it is merged whole: ``read`` bytes of inputs, a wide result and its output."""
    wide = max(COMPUTE_BYTES, tensor.spec.dtype.itemsize)
    return read + tensor.spec.numel * (wide + tensor.spec.dtype.itemsize)


def factor_bytes(tensor: PlannedTensor, experts: int) -> int:
    """Bytes of a truncated tensor's factors; 0 for others."""
    if not tensor.truncated:
        return 0
    return experts * tensor.rank * sum(tensor.matrix_shape) * max(COMPUTE_BYTES, tensor.spec.dtype.itemsize)


def passes(tensor: PlannedTensor, config: MergeConfig) -> int:
    """How often a tensor's inputs are used, and read where they are not kept."""
    if tensor.role == "copied":
        return 1
    counted = config.elementwise == "ties" and tensor.role in ("matrix", "vector")
    truncated = tensor.truncated and config.eta != 0
    return 2 + truncated + 2 * counted


def truncation_flops(tensor: PlannedTensor, config: MergeConfig, experts: int) -> float:
    """Of a tensor's truncation; 0 where there is none."""
    if not tensor.truncated or config.eta == 0:
        return 0.0
    return 2 * TRUNCATION_PRODUCTS * tensor.spec.numel * tensor.rank * experts


def cost(tensor: PlannedTensor, config: MergeConfig, read: int, experts: int) -> float:
    """The work on a tensor, in bytes of inputs used once: ``read`` a pass, and the products of its truncation."""
    return passes(tensor, config) * read + truncation_flops(tensor, config, experts) / FLOPS_PER_BYTE


def shares(
    budget: int,
    tensors: Sequence[PlannedTensor],
    read: Callable[[PlannedTensor], int],
    experts: int,
    threads: int,
) -> Shares:
    """The split of a budget.

    Half at most is for what is in flight. Low-rank factors come next, since those beyond their share are written and
    read again; what is left keeps inputs, which would only be read again.

    Args:
        budget: bytes.
        tensors: what this process works on.
        read: bytes of a tensor's inputs.
        experts: N.
        threads: at work at once.
    """
    largest = max((working_bytes(tensor, read(tensor)) for tensor in tensors), default=0)
    flight = min(budget // 2, AHEAD * threads * largest)
    factors = min(budget - flight, sum(factor_bytes(tensor, experts) for tensor in tensors))
    return Shares(flight, factors, budget - flight - factors, max(1, flight // (AHEAD * threads)))


def kept(room: int, tensors: Sequence[PlannedTensor], read: Callable[[PlannedTensor], int]) -> set[str]:
    """Tensors whose inputs stay in ``room`` bytes from the first pass to the last: the largest that fit, by name then.

    Only what is read more than once: statistics, extras and copies pass once or are small.
    """
    names = set()
    for tensor in sorted(tensors, key=lambda tensor: (-read(tensor), tensor.name)):
        if tensor.role in ("matrix", "vector") and read(tensor) <= room:
            names.add(tensor.name)
            room -= read(tensor)
    return names


def can_be_cut(tensor: PlannedTensor, config: MergeConfig) -> bool:
    """Whether every step can take a tensor in parts: truncations and maps of spectra need all of it."""
    if tensor.role != "matrix" or config.elementwise != "none":
        return True
    return config.core_spectrum == "keep" and config.scale != "column" and (not tensor.truncated or config.eta == 0)
