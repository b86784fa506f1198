"""What the parts of ``bench.gpu`` share: the time left, the machine, JSON files, kernels caught and timed.

Nothing here runs by itself; ``python -m bench.gpu`` does. Times are taken on a GPU only: in a rehearsal through
Triton's interpreter everything is called and checked, and every time is null.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import torch
import triton

from bench.cost_model import CHIPS, Chip
from bench.machine import machine, output, write_json
from r2m_kernels._triton import launch

# Written over between repeats: beyond the L2 cache of every GPU of today (and MI300's 256 MiB behind it).
FLUSH_BYTES = 2**29
# Clock cycles the GPU idles before a timed region, about 3 ms: so that the host has queued all of it by then.
HEAD_START = 5_000_000
# Names of GPUs with the memory that the cost model's datasheet rates are for; others of the name are slower.
CHIP_NAMES = {
    "A100": r"\bA100-SXM4-80GB",
    "H100": r"\bH100 80GB HBM3",
    "H200": r"\bH200\b",
    "B200": r"\bB200\b",
    "MI300X": r"\bMI300X\b",
    "RTX 4090": r"\bGeForce RTX 4090(?! )",  # "4090 D" and "4090 Laptop GPU" are others
}


@dataclasses.dataclass(frozen=True)
class Session:
    """One part's run: where, until when, and whether it is only a rehearsal on tiny cases."""

    out: Path
    deadline: float  # of time.monotonic()
    rehearsal: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.rehearsal else torch.device("cuda", torch.cuda.current_device())

    @property
    def target(self) -> str:
        return launch.target_of(self.device)

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def synchronize(self) -> None:
        if not self.rehearsal:
            torch.cuda.synchronize()

    def free_cache(self) -> None:
        """Give memory of tensors that are no more back to the GPU."""
        if not self.rehearsal:
            torch.cuda.empty_cache()


class Record:
    """The JSON file of one part, replaced whole at every change: cut off anywhere, it holds what was done."""

    def __init__(self, session: Session, part: str) -> None:
        self.path = session.out / f"gpu_{part}.json"
        self._session, self._start = session, time.monotonic()
        self._passed, self._left_out = True, list[str]()
        self.content: dict[str, Any] = {
            "part": part,
            "finished": False,
            "passed": False,
            "seconds": 0.0,
            "rehearsal": session.rehearsal,
            "machine": _machine(session),
            "rows": [],
        }
        self.save()

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.content["rows"]
        return rows

    def save(self) -> None:
        self.content["seconds"] = round(time.monotonic() - self._start, 2)
        write_json(self.path, self.content)

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        self.save()

    def time_for(self, what: str, seconds: float) -> bool:
        """Whether so much time is left; if not, noted as left out."""
        if self._session.left() < seconds:
            self._left_out.append(what)
        return self._session.left() >= seconds

    def attempt(self, call: Callable[[], dict[str, Any]], **what: Any) -> dict[str, Any]:
        """A row of what is measured; where that raises, of the error: the other rows are wanted all the same."""
        try:
            row = {**what, **call()}
        except Exception as failure:
            row = {**what, "passed": False, "error": "".join(traceback.format_exception(failure)).strip()[-1500:]}
        if not row["passed"]:
            self._passed = False
            print(
                f"FAILED: {' '.join(map(str, what.values()))}: {row.get('error') or row.get('error_over_bound')}",
                flush=True,
            )
        self.add(**row)
        return row

    def close(self, passed: bool = True, finished: bool = True) -> bool:
        """Whether everything was done and is right."""
        if self._left_out:
            self.content["left_out"], finished = self._left_out, False
        passed = passed and self._passed and finished
        self.content.update(finished=finished, passed=passed)
        self.save()
        return passed


