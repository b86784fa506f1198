"""Who works on an output: one process at a time, in ``OUT.partial``, where a former content waits to be replaced."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from pathlib import Path

import psutil

from r2m.places import UNKNOWN_THERE, FileSystemWarning, exclude_others, is_at, naming, sync
from r2m_kernels.descriptors import flags, read_at, write_at
from r2m_kernels.errors import BadFile

PARTIAL_SUFFIX = ".partial"
LOCK, OUTPUT, FORMER = "lock", "output", "former"
_PATIENCE = 5.0  # seconds: between two renames of another process OUT is not there


def resolved(out: str | Path) -> Path:
    """The one path that is checked, written and renamed to: links above the last component resolved.

    Checking one spelling and renaming another is how directories get lost: ``missing/../x`` does not exist while
    ``x`` does, and ``link/../x`` is not the ``x`` beside the link.
    """
    parent, name = os.path.split(os.fspath(out).rstrip("/") or os.fspath(out)[:1])
    if not parent and not name:
        raise BadFile("out: expected a directory to create, got an empty path")
    path = Path(os.path.realpath(out)) if name in ("", ".", "..") else Path(os.path.realpath(parent)) / name
    if not path.name:
        raise BadFile(f"out ({out}): expected a directory to create, got the root of all")
    return path


def directory_of(target: Path) -> Path:
    """Where work on an output is done."""
    return target.with_name(f"{target.name}{PARTIAL_SUFFIX}")


def take(out: str | Path, directory: Path) -> int:
    """A descriptor that keeps others out while it is open; the directory is made if it is not there.

    Raises:
        BadFile: another process has it, or it is no directory.
        OSError: it cannot be written; ``filename`` is set.
    """
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise BadFile(f"out ({out}): {directory.name} beside it is not a directory, and the merge works there")
    path = directory / LOCK
    while True:
        directory.mkdir(exist_ok=True)
        try:
            lock = os.open(path, flags("O_RDWR", "O_CREAT", "O_NOFOLLOW"), 0o666)
        except FileNotFoundError:  # who had it is just removing the directory
            continue
        except OSError:
            with contextlib.suppress(OSError):
                directory.rmdir()
            raise
        try:
            _exclude_others(out, path, lock)
            # Who had it may have removed the file between our opening and our locking it.
            if is_at(path, lock):
                with naming(path):
                    os.ftruncate(lock, 0)
                    write_at(lock, str(os.getpid()).encode(), 0)
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def holds(directory: Path, lock: int) -> bool:
    """Whether a workplace is still the one that was taken: it may have been removed and made anew meanwhile."""
    return is_at(directory / LOCK, lock) and _holder(lock) == str(os.getpid())


def put_back(out: str | Path, target: Path) -> None:
    """What was moved aside by a process that ended between its two renames is in its place again.

    Raises:
        BadFile: something else lies there now.
        OSError: it cannot be moved.
    """
    directory = directory_of(target)
    former = directory / FORMER
    if not former.is_dir() or former.is_symlink():
        return
    if not os.path.lexists(target):
        os.rename(former, target)
        with contextlib.suppress(OSError):
            sync(target.parent)
    elif (directory / OUTPUT).exists():
        raise BadFile(
            f"out ({out}): {directory.name}/{FORMER} is its former content, and something else lies in its place; "
            "move one of the two away first"
        )


def settle(path: Path) -> None:
    """Before a path is read: where it leads into an output that a killed process has moved aside, put that back.

    Raises:
        BadFile: another process is at it, and does not end.
        OSError: it cannot be moved.
    """
    out = next((one for one in (path, path.parent) if _is_aside(one)), None)
    if out is None:
        return
    target, deadline = resolved(out), time.monotonic() + _PATIENCE
    while _is_aside(target):
        try:
            lock = take(out, directory_of(target))
        except BadFile:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
            continue
        try:
            put_back(out, target)
        finally:
            os.close(lock)


def _is_aside(out: Path) -> bool:
    return out.name not in ("", "..") and not os.path.lexists(out) and (directory_of(out) / FORMER).is_dir()


def _exclude_others(out: str | Path, path: Path, lock: int) -> None:
    try:
        exclude_others(lock)
    except BlockingIOError:
        raise BadFile(f"out ({out}): another merge is writing it, process {_holder(lock) or 'unknown'}") from None
    except OSError as error:
        if error.errno not in UNKNOWN_THERE:
            raise OSError(error.errno, error.strerror, str(path)) from error
        holder = _holder(lock)
        if holder.isdigit() and int(holder) != os.getpid() and psutil.pid_exists(int(holder)):
            raise BadFile(f"out ({out}): another merge is writing it, process {holder}") from None
        text = f"{path}: there are no locks here; no other merge may write to {out} now"
        warnings.warn(text, FileSystemWarning, stacklevel=4)


def _holder(lock: int) -> str:
    """The number of the process that took a lock last."""
    number = bytearray(20)
    return number[: read_at(lock, memoryview(number), 0)].decode(errors="replace")
