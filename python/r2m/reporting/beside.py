"""Evaluations that lie beside a merge and have it among their models."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

from r2m.records import EVALUATION, read_evaluation
from r2m_kernels.errors import InvalidInput

_LOOKED_AT = 1000  # entries of the directory that a merge lies in


def evaluations_beside(out: str | Path) -> list[str]:
    """Directories of ``r2m evaluate`` in the directory of a merge's output that have it among their models, sorted.

    What cannot be read is none.
    """
    target = os.path.realpath(out)
    parent = Path(os.path.dirname(os.path.abspath(out)))
    shown = Path(os.path.dirname(os.fspath(out).rstrip("/")))  # as the merge was named
    try:
        names = sorted(entry.name for entry in islice(os.scandir(parent), _LOOKED_AT) if entry.is_dir())
    except OSError:
        return []
    return [
        str(shown / name)
        for name in names
        if (parent / name / EVALUATION.file).is_file() and _has(parent / name, target)
    ]


def _has(directory: Path, target: str) -> bool:
    try:
        models = read_evaluation(directory)["models"].values()
    except (InvalidInput, OSError):
        return False
    return any(target in (path := os.path.realpath(one["source"]), os.path.dirname(path)) for one in models)