def _machine(session: Session) -> dict[str, Any]:
    versions = {
        "gpu": None,
        "triton": triton.__version__,
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "changed_files": output("git", "status", "--porcelain", "r2m_kernels", "bench", "tests/gpu"),
    }
    if not session.rehearsal:
        properties = torch.cuda.get_device_properties(session.device)
        driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        versions |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "target": session.target,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "driver": driver.splitlines()[0] if driver else None,
        }
    return machine() | versions


def chip_of(session: Session) -> Chip | None:
    """The cost model's entry for this GPU; None where it has none."""
    if session.rehearsal:
        return None
    name = torch.cuda.get_device_properties(session.device).name
    return next((CHIPS[chip] for chip, pattern in CHIP_NAMES.items() if re.search(pattern, name)), None)


def predicting_chip(session: Session) -> Chip | None:
    """The same for predictions, which a rehearsal makes for an H200."""
    return CHIPS["H200"] if session.rehearsal else chip_of(session)


@dataclasses.dataclass
class Caught:
    """One launch that has run: it can be run again with the same arguments."""

    kernel: Any
    grid: tuple[int, ...]
    config: launch.Config
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    compiled: Any

    def again(self) -> None:
        launch.start(self.kernel, self.grid, self.config, *self.arguments, **self.constants)

    @property
    def spills(self) -> int:
        """32-bit words of local memory a thread; known once a kernel has run, 0 in the interpreter."""
        return int(getattr(self.compiled, "n_spills", 0) or 0)

    def described(self) -> dict[str, Any]:
        registers = getattr(self.compiled, "n_regs", None)
        name, config = self.kernel.__name__, dataclasses.asdict(self.config)
        return {"kernel": name, **config, "registers": registers, "n_spills": self.spills}


@contextlib.contextmanager
def caught_launches() -> Iterator[list[Caught]]:
    """Kernels launched inside run as always, and are listed."""
    caught: list[Caught] = []

    def start(kernel: Any, grid: tuple[int, ...], config: launch.Config, *arguments: Any, **constants: Any) -> None:
        compiled = kernel[grid](*arguments, **constants, **launch.options(config))
        caught.append(Caught(kernel, grid, config, arguments, constants, compiled))

    with mock.patch.object(launch, "start", start):
        yield caught


class Stopwatch:
    """Times work on the GPU between two events, with a cold L2 cache and a queue that never runs dry.

    ``triton.testing.do_bench`` gives no such head start: of several short launches it would time the host.
    """

    def __init__(self, session: Session) -> None:
        self._on = not session.rehearsal
        if self._on:
            whole = torch.cuda.get_device_properties(session.device).total_memory
            self._flush = torch.empty(min(FLUSH_BYTES, whole // 32), dtype=torch.uint8, device=session.device)

    def milliseconds(self, work: Callable[[], object], repeats: int = 15, warmups: int = 2) -> list[float] | None:
        """Of every repeat, ascending; None in a rehearsal, which calls the work once."""
        if not self._on:
            work()
            return None
        for _ in range(warmups):
            work()
        times = []
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            self._flush.zero_()
            torch.cuda._sleep(HEAD_START)
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return sorted(times)

    def median(self, work: Callable[[], object], repeats: int = 15, warmups: int = 2) -> float | None:
        times = self.milliseconds(work, repeats, warmups)
        return None if times is None else statistics.median(times)


def copy_bandwidth(session: Session, stopwatch: Stopwatch) -> float | None:
    """B/s read and written by a plain copy inside the GPU's memory."""
    size = 2**10 if session.rehearsal else 2**30
    source = torch.ones(size, dtype=torch.uint8, device=session.device)
    into = torch.empty_like(source)
    milliseconds = stopwatch.median(lambda: into.copy_(source))
    return None if milliseconds is None else 2 * size / (milliseconds / 1e3)


def table(head: list[str], rows: list[list[Any]]) -> None:
    """A short table for people; the files hold everything."""

    def text(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [head, *[[text(value) for value in row] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)).rstrip(), flush=True)
