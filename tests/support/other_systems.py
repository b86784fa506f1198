"""What macOS and Windows lack of Linux, taken away from a process that has not imported this project yet.

It shows that nothing of that is asked for, not that a merge works there: no file system but Linux's is behind it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from typing import Any

# Imported beforehand, as the standard library has ways of its own on each system.
SETTLED = (shutil, tempfile)
OURS, ALLOWED = ("/r2m/", "/r2m_kernels/"), ("/psutil/",)
CALLS = {
    "macos": ["posix_fallocate", "posix_fadvise", "sched_getaffinity"],
    "windows": [
        *("posix_fallocate", "posix_fadvise", "sched_getaffinity", "pread", "preadv", "pwrite", "pwritev"),
        *("geteuid", "getuid", "getegid", "getgid", "fork", "mkfifo", "fchmod", "fchown", "statvfs", "chown"),
        *("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY", "O_TMPFILE", "O_DIRECT", "O_SYNC"),
    ],
}
MODULES = {"macos": ["triton"], "windows": ["triton", "fcntl", "resource", "pwd", "grp", "termios", "tty"]}


def become(system: str) -> None:
    """Make this process's Python lack what that of ``system`` lacks."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("r2m", "r2m_kernels", *MODULES[system])]:
        del sys.modules[name]
    sys.modules.update(dict.fromkeys(MODULES[system]))
    for name in CALLS[system]:
        if hasattr(os, name):
            delattr(os, name)
    sys.addaudithook(_no_kernel_files)
    library = ctypes.CDLL

    def loaded(name: Any, *others: Any, **named: Any) -> Any:
        if name is None:
            if system == "windows":
                raise TypeError("expected a library's name, got None")
            return object()  # another C library
        return library(name, *others, **named)

    ctypes.CDLL = loaded  # type: ignore[misc, assignment]
    if system == "windows":
        _files_as_windows_has_them()


def _files_as_windows_has_them() -> None:
    """No descriptors of directories, no open file removed or renamed."""
    from r2m_kernels import descriptors

    descriptors.REMOVES_OPEN_FILES = False
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    opened, unlinked, renamed = os.open, os.unlink, os.rename

    def open_(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if dir_fd is not None:
            raise NotImplementedError("dir_fd unavailable on this platform")
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return opened(path, flags, mode)

    def held(path: Any) -> bool:
        inside = os.path.realpath(path) + os.sep
        links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
        return any((os.path.realpath(one) + os.sep).startswith(inside) for one in links if os.path.lexists(one))

    def refused(path: Any) -> None:
        if not os.path.islink(path) and held(path):
            raise PermissionError(13, "The process cannot access the file because it is being used", os.fspath(path))

    def unlink(path: Any, **named: Any) -> None:
        refused(path)
        unlinked(path, **named)

    def rename(source: Any, target: Any, **named: Any) -> None:
        refused(source)
        if os.path.lexists(target):
            raise FileExistsError(17, "Cannot create a file when that file already exists", os.fspath(target))
        renamed(source, target, **named)

    os.open, os.unlink, os.remove, os.rename = open_, unlink, unlink, rename  # type: ignore[assignment]


def _no_kernel_files(event: str, arguments: tuple[Any, ...]) -> None:
    """Linux's ``/proc`` and ``/sys`` are not there for this project; psutil has other ways elsewhere."""
    if event != "open" or not str(arguments[0]).startswith(("/proc/", "/sys/")):
        return
    frame: Any = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if any(part in file for part in ALLOWED):
            return
        if any(part in file for part in OURS) and __file__ not in file:
            raise FileNotFoundError(2, "No such file or directory", str(arguments[0]))
        frame = frame.f_back
