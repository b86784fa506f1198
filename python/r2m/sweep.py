"""The output of a merge with other strengths and ranks, from one analysis (``r2m sweep``)."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from r2m import former
from r2m.merge import Job, Progress, complete, open_job
from r2m.options import SWEPT, Options
from r2m.output import PartialOutput, Workplace, held
from r2m.ownership import foreign, is_unfinished
from r2m.places import csv_table, new_file, sync
from r2m.records import STATE
from r2m.relink import refuse_lost
from r2m.workplace import directory_of, resolved
from r2m_kernels import Analysis, MergeConfig
from r2m_kernels.errors import BadFile, BadOption

SWEEP_FILE = "sweep.csv"


def sweep(
    out: str | Path,
    values: Mapping[str, Sequence[Any]],
    to: str | Path,
    options: Options | None = None,
    *,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Merges with every combination of some options' values, from one analysis at the largest rank.

    Args:
        out: the output of a merge.
        values: option of :data:`SWEPT` → what it takes.
        to: a directory to create: one output per combination in it, and ``sweep.csv``.
        options: how it is run; files are as large as those of ``out``.
        progress: called as the work goes on.

    Returns:
        One row per combination: its options and what the report says in numbers.

    Combinations that are done when it is cut off stay, and the same sweep goes on from there.

    Raises:
        InvalidInput: ``out`` is no merge, a value cannot be used, ``to`` is there and holds anything but what the same
            sweep left when it was cut off, or another process is at work on it.
        OSError: it cannot be read or written.
    """
    recipe = former.recipe_of(out)
    refuse_lost(recipe, out)
    points = _points(recipe.config, values)
    target = Path(to)
    widest = replace(recipe, config=_widest(recipe.config, list(points.values())))
    job = open_job(widest, replace(options or Options(), max_shard_size=former.shard_size(out)))
    places = {Path(os.path.realpath(place)) for place in (target, directory_of(resolved(to)))}
    if any(places & set(Path(os.path.realpath(file)).parents) for file in job.files):
        raise BadFile(f"to ({to}): holds an input, and inputs are never written to")
    with contextlib.ExitStack() as stack:
        workplace = stack.enter_context(held(to))
        states = {name: _state(_at(job, config), job, target / name) for name, config in points.items()}
        there = _refuse_others(target, states)
        workplace.make_empty()
        stack.callback(workplace.clear)
        target.mkdir(parents=True, exist_ok=True)
        # What is on the disk already may be all of it, but for the table.
        analysis = None
        if len(there) < len(points):
            analysis = job.analyze(spill_directory=workplace.directory, progress=progress)
        rows = []
        for name, config in points.items():
            if name not in there:
                assert analysis is not None
                _write(_at(job, config), analysis, states[name], workplace, target / name, progress)
            rows.append(
                _row(name, {field: getattr(config, field) for field in values}, former.report_of(target / name))
            )
        new_file(target / SWEEP_FILE, csv_table(rows))
    return rows


def _row(name: str, values: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    core, residual = report["core"], report["residual"]
    return {
        "point": name,
        **values,
        "core/mean": core["norm_ratio_to_mean"],
        "core scale used": core["scale_used"],
        "eta used": residual["eta_used"],
        "residual term/core": residual["norm_ratio_to_core"],
    }


def _state(point: Job, widest: Job, out: Path) -> dict[str, Any]:
    """What decides a point's bytes: beside its own options, what was analyzed."""
    config = widest.recipe.config
    state = {**point.state(out), "swept": {"rank": config.rank, "eta": config.eta}}
    return dict(json.loads(json.dumps(state)))


def _refuse_others(target: Path, states: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The points that an earlier run of the same sweep left whole.

    Raises:
        BadFile: anything else is there.
    """
    if not os.path.lexists(target):
        return set()
    entries = list(os.scandir(target)) if target.is_dir() else []
    ours = {entry.name for entry in entries if entry.name in states and entry.is_dir(follow_symlinks=False)}
    if not target.is_dir() or any(entry.name not in ours and not is_unfinished(entry) for entry in entries):
        raise BadFile(f"to ({target}): exists already and is not an empty directory")
    for name in sorted(ours):
        try:
            same = STATE.whole(target / name, STATE.file)["state"] == states[name]
        except (OSError, BadFile, KeyError):
            same = False
        if not same or foreign(target / name):
            raise BadFile(f"to ({target}): holds {name} of another sweep; remove it, or give another directory")
    return ours


def _points(config: MergeConfig, values: Mapping[str, Sequence[Any]]) -> dict[str, MergeConfig]:
    """Name → configuration of every combination."""
    for field, given in values.items():
        if field not in SWEPT:
            raise BadOption(f"{field}: cannot be swept over; expected one of {', '.join(SWEPT)}")
        if len({repr(value) for value in given}) < len(given) or not given:
            raise BadOption(f"{field}: expected different values, got {', '.join(map(str, given)) or 'none'}")
    if not values:
        raise BadOption(f"sweep: expected values of one option at least: {', '.join(SWEPT)}")
    combinations = [dict(zip(values, one, strict=True)) for one in itertools.product(*values.values())]
    return {",".join(f"{field}={value}" for field, value in one.items()): config.replace(**one) for one in combinations}


def _widest(config: MergeConfig, points: Sequence[MergeConfig]) -> MergeConfig:
    """What has to be analyzed for all of them."""
    ranks = [point.rank for point in points]
    if len({type(rank) for rank in ranks}) > 1:
        raise BadOption(f"rank: expected shares alone or whole numbers alone, got {', '.join(map(str, ranks))}")
    strongest = max(points, key=lambda point: point.eta)
    return strongest.replace(rank=max(ranks))


def _at(job: Job, config: MergeConfig) -> Job:
    """The same job at one point; what the arrangement asks for stays."""
    swept = {field: getattr(config, field) for field in SWEPT}
    arranged = replace(job.arranged, config=job.arranged.config.replace(**swept))
    return replace(job, recipe=replace(job.recipe, config=config), arranged=arranged)


def _write(
    job: Job,
    analysis: Analysis,
    state: Mapping[str, Any],
    workplace: Workplace,
    target: Path,
    progress: Progress | None,
) -> None:
    """One point as a directory that appears when it is whole."""
    started = time.perf_counter()
    partial = PartialOutput(workplace.directory, target)
    partial.output.mkdir()
    sink = job.sink(partial)
    sink.tie(analysis.plan.aliases)
    job.write(analysis, sink, progress)
    workplace.check()
    complete(job, partial, sink, analysis, state, started)
    sync(partial.output)
    workplace.check()
    os.rename(partial.output, target)
    workplace.clear()
