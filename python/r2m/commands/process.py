"""How a process of the command begins and ends: its memory, and its exit code."""

from __future__ import annotations

import contextlib
import ctypes
import os

from r2m_kernels.errors import R2MError

# What the codes mean with which commands end.
DONE, MACHINE, INPUT, ENDED = 0, 1, 2, 130
EXIT_CODES = {
    DONE: "done",
    MACHINE: "the machine refused: no space, no permission, no such file; or `plan` says that a merge would not fit",
    INPUT: "an input or an option cannot be used; the message says which, where, what was expected and what was there",
    ENDED: "Ctrl-C; what `--resume` goes on with is kept",
}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of malloc.h


def settle_memory() -> None:
    """How this process takes and returns large buffers; torch has to be imported after it.

    A merge goes through many: in huge pages they come with a few hundred page faults instead of a hundred thousand. And
    glibc, once it has seen one, would keep freed buffers of up to 32 MiB for later, a seventh of the peak memory. The
    blocks of a few MiB that a panel takes and frees are not given back in between, which was half of the time of a
    process of one thread; and all threads take them from one place, since an arena for each doubled the memory.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's allocator: madvise(MADV_HUGEPAGE) from 2 MiB on
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library, or none that can be asked
        for parameter, value in ((_M_MMAP_THRESHOLD, 12 << 20), (_M_TRIM_THRESHOLD, 32 << 20), (_M_ARENA_MAX, 1)):
            ctypes.CDLL(None).mallopt(parameter, value)


def exit_code(error: Exception) -> int | None:
    """2: the input or an option cannot be used; 1: the machine refused; None: the error is ours, and shows where."""
    if isinstance(error, R2MError):
        return error.exit_code
    return MACHINE if isinstance(error, OSError) or no_memory(error) else None


def no_memory(error: Exception) -> bool:
    """Whether it is torch's, about a GPU; torch need not have been imported."""
    return type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch")
