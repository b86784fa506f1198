"""How a merge tells what it is doing: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from r2m_kernels import ProgressEvent

SECONDS_BETWEEN_LINES = 5.0


@contextlib.contextmanager
def reporting(*, quiet: bool = False) -> Iterator[Callable[[ProgressEvent], None] | None]:
    """A function for the engine's events that shows them on stderr; ``None`` when ``quiet``."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        # Not imported for the lines, so that a log never depends on how rich judges its surroundings.
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:<11}"),
            BarColumn(),
            TextColumn("{task.fields[tensors]} tensors"),
            DownloadColumn(binary_units=False),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Progress(*columns, console=Console(stderr=True)) as bars:
            yield _Bars(bars)
    else:
        yield Lines()


class _Bars:
    """One bar per step."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, event: ProgressEvent) -> None:
        tensors = f"{event.tensors_done}/{event.tensors_total}"
        if event.step not in self._tasks:
            self._tasks[event.step] = self._bars.add_task(event.step, total=event.bytes_total, tensors=tensors)
        self._bars.update(self._tasks[event.step], completed=event.bytes_done, tensors=tensors)


class Lines:
    """A line at the start and the end of each step, and at most one every few seconds in between.

    Args:
        write: takes one line without its end.
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
            self._write(f"{event.step}: {whole}")
        if event.tensors_done == event.tensors_total:
            self._write(f"{event.step}: done in {now - self._started:.1f} s")
        elif now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            left = (now - self._started) * (event.bytes_total / max(event.bytes_done, 1) - 1)
            self._write(
                f"{event.step}: {event.tensors_done} of {event.tensors_total} tensors, "
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
