"""How long work tells how far it is: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from r2m_kernels.progress import Progress, ProgressEvent, ProgressLines
from r2m_kernels.progress import readable_bytes as readable_bytes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Shown
    from rich.progress import TaskID


class Bars:
    """A bar for each name, with a text beside it. Made by :func:`bars`."""

    def __init__(self, shown: Shown) -> None:
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
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Shown

    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description:<20}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %  {task.fields[text]}", markup=False),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Shown(*columns, console=console) as shown:
        yield Bars(shown)


@contextlib.contextmanager
def reporting(*, quiet: bool = False) -> Iterator[Progress | None]:
    """A function for a merge's events that shows them on stderr; ``None`` when ``quiet``."""
    if quiet:
        yield None
        return
    with bars() as shown:
        yield ProgressLines() if shown is None else functools.partial(_show_event, shown)


def _show_event(shown: Bars, event: ProgressEvent) -> None:
    size = f"{readable_bytes(event.bytes_done)} of {readable_bytes(event.bytes_total)}"
    text = f"{event.tensors_done}/{event.tensors_total} tensors, {size}"
    shown.show(event.title, event.bytes_done, event.bytes_total, text)
