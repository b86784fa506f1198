"""Independent jobs side by side, one thread of torch each, and how far they are.

Two small networks train faster next to each other than one after the other on two threads each, and what a
job computes does not depend on how many run at once.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple, TypeVar

import torch
from rich.console import Console

from r2m.progress import bars

_LINES_EACH = 4  # plain lines for each model: at 25, 50, 75 and 100 %
Result = TypeVar("Result")


def run_together(
    jobs: Mapping[str, Callable[[], Result]], threads: int, stop: threading.Event | None = None
) -> dict[str, Result]:
    """Run jobs in threads, started in the order given, and return their results under the same names.

    What the first failing job raised is raised. ``stop`` is set then, and when the user interrupts: jobs look at it now
    and then, and end early.
    """
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {name: pool.submit(job) for name, job in jobs.items()}
        try:
            for future in as_completed(futures.values()):
                future.result()
        except BaseException:
            if stop is not None:
                stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return {name: future.result() for name, future in futures.items()}


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch, and with it every backend of ours, use ``count`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Work(NamedTuple):
    """One model's training: its number of steps, and a step's wall time relative to the others'."""

    steps: int
    weight: float = 1.0


@contextlib.contextmanager
def training_progress(work: Mapping[str, Work], console: Console) -> Iterator[Callable[[str, float], None]]:
    """Show how far several models are that train side by side: bars with the time left on a terminal, lines elsewhere.

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
                    say(console, f"{line}; all training: about {left:.0f} s left")

        yield report


def say(console: Console, line: str) -> None:
    """Print a line as it is, however wide."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)
