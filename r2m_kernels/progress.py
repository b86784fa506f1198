"""How a merge tells how far it is: an event after each tensor, and a function that turns events into lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

SECONDS_BETWEEN_LINES = 5.0
# Step of an event → what people are told that it does.
STEPS = {
    "task Gram": "comparing experts",
    "truncation": "truncating residuals",
    "magnitudes": "counting magnitudes",
    "thresholds": "finding thresholds",
    "combination": "adding up",
}


@dataclass(frozen=True)
class ProgressEvent:
    """More tensors done: one, or a group on the Triton backend.

    ``step`` is a key of :data:`STEPS`; counts are of that step, and with several processes of what falls to this one.
    """

    step: str
    tensors_done: int
    tensors_total: int
    bytes_done: int
    bytes_total: int

    @property
    def title(self) -> str:
        """The step in words."""
        return STEPS.get(self.step, self.step)


# What takes events: called in the thread that merges. An exception of it ends the merge.
Progress = Callable[[ProgressEvent], None]


class ProgressLines:
    """A line at the start and the end of each step, and at most one every few seconds in between.

    >>> merged = merge(base, experts, progress=ProgressLines())

    Args:
        write: takes one line without its end; default: to stderr.
        clock: seconds.
    """

    def __init__(
        self,
        write: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write = write
        self._clock = clock
        self._step = ""
        self._started = self._last = 0.0

    def __call__(self, event: ProgressEvent) -> None:
        """Show the event, if it is time."""
        now = self._clock()
        whole = f"{event.tensors_total} tensors, {readable_bytes(event.bytes_total)}"
        if event.step != self._step:
            self._step, self._started, self._last = event.step, now, now
            self._write(f"{event.title}: {whole}")
        if event.tensors_done == event.tensors_total:
            self._write(f"{event.title}: done in {now - self._started:.1f} s")
            self._step = ""  # an analysis is merged again and again, by the same step
        elif now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            left = (now - self._started) * (event.bytes_total / max(event.bytes_done, 1) - 1)
            self._write(
                f"{event.title}: {event.tensors_done} of {event.tensors_total} tensors, "
                f"{readable_bytes(event.bytes_done)}, about {left:.0f} s left"
            )


def readable_bytes(count: int) -> str:
    """``"1.2 MB"``: decimal units, as file managers and the Hub show them."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
