"""What a merge takes, from shapes alone: how a memory budget is split, and what each tensor costs (README §10).

A run is arranged by these numbers, and the application predicts a merge with them before any tensor is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..config import MergeConfig
from .plan import PlannedTensor, by_rows
from .tensors import PartialSource, TensorSource

COMPUTE_BYTES = 4  # of an element of intermediate results and factors; 8 where the base is float64
# Tensors begun and not yet finished, per thread: one at work and one that is read or written meanwhile.
AHEAD = 2
# Multiply-adds of a truncation per element, expert and rank: three products with blocks of 1.4 times the rank.
TRUNCATION_PRODUCTS = 4.2
# What a core does while it reads a byte of inputs from memory and subtracts it: 30 GFLOP/s against 4 GB/s.
FLOPS_PER_BYTE = 15
# Bytes of inputs in one group, where no budget says less. What comes from elsewhere waits in pinned memory, which is
# slow to get and to be had twice; what is on the device already can be taken in few launches, each of which costs the
# host more time than a small group costs the GPU.
GROUP_BYTES = 2**28
DEVICE_GROUP_BYTES = 2**31


@dataclass(frozen=True)
class Inputs:
    """The checkpoints of a merge, as their headers tell."""

    base: TensorSource
    named: Mapping[str, TensorSource]  # the experts

    @cached_property
    def experts(self) -> list[TensorSource]:
        """In their order."""
        return list(self.named.values())

    @property
    def sources(self) -> list[TensorSource]:
        """The base, then the experts."""
        return [self.base, *self.experts]

    def read_for(self, tensor: PlannedTensor) -> list[TensorSource]:
        """Who is read for a tensor."""
        sources = [self.base] if tensor.role == "copied" else self.sources
        return [source for source in sources if tensor.name in source.specs]

    def nbytes(self, tensor: PlannedTensor) -> int:
        """Bytes read for a tensor: the base's and every expert's, each in its own dtype."""
        return sum(source.specs[tensor.name].nbytes for source in self.read_for(tensor))

    def working_bytes(self, tensor: PlannedTensor) -> int:
        """What a tensor takes while it is merged whole: its inputs, a wide result and its output."""
        wide = max(COMPUTE_BYTES, tensor.spec.dtype.itemsize)
        return self.nbytes(tensor) + tensor.spec.numel * (wide + tensor.spec.dtype.itemsize)

    def in_parts(self, tensor: PlannedTensor) -> bool:
        """Whether a tensor can be read in parts."""
        return all(isinstance(source, PartialSource) for source in self.read_for(tensor))

    def factor_bytes(self, tensor: PlannedTensor, config: MergeConfig) -> int:
        """Bytes of what is kept of a tensor between steps: low-rank factors, or Gram matrices of its rows."""
        if by_rows(tensor, config):
            count = len(self.experts)
            return count * (count + 1) // 2 * tensor.matrix_shape[0] * torch.float64.itemsize
        if not tensor.truncated:
            return 0
        width = max(COMPUTE_BYTES, tensor.spec.dtype.itemsize)
        return len(self.experts) * tensor.rank * sum(tensor.matrix_shape) * width


@dataclass(frozen=True)
class Memory:
    """How the memory of one process is split, in bytes; ``None``: without bound.

    Attributes:
        flight: inputs, intermediate results and outputs of what is at work.
        piece: what one tensor, or the part of it at work, may take of ``flight``.
        factors: low-rank factors, and Gram matrices of rows, that stay in memory.
        spill: those that do not fit there.
        kept: tensors whose inputs stay in memory from the first pass to the last.
        group: inputs of tensors that are taken together.
    """

    flight: int | None
    piece: int | None
    factors: int | None
    spill: int
    kept: frozenset[str]
    group: int


def split(
    budget: int | None,
    tensors: Sequence[PlannedTensor],
    inputs: Inputs,
    config: MergeConfig,
    *,
    threads: int,
    device: int | None = None,
    brought: Callable[[PlannedTensor], bool] = lambda tensor: True,
) -> Memory:
    """The split of a budget.

    Half at most is for what is in flight. Low-rank factors come next, since those beyond their share are written and
    read again; what is left keeps inputs, which would only be read again. On a GPU what stays there is bounded by its
    own memory: half is for factors, a quarter for inputs, the rest for two groups, results and workspace.

    Args:
        budget: bytes; ``None``: no bound.
        tensors: what this process works on.
        inputs: of all tensors.
        config: whether residuals are truncated at all.
        threads: at work at once.
        device: bytes of a GPU's memory; ``None``: a CPU computes.
        brought: whether a tensor's inputs have to be brought to where they are computed with.
    """
    bounds = ((device, 16), (budget, 8))
    group = min([DEVICE_GROUP_BYTES, *(size // share for size, share in bounds if size is not None)])
    stay = 0 if device is None else device // 4
    if budget is None:
        return Memory(None, None, None, 0, _kept(stay, tensors, inputs, brought), group)
    largest = max(map(inputs.working_bytes, tensors), default=0)
    flight = min(budget // 2, AHEAD * threads * largest)
    needed = sum(inputs.factor_bytes(tensor, config) for tensor in tensors)
    factors = min(budget - flight, needed)
    stay = budget - flight - factors if device is None else stay
    spill = needed - factors if config.eta != 0 else 0
    piece = max(1, flight // (AHEAD * threads))
    return Memory(flight, piece, factors, spill, _kept(stay, tensors, inputs, brought), group)


def _kept(
    room: int, tensors: Sequence[PlannedTensor], inputs: Inputs, brought: Callable[[PlannedTensor], bool]
) -> frozenset[str]:
    """The largest that fit, by name then. Statistics, extras and copies pass once or are small."""
    names = set()
    for tensor in sorted(tensors, key=lambda tensor: (-inputs.nbytes(tensor), tensor.name)):
        if tensor.role in ("matrix", "vector") and inputs.nbytes(tensor) <= room and brought(tensor):
            names.add(tensor.name)
            room -= inputs.nbytes(tensor)
    return frozenset(names)


def truncation_flops(tensor: PlannedTensor, config: MergeConfig, experts: int) -> float:
    """Of a tensor's truncation; 0 where there is none."""
    if not tensor.truncated or config.eta == 0:
        return 0.0
    return 2 * TRUNCATION_PRODUCTS * tensor.spec.numel * tensor.rank * experts


def costs(
    tensors: Sequence[PlannedTensor], passes: Mapping[str, int], inputs: Inputs, config: MergeConfig
) -> dict[str, float]:
    """The work on each tensor, in bytes of inputs used once: its inputs a pass, and the products of its truncation.

    Args:
        passes: how often a tensor's inputs are used.
    """
    return {
        tensor.name: passes[tensor.name] * inputs.nbytes(tensor)
        + truncation_flops(tensor, config, len(inputs.experts)) / FLOPS_PER_BYTE
        for tensor in tensors
    }
