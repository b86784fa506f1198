"""Scripts that run with what people make their detectors with, in an environment of its own (`make zoo`)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import r2m

import r2m_kernels

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-zoo" / "bin" / "python"


def environment() -> dict[str, str]:
    """Variables of a process there."""
    sources = os.pathsep.join(str(Path(str(module.__file__)).parents[1]) for module in (r2m, r2m_kernels))
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": sources}


def with_libraries(script: str, command: str, directory: Path) -> dict[str, Any]:
    """What a script of tests/r2m prints as JSON on its last line.

    Args:
        script: its file's name.
        command: what it does.
        directory: where.
    """
    assert PYTHON.exists(), "their environment is missing: make zoo"
    arguments = [PYTHON, ROOT / "tests" / "r2m" / script, command, directory]
    run = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment())
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found
