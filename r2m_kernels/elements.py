"""TIES and DARE: elements of the task vectors dropped before they are added (README §8). Streamed in blocks.

No task vector is stored here either. The threshold of TIES is one number per expert over all tensors: the exact order
statistic of |τ| as float32, from counts of the upper and then the lower half of its bits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._stream.loader import Group
from ._stream.plan import Plan, PlannedTensor
from ._stream.processes import ProcessGroup
from ._stream.run import Progress, Run
from ._stream.schedule import Pass, Step
from ._stream.tensors import compute_dtype, tensor_key
from .config import MergeConfig

BLOCK = 2**18  # elements of a tensor worked on at once, and masked by one generator
HALF = 2**16


class Magnitudes:
    """Finds the magnitude below which a share of each expert's elements lies, in two passes over all tensors.

    Args:
        elements: of all tensors together.
        density: share of elements to keep, the largest ones.
        experts: N.
    """

    def __init__(self, elements: int, density: float, experts: int) -> None:
        # The rank, from 1, of the smallest element that is kept: as the authors of TIES count it.
        self._order = max(1, elements - int(elements * density))
        self._counts = torch.zeros(experts, HALF, dtype=torch.int64)
        self._lock = threading.Lock()
        self._upper: list[int] | None = None
        self._below = [0] * experts

    def count(self, base: Tensor, experts: Sequence[Tensor]) -> None:
        """Count one tensor's elements; from any thread, since sums of integers have no order."""
        for theta, *thetas in _blocks(base, experts):
            for j, other in enumerate(thetas):
                bits = (other - theta).abs().float().view(torch.int32)
                upper = bits >> 16
                halves = upper if self._upper is None else bits[upper == self._upper[j]] & (HALF - 1)
                counts = torch.bincount(halves, minlength=HALF).cpu()
                with self._lock:
                    self._counts[j] += counts

    def gather(self, processes: ProcessGroup) -> None:
        """Add up what all processes counted."""
        counts = processes.gather({str(processes.index): self._counts})
        self._counts = torch.stack([counts[str(index)] for index in range(processes.size)]).sum(dim=0)

    def narrow(self) -> None:
        """After the first pass: only elements with the upper half of the threshold's bits matter now."""
        self._upper = []
        for j, counts in enumerate(self._counts):
            upper, below = _nth(counts, self._order)
            self._upper.append(upper)
            self._below[j] = below
        self._counts = torch.zeros_like(self._counts)

    def thresholds(self) -> Tensor:
        """After the second pass: (N,) float32, the smallest magnitude that is kept."""
        assert self._upper is not None
        pairs = zip(self._upper, self._counts, self._below, strict=True)
        bits = [(upper << 16) + _nth(counts, self._order - below)[0] for upper, counts, below in pairs]
        return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


def _nth(counts: Tensor, order: int) -> tuple[int, int]:
    """The bucket that holds element ``order`` (from 1), and how many lie in buckets below it."""
    running = counts.cumsum(0)
    bucket = int(torch.searchsorted(running, order))
    return bucket, int(running[bucket] - counts[bucket])


class CountStep(Step):
    """Counts the elements of every tensor by their magnitude."""

    journaled = False

    def __init__(self, over: Pass, magnitudes: Magnitudes) -> None:
        super().__init__(over)
        self._magnitudes = magnitudes

    def work(self, group: Group) -> list[Any]:
        """Nothing is found for a tensor by itself."""
        for index in range(len(group.tensors)):
            self._magnitudes.count(*group.inputs(index))
        return [None] * len(group.tensors)


def count_passes(plan: Plan, config: MergeConfig) -> list[Pass]:
    """The two that TIES needs for its thresholds."""
    if config.elementwise != "ties":
        return []
    tensors = plan.of("matrix", "vector")
    return [Pass(name, tensors, lambda tensor: BLOCK) for name in ("magnitudes", "thresholds")]


def thresholds(run: Run, config: MergeConfig, progress: Progress | None) -> Tensor | None:
    """The smallest magnitude that TIES keeps of each expert: (N,) float32; ``None`` for other methods."""
    passes = count_passes(run.plan, config)
    if not passes:
        return None
    processes = run.processes
    known = run.journal.known("thresholds").get("all")
    # All processes take the same way: one that sees an older journal would wait for others that do not count.
    known = processes.gather({str(processes.index): known})["0"]
    if known is not None:
        return torch.tensor(known, dtype=torch.float32)
    elements = sum(tensor.spec.numel for tensor in passes[0].tensors)
    magnitudes = Magnitudes(elements, config.density, len(run.inputs.experts))
    upper, lower = passes
    run.each(CountStep(upper, magnitudes), progress)
    magnitudes.gather(processes)
    magnitudes.narrow()
    run.each(CountStep(lower, magnitudes), progress)
    magnitudes.gather(processes)
    smallest = magnitudes.thresholds()
    if processes.index == 0:
        run.journal.record("thresholds", "all", smallest.tolist())
    return smallest


@dataclass(frozen=True)
class Rule:
    """Which elements of the task vectors are left.

    Attributes:
        density: the share of them.
        seed: of the random masks of DARE.
        thresholds: (N,) float32, the smallest magnitude that TIES keeps of each expert; ``None``: DARE.
    """

    density: float
    seed: int
    thresholds: Tensor | None

    @classmethod
    def of(cls, config: MergeConfig, thresholds: Tensor | None) -> Rule:
        """As the options say."""
        return cls(config.density, config.seed, thresholds)


def combine(
    tensor: PlannedTensor,
    base: Tensor,
    experts: Sequence[Tensor],
    out: Tensor,
    weights: Tensor,
    scale: float,
    rule: Rule,
    first: int = 0,
) -> None:
    """θ₀ + scale · the mean of what is left of the task vectors, into ``out``.

    Args:
        tensor: random masks depend on (seed, name, shape), the expert's place and the block.
        base, experts: θ₀ and N θ_j of one shape, whole or a run of elements.
        out: where to write.
        weights: (N,) w, summing to 1.
        scale: λ.
        rule: what is left.
        first: place of the first element in the tensor, a multiple of ``BLOCK``.
    """
    written = out.view(-1)
    start = 0
    for theta, *thetas in _blocks(base, experts):
        rows = torch.stack([other - theta for other in thetas])
        weight = weights.to(rows).unsqueeze(1)
        if rule.thresholds is not None:
            rows *= rows.abs().float() >= rule.thresholds.to(rows.device).unsqueeze(1)
            sums = (rows * weight).sum(dim=0)
            agree = rows * sums > 0
            total = (agree * weight).sum(dim=0)
            merged = (rows * weight * agree).sum(dim=0) / torch.where(total > 0, total, 1.0)
        else:
            # A generator a block, so that a tensor can be merged in parts.
            block, shape = (first + start) // BLOCK, tensor.spec.shape or (1,)
            keys = [tensor_key(rule.seed, f"{tensor.name}\0{j}\0{block}", shape) for j in range(len(experts))]
            draws = [torch.rand(len(theta), generator=torch.Generator().manual_seed(key)) for key in keys]
            kept = torch.stack(draws) < rule.density
            merged = (rows * weight * kept.to(rows.device)).sum(dim=0) / rule.density
        written[start : start + len(theta)] = theta + scale * merged
        start += len(theta)


def _blocks(base: Tensor, experts: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Base and experts flat, a block at a time, in float32 (float64 where one of them is)."""
    tensors = [base, *experts]
    dtype = compute_dtype(tensors)
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, base.numel(), BLOCK):
        yield [tensor[start : start + BLOCK].to(dtype) for tensor in flat]
