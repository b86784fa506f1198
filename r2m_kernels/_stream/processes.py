"""Who shares the work of a merge, and what of it is on the disk already: two protocols the engine knows.

One process with nothing to remember is :class:`SingleProcess` and :class:`NoJournal`; others are the application's.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Any, Protocol


class ProcessGroup(Protocol):
    """Processes that run the same merge, each on tensors of its own; all call the same methods in the same order.

    Attributes:
        member: this one, from 0.
        size: how many there are.
    """

    @property
    def member(self) -> int:
        """See the class."""
        ...

    @property
    def size(self) -> int:
        """See the class."""
        ...

    def gather(self, found: Mapping[str, Any], error: Exception | None = None) -> dict[str, Any]:
        """What all members found together, by name.

        Args:
            found: this member's, as plain values or tensors on the CPU.
            error: why this member cannot go on. Then every member raises the error of the first one that has any.
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


class SingleProcess:
    """A team of one."""

    member = 0
    size = 1

    def gather(self, found: Mapping[str, Any], error: Exception | None = None) -> dict[str, Any]:
        """What was found; raises ``error``."""
        if error is not None:
            raise error
        return dict(found)


class NoJournal:
    """A journal that keeps nothing."""

    def known(self, step: str) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def record(self, step: str, name: str, value: Any) -> None:
        """Forget it."""


def assign(costs: Mapping[str, float], size: int) -> list[set[str]]:
    """Names for each of ``size`` members: the costliest first, always to who has least; ties by name, then member."""
    hands: list[set[str]] = [set() for _ in range(size)]
    loads = [(0.0, member) for member in range(size)]
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        load, member = heapq.heappop(loads)
        hands[member].add(name)
        heapq.heappush(loads, (load + costs[name], member))
    return hands
