"""Who shares the work of a merge, and what of it is on the disk already: three protocols a run knows.

One process with nothing to remember is :class:`SingleProcess` and :class:`NoJournal`; others are the application's.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Any, Protocol

from .factors import Factors


class ProcessGroup(Protocol):
    """Processes that run the same merge, each on tensors of its own; all call the same methods in the same order.

    Attributes:
        index: this one, from 0.
        size: how many there are.
    """

    @property
    def index(self) -> int:
        """See the class."""
        ...

    @property
    def size(self) -> int:
        """See the class."""
        ...

    def gather(self, values: Mapping[str, Any], error: Exception | None = None) -> dict[str, Any]:
        """What all processes have together, by name.

        Args:
            values: this process's, as plain values or tensors on the CPU.
            error: why this process cannot go on. Then every one raises the error of the first one that has any.
        """
        ...


class Journal(Protocol):
    """What is found is written down, so that a merge that was cut off goes on where it was."""

    def known(self, step: str) -> Mapping[str, Any]:
        """What was written down in a former run: name → a plain JSON value."""
        ...

    def record(self, step: str, name: str, value: Any) -> None:
        """Write one down; from several threads."""
        ...


class KeptFactors(Protocol):
    """Truncations of single experts, of merges before and for merges to come; asked by several threads and processes.

    Each has the factors (1, m, r) and (1, r, n) and the gap (1,) of one task vector. They are given back as they were
    put, strides included: which of two dimensions is contiguous.
    """

    def get(self, tensor: str, expert: str) -> Factors | None:
        """What is kept of an expert's tensor, if the same would be made of it now."""
        ...

    def put(self, tensor: str, expert: str, factors: Factors) -> None:
        """Keep it."""
        ...


class SingleProcess:
    """A group of one."""

    index = 0
    size = 1

    def gather(self, values: Mapping[str, Any], error: Exception | None = None) -> dict[str, Any]:
        """The values as they are; raises ``error``."""
        if error is not None:
            raise error
        return dict(values)


class NoJournal:
    """A journal that keeps nothing."""

    def known(self, step: str) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def record(self, step: str, name: str, value: Any) -> None:
        """Forget it."""


def assign(costs: Mapping[str, float], size: int) -> list[set[str]]:
    """Names for each of ``size`` processes: the costliest first, always to who has least; ties by name, then index."""
    shares: list[set[str]] = [set() for _ in range(size)]
    loads = [(0.0, index) for index in range(size)]
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        load, index = heapq.heappop(loads)
        shares[index].add(name)
        heapq.heappush(loads, (load + costs[name], index))
    return shares
