"""What a merge says while it works: lines into a log, bars on a terminal."""

from __future__ import annotations

import io
import sys

import pytest
from r2m.progress import reporting

from r2m_kernels import ProgressEvent, ProgressLines
from r2m_kernels.progress import readable_bytes


def test_lines_come_at_the_ends_of_a_step_and_now_and_then() -> None:
    now = 0.0
    lines: list[str] = []
    show = ProgressLines(lines.append, lambda: now)
    for second in range(13):
        now = float(second)
        show(ProgressEvent("truncation", second + 1, 13, 10**6 * (second + 1), 13 * 10**6))
    show(ProgressEvent("combination", 1, 1, 0, 0))
    assert lines == [
        "truncating residuals: 13 tensors, 13 MB",
        "truncating residuals: 6 of 13 tensors, 6 MB, about 6 s left",
        "truncating residuals: 11 of 13 tensors, 11 MB, about 2 s left",
        "truncating residuals: done in 12.0 s",
        "adding up: 1 tensors, 0 B",
        "adding up: done in 0.0 s",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_tensors_bytes_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with reporting() as show:
        assert show is not None
        show(ProgressEvent("task Gram", 3, 4, 3 * 10**6, 4 * 10**6))
        show(ProgressEvent("task Gram", 4, 4, 4 * 10**6, 4 * 10**6))
        show(ProgressEvent("combination", 1, 4, 10**6, 4 * 10**6))
    shown = terminal.getvalue()
    assert "4/4 tensors" in shown
    assert "4 MB of 4 MB" in shown
    assert "adding up" in shown
    assert "1/4 tensors" in shown
    assert "0:00:00" in shown


def test_elsewhere_there_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting() as show:
        assert show is not None
        show(ProgressEvent("task Gram", 1, 2, 5, 10))
    captured = capsys.readouterr()
    assert captured.err == "comparing experts: 2 tensors, 10 B\n"
    assert captured.out == ""


def test_quiet_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting(quiet=True) as show:
        assert show is None
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_600, "1 MB"),
        (5_120_000_000, "5.12 GB"),
        (10**13, "10 TB"),
    ],
)
def test_bytes(count: int, text: str) -> None:
    assert readable_bytes(count) == text
