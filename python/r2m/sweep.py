"""The output of a merge with other strengths and ranks, from one analysis (``r2m sweep``)."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from r2m import former
from r2m.merge import Job, Progress, complete, open_job
from r2m.options import SWEPT, Options
from r2m.output import PartialOutput
from r2m.places import beside, csv_table, new_file, sync
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

    Raises:
        InvalidInput: ``out`` is no merge, a value cannot be used, or ``to`` is there and not empty.
        OSError: it cannot be read or written; combinations that are done stay.
    """
    recipe = former.recipe_of(out)
    points = _points(recipe.config, values)
    target = Path(to)
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise BadFile(f"to ({to}): exists already and is not an empty directory")
    widest = replace(recipe, config=_widest(recipe.config, list(points.values())))
    job = open_job(widest, replace(options or Options(), max_shard_size=former.shard_size(out)))
    if any(Path(os.path.realpath(target)) in Path(os.path.realpath(file)).parents for file in job.files):
        raise BadFile(f"to ({to}): holds an input, and inputs are never written to")
    target.mkdir(parents=True, exist_ok=True)
    analysis = job.analyze(spill_directory=target, progress=progress)
    rows = []
    for name, config in points.items():
        report = _write(_at(job, config), analysis, target / name, progress)
        core, residual = report["core"], report["residual"]
        rows.append(
            {
                "point": name,
                **{field: getattr(config, field) for field in values},
                "core/mean": core["norm_ratio_to_mean"],
                "core scale used": core["scale_used"],
                "eta used": residual["eta_used"],
                "residual term/core": residual["norm_ratio_to_core"],
            }
        )
    new_file(target / SWEEP_FILE, csv_table(rows))
    return rows


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


def _write(job: Job, analysis: Analysis, target: Path, progress: Progress | None) -> dict[str, Any]:
    """One point as a directory that appears when it is whole."""
    started = time.perf_counter()
    with beside(target) as directory:
        partial = PartialOutput(directory)
        partial.output.mkdir()
        sink = job.sink(partial)
        sink.tie(analysis.plan.aliases)
        analysis.write(sink, job.arranged.config, dtype=job.dtype, progress=progress)
        report = complete(job, partial, sink, analysis, started)
        sync(partial.output)
        os.rename(partial.output, target)
    return report
