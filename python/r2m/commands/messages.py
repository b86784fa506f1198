"""What the command says, which is never a reason for its work to end: a terminal may be gone, a log's disk full."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

import click

from r2m.places import FileSystemWarning
from r2m_kernels.errors import printable, shown


class _Unfailing(io.RawIOBase):
    """A descriptor that takes everything, and loses what cannot be written."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            return os.write(self._descriptor, data)
        return len(data)


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Within the block messages cannot fail, and Python's warnings are told like ours.

    A standard descriptor that is closed is opened on nothing first: the next file would get its number, and what a
    library prints there would be written into a checkpoint.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    out, err = sys.stdout or open(1, "w", closefd=False), sys.stderr  # noqa: SIM115, the descriptor stays
    if err is None or _number(err) == 2:
        unfailing = io.BufferedWriter(_Unfailing(2))
        err = io.TextIOWrapper(unfailing, encoding="utf-8", line_buffering=True, write_through=True)
    for stream in (out, err):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "‖" shows "?", where a merge would end
    told: set[str] = set()  # a file may be asked several times

    def tell(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in told:
            told.add(str(message))
            say(f"Warning: {printable(str(message))}", err=True)

    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("always", FileSystemWarning)
        warnings.showwarning = tell
        yield


def say(text: str, *, err: bool = False) -> None:
    """Lines for people. Whatever a file or path put into them, nothing moves the cursor or turns the text."""
    click.echo(shown(text), err=err)


def done(text: str) -> None:
    """Say what was done, on stdout; if nobody can be told, it is done all the same."""
    try:
        say(text)
    except OSError:
        # What is left in the buffer would fail again when Python ends.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _number(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):  # of who captures it
        return None
