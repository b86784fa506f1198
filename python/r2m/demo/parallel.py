"""Independent jobs side by side, one thread of torch each.

Two small networks train faster next to each other than one after the other on two threads each, and what a
job computes does not depend on how many run at once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch

Result = TypeVar("Result")


def run_together(
    jobs: Mapping[str, Callable[[], Result]], threads: int, stop: threading.Event | None = None
) -> dict[str, Result]:
    """Run jobs in threads, started in the order given, and return their results under the same names.

    Args:
        jobs: name → function without arguments.
        threads: how many run at once, >= 1.
        stop: set when a job fails or the user interrupts; jobs look at it now and then, and end early.

    Raises:
        Exception: what the first failing job raised.
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
