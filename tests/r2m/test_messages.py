"""Whoever cannot be told: the work is done all the same, and ends with the code that it has."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file

if TYPE_CHECKING:
    from conftest import Checkpoints, Result

Command = Callable[..., "Result"]
# A program's arguments, its standard streams as a service leaves them.
STREAMS = {
    "closed": "[os.close(n) for n in (0, 1, 2)]",
    "full": "f = os.open('/dev/full', os.O_WRONLY); os.dup2(f, 1); os.dup2(f, 2)",
    "dead": "r, w = os.pipe(); os.close(r); os.dup2(w, 1); os.dup2(w, 2)",
}


def with_streams(how: str, *arguments: str) -> int:
    start = f"import os, sys; {STREAMS[how]}; os.execv(sys.executable, [sys.executable, '-m', 'r2m', *sys.argv[1:]])"
    return subprocess.run([sys.executable, "-c", start, *arguments], timeout=240, check=False).returncode


@pytest.mark.parametrize("how", [pytest.param(how, marks=[] if how == "full" else pytest.mark.slow) for how in STREAMS])
def test_a_merge_that_can_tell_nobody_ends_with_its_output(how: str, checkpoints: Checkpoints) -> None:
    assert with_streams(how, "merge", *checkpoints.arguments, "--out", "merged") == 0
    assert load_file("merged/model.safetensors").keys() == checkpoints.base.keys()
    # Nothing was printed into a file that had the number of a stream.
    assert Path("merged/r2m_report.json").read_text().startswith("{")


def test_output_that_is_asked_for_and_cannot_be_written_is_an_error() -> None:
    assert with_streams("full", "schema") == 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told(
    number: int, checkpoints: Checkpoints, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    result = command("merge", *checkpoints.arguments, "--out", "merged")
    assert result.code == 0
    assert "Warning: " in result.err
    assert "merged.partial/lock: there are no locks here; no other merge may write to merged now" in result.err
    assert sorted(os.listdir()) == sorted({*os.listdir(), "merged"} - {"merged.partial"})


def test_a_lock_that_fails_otherwise_is_an_error_that_names_it(
    checkpoints: Checkpoints, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    before = len(os.listdir("/proc/self/fd"))
    result = command("merge", *checkpoints.arguments, "--out", "merged")
    assert result.code == 1
    assert "input/output error" in result.err
    assert "lock" in result.err
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_system_that_cannot_sync_directories_is_told(
    checkpoints: Checkpoints, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    result = command("merge", *checkpoints.arguments, "--out", "merged")
    assert result.code == 0
    assert "its file system cannot sync directories" in result.err
    assert Path("merged/model.safetensors").is_file()
