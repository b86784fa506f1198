"""TIES and DARE: elements of the task vectors dropped before they are added (README §8). Streamed in blocks.

No task vector is stored here either. The threshold of TIES is one number per expert over all tensors: the exact order
statistic of |τ| as float32, from counts of the upper and then the lower half of its bits.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._interface import Operators
from ._stream.blocks import BLOCK_ELEMENTS
from ._stream.loader import Group
from ._stream.plan import Plan
from ._stream.processes import ProcessGroup
from ._stream.run import Run
from ._stream.schedule import Pass, Step
from ._stream.tensors import tensor_key
from .config import MergeConfig
from .progress import Progress

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
        self._start()
        self._upper: Tensor | None = None
        self._below = [0] * experts

    def count(self, operators: Operators, group: Group) -> None:
        """Count a group's elements; from any thread, since sums of integers have no order."""
        counts = getattr(self._of_thread, "counts", None)
        if counts is None:
            counts = self._of_thread.counts = torch.zeros_like(self._counts, device=group.bases[0].device)
            self._counted.append(counts)
        operators.count_magnitudes(group.bases, group.experts, self._upper, counts)

    def gather(self, processes: ProcessGroup) -> None:
        """Add up what all threads and processes counted."""
        for counted in self._counted:
            self._counts += counted.cpu()
        self._start()
        counts = processes.gather({str(processes.index): self._counts})
        self._counts = torch.stack([counts[str(index)] for index in range(processes.size)]).sum(dim=0)

    def narrow(self) -> None:
        """After the first pass: only elements with the upper half of the threshold's bits matter now."""
        found = [_nth(counts, self._order) for counts in self._counts]
        self._upper, self._below = torch.tensor([upper for upper, _ in found]), [below for _, below in found]
        self._counts = torch.zeros_like(self._counts)

    def thresholds(self) -> Tensor:
        """After the second pass: (N,) float32, the smallest magnitude that is kept."""
        assert self._upper is not None
        pairs = zip(self._upper.tolist(), self._counts, self._below, strict=True)
        bits = [(upper << 16) + _nth(counts, self._order - below)[0] for upper, counts, below in pairs]
        return torch.tensor(bits, dtype=torch.int32).view(torch.float32)

    def _start(self) -> None:
        self._of_thread, self._counted = threading.local(), list[Tensor]()


def _nth(counts: Tensor, order: int) -> tuple[int, int]:
    """The bucket that holds element ``order`` (from 1), and how many lie in buckets below it."""
    running = counts.cumsum(0)
    bucket = int(torch.searchsorted(running, order))
    return bucket, int(running[bucket] - counts[bucket])


class CountStep(Step):
    """Counts the elements of every tensor by their magnitude."""

    journaled = False

    def __init__(self, over: Pass, run: Run, magnitudes: Magnitudes) -> None:
        super().__init__(over)
        self._operators, self._magnitudes = run.backend.operators, magnitudes

    def work(self, group: Group) -> None:
        """Nothing is found for a tensor by itself."""
        self._magnitudes.count(self._operators, group)


def count_passes(plan: Plan, config: MergeConfig) -> list[Pass]:
    """The two that TIES needs for its thresholds."""
    if config.elementwise != "ties":
        return []
    tensors = plan.of("matrix", "vector")
    return [Pass(name, tensors, lambda tensor: BLOCK_ELEMENTS) for name in ("magnitudes", "thresholds")]


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
    run.each(CountStep(upper, run, magnitudes), progress)
    magnitudes.gather(processes)
    magnitudes.narrow()
    run.each(CountStep(lower, run, magnitudes), progress)
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
    operators: Operators, group: Group, outs: Sequence[Tensor], weights: Tensor, scale: float, rule: Rule
) -> Tensor:
    """θ₀ + scale · the mean of what is left of the task vectors, into ``outs``.

    Args:
        group: tensors of one shape, or a part of one.
        outs: where to write.
        weights: (N,) w, summing to 1.
        scale: λ.
        rule: what is left; random masks depend on (seed, name, shape), the expert's place and the element's.

    Returns:
        (L,) largest magnitudes.
    """
    if rule.thresholds is not None:
        return operators.combine_ties(group.bases, group.experts, weights, scale, rule.thresholds, outs)
    names = [[f"{tensor.name}\0{j}" for j in range(len(group.experts))] for tensor in group.tensors]
    shape = group.tensors[0].spec.shape or (1,)
    keys = torch.tensor([[tensor_key(rule.seed, name, shape) for name in of_tensor] for of_tensor in names])
    first = 0 if group.part is None else group.part.start
    return operators.combine_dare(group.bases, group.experts, weights, scale, rule.density, keys, first, outs)
