"""How far the training is: bars with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_LINES_EACH = 4  # plain lines for each model: at 25, 50, 75 and 100 %


@dataclass(frozen=True)
class Work:
    """One model's training: its number of steps, and a step's wall time relative to the others'."""

    steps: int
    weight: float = 1.0


class TrainingProgress:
    """Counts steps of several models that train side by side; its methods may be called from any thread."""

    def __init__(self, work: Mapping[str, Work], console: Console, bars: Progress | None) -> None:
        self._work = dict(work)
        self._done = dict.fromkeys(work, 0)
        self._console = console
        self._bars = bars
        self._lock = threading.Lock()
        self._started = time.perf_counter()
        self._whole = sum(part.steps * part.weight for part in work.values())
        if bars is not None:
            self._tasks = {name: bars.add_task(name, total=part.steps, loss="") for name, part in work.items()}
            self._total = bars.add_task("all training", total=self._whole, loss="")

    def reporter(self, name: str) -> Callable[[float], None]:
        """The function that a training run of this name calls with its loss after each step."""

        def report(loss: float) -> None:
            with self._lock:
                self._done[name] += 1
                self._show(name, loss)

        return report

    def _show(self, name: str, loss: float) -> None:
        steps, done = self._work[name].steps, self._done[name]
        share = sum(self._done[other] * part.weight for other, part in self._work.items())
        if self._bars is not None:
            self._bars.update(self._tasks[name], completed=done, loss=f"loss {loss:.3f}")
            self._bars.update(self._total, completed=share)
        elif done * _LINES_EACH // steps > (done - 1) * _LINES_EACH // steps:
            left = (time.perf_counter() - self._started) * (self._whole / share - 1)
            self._console.print(
                f"{name}: step {done} of {steps}, loss {loss:.3f}; all training: about {left:.0f} s left",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )


@contextmanager
def training_progress(work: Mapping[str, Work], console: Console) -> Iterator[TrainingProgress]:
    """Show progress while the block runs.

    Args:
        work: model name → its steps, in the order to show.
        console: bars if it is a terminal, lines if not.
    """
    if not console.is_terminal:
        yield TrainingProgress(work, console, None)
        return
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[loss]:<10}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as bars:
        yield TrainingProgress(work, console, bars)
