"""Where a benchmark ran, with which versions of what, and the files that keep its numbers."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from r2m_kernels import __version__
from r2m_kernels.streaming import choose_backend

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def output(*command: str) -> str | None:
    """What a command prints; None where it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, cwd=ROOT)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def machine() -> dict[str, Any]:
    """Everything a reader needs to tell whether two files may be compared."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    backend = choose_backend("auto", torch.device("cpu"))
    commit = output("git", "rev-parse", "HEAD")  # None where there is no git, or no repository
    return {
        "cpu": next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "r2m_kernels": __version__,
        "backend": f"{backend.name}: {backend.reason}",
        "commit": commit and commit + "+changes" * bool(output("git", "status", "--porcelain", "r2m_kernels", "csrc")),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def write_json(path: Path, content: Any) -> None:
    """Numbers as a file, by :func:`write_text`."""
    write_text(path, json.dumps(_plain(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole: cut off anywhere, the former one is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _plain(value: Any) -> Any:
    """JSON has no Inf and NaN: they become text."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
