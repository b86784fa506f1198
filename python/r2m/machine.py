"""What this machine has free, and how fast it is: for the default memory budget and for ``r2m plan``."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import time
from pathlib import Path

import psutil

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_SMALLEST, _BEARS_HOLES = 1 << 16, 1 << 28  # bytes of a buffer, and of a budget of which holes are a small part
_CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes that may be taken without others having to give way: of the machine, or of the container if that has less.

    Memory that holds files' pages counts as free, as the kernel gives it up when asked.
    """
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2 here, or no limit ("max")
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(statistics.get("inactive_file", 0)))
    return max(0, free)


def return_buffers(budget: int) -> None:
    """From here on freed buffers go back to the system at once: of 64 KiB or more, or a 128th of a larger budget.

    Where a merge hardly fits its budget, what an allocator keeps in holes between buffers of several sizes counts: up
    to 100 MiB, and so does what smaller ones leave at the end of its heap. Panels of 400 KiB that were freed in another
    order left 10 to 20 MiB of holes on some runs: much of 64 MiB. But a buffer that is taken anew costs a page fault
    each 4 KiB: a third of the CPU time of a merge of 800 MB under 512 MiB.
    """
    least = max(_SMALLEST, budget // 128) if budget >= _BEARS_HOLES else _SMALLEST
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library, or none that can be asked
        library = ctypes.CDLL(None)
        for parameter, value in ((_M_MMAP_THRESHOLD, least), (_M_TRIM_THRESHOLD, max(least, 1 << 20))):
            library.mallopt(parameter, value)
        library.malloc_trim(0)


def free_disk(directory: Path) -> int:
    """Bytes that this user may write to the file system of ``directory``."""
    return shutil.disk_usage(directory).free


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def threads() -> int:
    """CPU threads that a merge uses: torch's count."""
    import torch

    return torch.get_num_threads()


def cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def age() -> float:
    """Seconds since this process was started."""
    return time.time() - float(psutil.Process().create_time())
