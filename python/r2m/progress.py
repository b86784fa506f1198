"""How long work tells how far it is: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from r2m_kernels import ProgressEvent

SECONDS_BETWEEN_LINES = 5.0


class Bars:
    """A bar for each name, with a text beside it. Made by :func:`bars`."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self._tasks: dict[str, TaskID] = {}

    def show(self, name: str, done: float, total: float, text: str = "") -> None:
        """How far one is, in any unit; the first time, it gets its bar below the others."""
        if name not in self._tasks:
            self._tasks[name] = self._shown.add_task(name, total=total, text="")
        self._shown.update(self._tasks[name], completed=done, text=text)


@contextlib.contextmanager
def bars(console: Console | None = None) -> Iterator[Bars | None]:
    """Bars while the block runs; ``None`` where the console, by default stderr, is no terminal."""
    if console is None and not sys.stderr.isatty():
        # rich is not imported for the lines, so that a log never depends on how it judges its surroundings.
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description:<12}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %  {task.fields[text]}", markup=False),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as shown:
        yield Bars(shown)


@contextlib.contextmanager
def reporting(*, quiet: bool = False) -> Iterator[Callable[[ProgressEvent], None] | None]:
    """A function for a merge's events that shows them on stderr; ``None`` when ``quiet``."""
    if quiet:
        yield None
        return
    with bars() as shown:
        yield Lines() if shown is None else functools.partial(_show_event, shown)


def _show_event(shown: Bars, event: ProgressEvent) -> None:
    size = f"{readable_bytes(event.bytes_done)} of {readable_bytes(event.bytes_total)}"
    text = f"{event.tensors_done}/{event.tensors_total} tensors, {size}"
    shown.show(event.step, event.bytes_done, event.bytes_total, text)


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
