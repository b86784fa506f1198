"""The output of a merge with other strengths and ranks, from one analysis (``r2m sweep``)."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from r2m import former
from r2m.job import Job, open_job
from r2m.merge import complete
from r2m.options import SWEPT, Options
from r2m.output import PartialOutput, Workplace, held
from r2m.ownership import foreign, is_unfinished
from r2m.places import csv_table, new_file, sync
from r2m.points import Asked, Point, points_of, widest
from r2m.recipe import Recipe
from r2m.records import STATE
from r2m.relink import refuse_lost
from r2m.workplace import directory_of, resolved
from r2m_kernels import Analysis, MergeConfig, Progress
from r2m_kernels.errors import BadFile

SWEEP_FILE = "sweep.csv"


def sweep(
    out: str | Path,
    values: Mapping[str, Sequence[Any]],
    to: str | Path,
    options: Options | None = None,
    *,
    methods: Iterable[Asked] = (),
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Merges with every combination of some options' values, from one analysis at the largest rank, or by methods.

    Args:
        out: the output of a merge.
        values: option of :data:`r2m.points.GRID` → what it takes, in methods that use it.
        to: a directory to create: one output per combination in it, and ``sweep.csv``.
        options: how it is run; files are as large as those of ``out``.
        methods: to compare, each with options of its own; none: the one of ``out``. Points with what an analysis
            depends on in common are merged from one.
        progress: called as the work goes on.

    Returns:
        One row per combination: its options and what the report says in numbers.

    Combinations that are done when it is cut off stay, and the same sweep goes on from there.

    Raises:
        InvalidInput: ``out`` is no merge, a value cannot be used, ``to`` is there and holds anything but what the same
            sweep left when it was cut off, or another process is at work on it.
        OSError: it cannot be read or written.
    """
    recipe = former.recipe_of(out).uncalibrated()
    refuse_lost(recipe, out)
    points = points_of(recipe, values, methods)
    shared: dict[str, list[Point]] = {}
    for point in points:
        shared.setdefault(point.analysis, []).append(point)
    options = replace(options or Options(), max_shard_size=former.shard_size(out))
    jobs = {key: _job(recipe, some, options) for key, some in shared.items()}
    target = Path(to)
    places = {Path(os.path.realpath(place)) for place in (target, directory_of(resolved(to)))}
    if any(places & set(Path(os.path.realpath(file)).parents) for job in jobs.values() for file in job.files):
        raise BadFile(f"to ({to}): holds an input, and inputs are never written to")
    with contextlib.ExitStack() as stack:
        workplace = stack.enter_context(held(to))
        states = {
            point.name: _state(_at(jobs[point.analysis], point.config), jobs[point.analysis], target / point.name)
            for point in points
        }
        there = _refuse_others(target, states)
        workplace.make_empty()
        stack.callback(workplace.clear)
        stack.push(functools.partial(_told_of_points, target, states))
        target.mkdir(parents=True, exist_ok=True)
        for key, some in shared.items():
            left = [point for point in some if point.name not in there]
            if not left:  # all of it is on the disk already
                continue
            analysis = jobs[key].analyze(spill_directory=workplace.directory, progress=progress)
            for point in left:
                job = _at(jobs[key], point.config)
                _write(job, analysis, states[point.name], workplace, target / point.name, progress)
        rows = [_row(point, former.report_of(target / point.name)) for point in points]
        new_file(target / SWEEP_FILE, csv_table(rows))
    return rows


def _told_of_points(target: Path, names: Iterable[str], _: Any, error: BaseException | None, __: Any) -> None:
    """What is kept where a sweep is cut off, as a note for who reads why."""
    whole = sum((target / name).is_dir() for name in names)
    if error is not None and whole:
        error.add_note(f"{whole} whole merges are kept in {target}; the same command goes on from there.")


def _job(recipe: Recipe, points: Sequence[Point], options: Options) -> Job:
    """What is analyzed for points that have it in common."""
    config = widest([point.config for point in points])
    return open_job(replace(recipe, config=config, method=points[0].method), options)


def _row(point: Point, report: Mapping[str, Any]) -> dict[str, Any]:
    core, residual = report["core"], report["residual"]
    return {
        **point.row,
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
