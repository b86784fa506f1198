"""How far the training is: bars with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console

from r2m.progress import bars

_LINES_EACH = 4  # plain lines for each model: at 25, 50, 75 and 100 %


class Work(NamedTuple):
    """One model's training: its number of steps, and a step's wall time relative to the others'."""

    steps: int
    weight: float = 1.0


@contextmanager
def training_progress(work: Mapping[str, Work], console: Console) -> Iterator[Callable[[str, float], None]]:
    """Show how far several models are that train side by side.

    Args:
        work: model name → its steps, in the order to show.
        console: bars if it is a terminal, lines if not.

    Yields:
        What is called with a model's name and its loss after each step, from any thread.
    """
    done = dict.fromkeys(work, 0)
    whole = sum(part.steps * part.weight for part in work.values())
    lock, started = threading.Lock(), time.perf_counter()
    with bars(console) as shown:
        if shown is not None:  # all of them, in this order
            for name, part in work.items():
                shown.show(name, 0, part.steps)

        def report(name: str, loss: float) -> None:
            with lock:
                done[name] += 1
                steps = work[name].steps
                share = sum(done[other] * part.weight for other, part in work.items())
                if shown is not None:
                    shown.show(name, done[name], steps, f"loss {loss:.3f}")
                    shown.show("all training", share, whole)
                elif done[name] * _LINES_EACH // steps > (done[name] - 1) * _LINES_EACH // steps:
                    left = (time.perf_counter() - started) * (whole / share - 1)
                    line = f"{name}: step {done[name]} of {steps}, loss {loss:.3f}"
                    line += f"; all training: about {left:.0f} s left"
                    console.print(line, highlight=False, markup=False, soft_wrap=True)

        yield report
