"""Children of tests, forked from a process that has imported torch and r2m: 0.1 CPU seconds each instead of 2.6.

Kills, limits, locks, pipes and exit codes are as real as a new process's. What imports read is settled, though: a test
of imports, of Python's own options or of how much memory a process takes starts a new one.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from unittest import mock

CONTEXT = multiprocessing.get_context("forkserver")


class Child:
    """What ``subprocess.Popen`` offers, of a forked process: pid, pipes, signals, an exit code."""

    def __init__(self, process: BaseProcess, stdout: Connection, stderr: Connection) -> None:
        self._process = process
        self.stdout, self.stderr = (os.fdopen(os.dup(pipe.fileno()), encoding="utf-8") for pipe in (stdout, stderr))
        assert process.pid is not None
        self.pid: int = process.pid

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        self.stdout.close()
        self.stderr.close()

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus a signal's number; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once there is one; :class:`subprocess.TimeoutExpired` after so many seconds."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To a process that still runs."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that it writes until it ends, to stdout and to stderr."""
        with ThreadPoolExecutor(2) as pool:
            texts = [pool.submit(stream.read) for stream in (self.stdout, self.stderr)]
            if not wait([self._process.sentinel], timeout):
                self.kill()
                raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
            out, err = (text.result() for text in texts)
        self.wait()
        self.stdout.close()
        self.stderr.close()
        return out, err


def start(
    arguments: Sequence[str],
    script: str | None = None,
    environment: Mapping[str, str] | None = None,
    limits: Mapping[int, int] | None = None,
) -> Child:
    """``python -m r2m ARGUMENTS…``, or a script with them, in the current directory.

    Args:
        environment: instead of this process's.
        limits: of :mod:`resource`, by their number.
    """
    _start_the_server()
    readers, writers = zip(*(CONTEXT.Pipe(duplex=False) for _ in range(2)), strict=True)
    arguments = (list(arguments), script, dict(os.environ if environment is None else environment), dict(limits or {}))
    process = CONTEXT.Process(target=_run, args=(*arguments, *writers), daemon=True)
    process.start()
    for writer in writers:
        writer.close()
    return Child(process, *readers)


def _start_the_server() -> None:
    """It lives as long as this process, and takes what it may import from the variable alone."""
    CONTEXT.set_forkserver_preload(["preloaded"])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path)):
        forkserver.ensure_running()


def _run(
    arguments: list[str],
    script: str | None,
    environment: dict[str, str],
    limits: dict[int, int],
    stdout: Connection,
    stderr: Connection,
) -> None:
    """In the child."""
    assert "preloaded" in sys.modules, "tests/support/preloaded.py could not be imported"
    for pipe, number in ((stdout, 1), (stderr, 2)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    # Not the server's objects, which remember what the server wrote to.
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    for limit, most in limits.items():
        resource.setrlimit(limit, (most, most))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background are born deaf to it
    sys.argv = ["r2m", *arguments]
    if script is not None:
        exec(compile(script, "<script of a test>", "exec"), {"__name__": "__main__"})
        return
    from r2m.commands.main import main

    sys.exit(main())
