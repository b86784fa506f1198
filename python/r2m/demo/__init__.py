"""The demo: three forgery specialists trained on real faces, merged into one detector, and measured.

``run_demo`` goes from photographs to a table in a few minutes on a CPU. What it prints is what it measured.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from r2m.demo.detectors import SPECIALISTS, train_detectors
from r2m.demo.evaluation import Scores, ensemble, score_group
from r2m.demo.faces import CREDIT, read_photographs, split_people
from r2m.demo.merges import MERGES, merge_specialists
from r2m.demo.networks import Detector, load_detector, save_detector
from r2m.demo.parallel import run_together, say, torch_threads
from r2m.demo.pictures import draw_bars, draw_forgeries, draw_roc
from r2m.demo.samples import GROUPS, Group, make_group
from r2m.demo.table import METHODS, Row, make_notes, make_row, print_table, table_csv, table_json
from r2m.demo.training import FULL, QUICK, Setting
from r2m.extras import need
from r2m.output import check_output
from r2m.places import new_file
from r2m_kernels.errors import BadOption

__all__ = ["DemoResult", "run_demo"]

# Row of the table → checkpoint.
_CHECKPOINTS = {"base": "base.safetensors", "joint training": "joint.safetensors"}
_CHECKPOINTS |= {row: f"specialists/{kind.lower()}.safetensors" for kind, row in SPECIALISTS.items()}


class DemoResult(NamedTuple):
    """What a run produced."""

    out: Path  # the directory that holds everything
    rows: tuple[Row, ...]  # the table, in the order of table.METHODS
    notes: tuple[str, ...]  # the lines below it
    merged: Path  # R²M's merged checkpoint
    seconds: float  # wall time of the whole run


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    threads: int | None = None,
    quick: bool = False,
    setting: Setting | None = None,
    console: Console | None = None,
) -> DemoResult:
    """Train, merge, measure, and write checkpoints, table and pictures.

    Files of a former run in ``out`` are replaced one by one; others stay.

    Args:
        out: directory to write to; made if it is not there.
        seed: of the split, the forgeries, the training and the merge; 0 to 2³¹ − 1. Same seed, same table.
        threads: models that train at once, each on one thread of torch; by default 2, or 1 on a single core.
            It does not change the results.
        quick: less training and fewer pictures.
        setting: how much exactly, for who is content with neither.
        console: where progress and table go; by default stdout.

    Raises:
        BadOption: what the demo needs is not installed, or an argument is out of range.
        BadFile: ``out`` holds other things where merged checkpoints should go.
        OSError: a file cannot be written.
    """
    started = time.perf_counter()
    threads = min(2, os.cpu_count() or 1) if threads is None else threads
    if threads < 1:
        raise BadOption(f"threads must be at least 1, got {threads}")
    if not 0 <= seed < 2**31:
        raise BadOption(f"seed must be in 0 … 2³¹ − 1, got {seed}")
    need("the demo", "demo", "matplotlib", "scipy", "sklearn")  # imported where they are used: better missed now
    # Before minutes of work: can the merges be written at their end?
    for name in MERGES.values():
        check_output(out / "merged" / name, overwrite=True, inputs=[])
    console = console or Console()
    setting = setting or (QUICK if quick else FULL)

    photographs = read_photographs()
    split = split_people(seed)
    with torch_threads(1):
        say(console, f"training a base, three specialists and a joint model; photographs: {CREDIT}")
        trained = train_detectors(photographs, split, setting, seed, threads, console)
        paths = {row: out / file for row, file in _CHECKPOINTS.items()}
        for row, path in paths.items():
            save_detector(trained[row], path)

        say(console, "merging the specialists")
        validation = make_group(
            photographs, split.validation, "in-distribution", setting.validation_draws, seed, "validation"
        )
        specialists = {kind: paths[row] for kind, row in SPECIALISTS.items()}
        merged, choices = merge_specialists(out / "merged", paths["base"], specialists, validation, seed)

        say(console, f"testing on {len(split.test)} people")
        groups = {name: make_group(photographs, split.test, name, setting.test_draws, seed, "test") for name in GROUPS}
        # What is on the disk is what is judged.
        detectors = {row: load_detector(path) for row, path in paths.items()} | merged
        scores = _score(detectors, groups, threads)

    rows = tuple(make_row(method, scores[method]) for method in METHODS)
    notes = make_notes(split, setting, choices, seed, quick)
    (out / "pictures").mkdir(exist_ok=True)
    new_file(out / "table.json", table_json(rows, notes, seed))
    new_file(out / "table.csv", table_csv(rows))
    new_file(out / "pictures" / "auc.png", draw_bars(rows))
    new_file(out / "pictures" / "roc.png", draw_roc(scores))
    new_file(out / "pictures" / "forgeries.png", draw_forgeries(photographs, split.test, seed))
    print_table(rows, notes, console)
    result = DemoResult(out, rows, notes, out / "merged" / "r2m" / "model.safetensors", time.perf_counter() - started)
    say(console, f"merged detector: {result.merged}; table and pictures: {out}; {result.seconds:.0f} s")
    return result


def _score(
    detectors: Mapping[str, Detector], groups: Mapping[str, Group], threads: int
) -> dict[str, dict[str, dict[str, Scores]]]:
    """Row → group → ``real`` and forgeries → scores, with the ensemble of the specialists added."""

    def all_groups(detector: Detector) -> dict[str, dict[str, Scores]]:
        return {name: score_group(detector, group) for name, group in groups.items()}

    scores = run_together({row: partial(all_groups, detector) for row, detector in detectors.items()}, threads)
    members = [scores[row] for row in SPECIALISTS.values()]
    return scores | {"ensemble": {name: ensemble([member[name] for member in members]) for name in groups}}
