"""Independent jobs side by side, one thread of torch each.

Two small networks train faster next to each other than one after the other on two threads each, and what a
job computes does not depend on how many run at once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Stopped(Exception):
    """Raised inside a job that was told to stop because another failed or the user pressed Ctrl-C."""


class StopSignal:
    """Tells running jobs to end early."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def send(self) -> None:
        """Ask all jobs to stop."""
        self._event.set()

    def check(self) -> None:
        """Call this often inside a job.

        Raises:
            Stopped: ``send`` was called.
        """
        if self._event.is_set():
            raise Stopped


def run_together(
    jobs: Mapping[str, Callable[[], Result]], threads: int, stop: StopSignal | None = None
) -> dict[str, Result]:
    """Run jobs in threads, started in the order given, and return their results under the same names.

    Args:
        jobs: name → function without arguments.
        threads: how many run at once, >= 1.
        stop: sent when a job fails or the user interrupts, so that the others do not run to their end.

    Raises:
        Exception: what the first failing job raised.
    """
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {name: pool.submit(job) for name, job in jobs.items()}
        try:
            finished, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
        except BaseException:
            if stop is not None:
                stop.send()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return {name: future.result() for name, future in futures.items()}


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch use one thread inside the block, and as many as before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
