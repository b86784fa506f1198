"""The end of a run: what was predicted beside what was measured, for every kernel and every merge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.gpu.record import table

# File → what a row is called by, and its seconds as they are stored: measured, predicted, and their unit.
SOURCES = {
    "gpu_operators.json": (("operator", "job"), "milliseconds", "predicted_milliseconds", 1.0),
    "gpu_usual.json": (("job",), "seconds", "predicted_seconds", 1e3),
    "gpu_merges.json": (("job",), "seconds", "predicted_seconds", 1e3),
}


def rows(out: Path) -> Iterator[list[Any]]:
    """What, milliseconds predicted and measured, and their ratio."""
    for name, (called, measured, predicted, unit) in SOURCES.items():
        try:
            found = json.loads((out / name).read_text(encoding="utf-8")).get("rows", [])
        except (OSError, ValueError):
            continue
        for row in found:
            pair = [None if row.get(key) is None else row[key] * unit for key in (predicted, measured)]
            ratio = pair[1] / pair[0] if None not in pair else None
            yield [", ".join(str(row[key]) for key in called if key in row), *pair, ratio]


def show(out: Path) -> None:
    """The table; "-" where nothing was measured, or the cost model does not know a job."""
    print("\npredicted (bench.cost_model) beside measured, ms")
    table(["kernel or merge", "predicted", "measured", "measured / predicted"], list(rows(out)))
