"""Files by their descriptors, on systems that lack some of Linux's calls."""

from __future__ import annotations

import ctypes
import functools
import operator
import os
import sys
import threading
from collections.abc import Callable

OPENS_DIRECTORIES = hasattr(os, "O_DIRECTORY")  # and so brings what is new in them to the disk; Windows does not
REMOVES_OPEN_FILES = os.name != "nt"
# Windows reads and writes where a descriptor stands, which all threads share.
_moving = threading.Lock()
_SYNC_FILE_RANGE_WRITE = 2  # of Linux's fcntl.h
_LARGE = 2**20  # bytes of a write that the disk is told of at once


def flags(*names: str) -> int:
    """Flags of :func:`os.open` by their names, none for those that the system lacks.

    Bytes are always what was written, which Windows has to be told, and no child inherits the descriptor.
    """
    found = (getattr(os, name, 0) for name in (*names, "O_CLOEXEC", "O_BINARY"))
    return functools.reduce(operator.or_, found)


def read_at(descriptor: int, view: memoryview, offset: int) -> int:
    """Bytes read from a place in a file into ``view``: perhaps fewer than it holds, 0 at the file's end."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], offset)
    with _moving:
        os.lseek(descriptor, offset, os.SEEK_SET)
        content = os.read(descriptor, len(view))
    view[: len(content)] = content
    return len(content)


def write_at(descriptor: int, view: memoryview | bytes, offset: int) -> int:
    """Bytes of ``view`` written to a place in a file: perhaps fewer than it holds."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, view, offset)
    with _moving:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, view)


def begin_writing(descriptor: int, offset: int, count: int) -> None:
    """Let the disk begin with bytes that were written, while others are worked out; a small write waits.

    It promises nothing, and its failure means nothing: whoever wants them on the disk calls :func:`os.fsync`.
    """
    if count >= _LARGE and (begin := _sync_file_range()) is not None:
        begin(descriptor, offset, count, _SYNC_FILE_RANGE_WRITE)


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Linux's call; ``None`` elsewhere."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


def reserve(descriptor: int, size: int) -> None:
    """Give a file ``size`` bytes: where the system reserves them, a full disk is found before the work."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)
