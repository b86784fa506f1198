"""The output of a merge as something to go on with: add a specialist, remove one, sweep over strengths and ranks."""

from __future__ import annotations

import csv
import io
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from r2m.checkpoints.formats import FORMATS
from r2m.checkpoints.writer import SafetensorsSink
from r2m.execute import Job, complete, open_job
from r2m.output import RECIPE_FILE, STATE_FILE
from r2m.places import MOST_RECORD, beside, new_file, read_mapping, sync
from r2m.recipe import Recipe, read_recipe
from r2m_kernels import Analysis, InvalidInput, MergeConfig, ProgressEvent, analyze, checks
from r2m_kernels.errors import quoted

SWEEP_FILE = "sweep.csv"
# What a sweep may vary: an analysis is merged at any of them for the cost of the last step.
SWEPT = ("rank", "eta", "core_scale", "row_power")


def read_project(out: str | Path) -> Recipe:
    """The recipe of a merge's output.

    Raises:
        InvalidInput: it is none.
    """
    path = Path(out) / RECIPE_FILE
    if not path.is_file():
        raise InvalidInput(f"{out}: expected the output of a merge, with a {RECIPE_FILE}")
    return read_recipe(path)


def shard_size(out: str | Path) -> str | int:
    """``max_shard_size`` of the merge that wrote an output, which no recipe holds; the default where not known."""
    try:
        return int(read_mapping(Path(out) / STATE_FILE, STATE_FILE, MOST_RECORD)["state"]["max_shard_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return "5GB"


def with_expert(
    recipe: Recipe, name: str, path: str, *, weight: float | None = None, rename: Mapping[str, str | None] | None = None
) -> Recipe:
    """The recipe with one expert more.

    Args:
        recipe: of the merge so far.
        name, path: the new expert's.
        weight: its weight, those so far having 1 if they have none; ``None``: 1 where others have weights.
        rename: for its names alone.

    Raises:
        InvalidInput: the name is taken, or the weight is none.
    """
    if name in recipe.experts:
        raise InvalidInput(f"expert {quoted(name)}: there is one already; another name, or remove that one first")
    config = recipe.config
    if config.weights is not None or weight is not None:
        before = config.weights or (1.0,) * len(recipe.experts)
        config = config.replace(weights=(*before, 1.0 if weight is None else weight))
    own = {**recipe.arrangement.expert_renames, **({name: rename} if rename else {})}
    arrangement = replace(recipe.arrangement, expert_renames=own)
    return replace(recipe, experts={**recipe.experts, name: path}, config=config, arrangement=arrangement)


def without_expert(recipe: Recipe, name: str) -> Recipe:
    """The recipe with one expert less.

    Raises:
        InvalidInput: no such expert, or it is the last.
    """
    if name not in recipe.experts:
        near = checks.did_you_mean(name, recipe.experts)
        raise InvalidInput(f"expert {quoted(name)}: there is none; there are {', '.join(recipe.experts)}{near}")
    if len(recipe.experts) == 1:
        raise InvalidInput(f"expert {quoted(name)}: it is the only one, and a merge of none is none")
    place = list(recipe.experts).index(name)
    config = recipe.config
    if config.weights is not None:
        config = config.replace(weights=(*config.weights[:place], *config.weights[place + 1 :]))
    experts = {other: path for other, path in recipe.experts.items() if other != name}
    own = {other: rules for other, rules in recipe.arrangement.expert_renames.items() if other != name}
    arrangement = replace(recipe.arrangement, expert_renames=own)
    told = {other: one for other, one in recipe.expert_preprocessing.items() if other != name}
    return replace(recipe, experts=experts, config=config, arrangement=arrangement, expert_preprocessing=told)


def sweep(
    out: str | Path,
    values: Mapping[str, Sequence[Any]],
    to: str | Path,
    *,
    progress: Callable[[ProgressEvent], None] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Merges with every combination of some options' values, from one analysis at the largest rank.

    Args:
        out: the output of a merge.
        values: option of :data:`SWEPT` → what it takes.
        to: a directory to create: one output per combination in it, and ``sweep.csv``.
        progress: called as the work goes on.
        options: ``device``, ``backend``, ``memory_budget`` of :func:`r2m.execute.open_job`.

    Returns:
        One row per combination: its options and what the report says in numbers.

    Raises:
        InvalidInput: ``out`` is no merge, a value cannot be used, or ``to`` is there and not empty.
        OSError: it cannot be read or written; combinations that are done stay.
    """
    recipe = read_project(out)
    points = _points(recipe.config, values)
    target = Path(to)
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise InvalidInput(f"to ({to}): exists already and is not an empty directory")
    widest = _widest(recipe.config, list(points.values()))
    recipe_at_widest = replace(recipe, config=widest)
    job = open_job(out=target, **recipe_at_widest.arguments(), max_shard_size=shard_size(out), **options)
    inputs = [Path(os.path.realpath(file)) for source in job.sources for file in source.files]
    if any(Path(os.path.realpath(target)) in file.parents for file in inputs):
        raise InvalidInput(f"to ({to}): holds an input, and inputs are never written to")
    target.mkdir(parents=True, exist_ok=True)
    analysis = analyze(
        job.arranged.base,
        job.arranged.experts,
        job.arranged.config,
        device=job.device,
        backend=job.backend,
        memory_budget=job.budget,
        spill_directory=target,
        progress=progress,
    )
    rows = []
    for name, config in points.items():
        effective = job.arranged.config.replace(**{field: getattr(config, field) for field in SWEPT})
        report = _write(job, analysis, config, effective, target / name, progress)
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
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    new_file(target / SWEEP_FILE, table.getvalue().encode())
    return rows


def _points(config: MergeConfig, values: Mapping[str, Sequence[Any]]) -> dict[str, MergeConfig]:
    """Name → configuration of every combination."""
    for field, wanted in values.items():
        if field not in SWEPT:
            raise InvalidInput(f"{field}: cannot be swept over; expected one of {', '.join(SWEPT)}")
        if len({repr(value) for value in wanted}) < len(wanted) or not wanted:
            raise InvalidInput(f"{field}: expected different values, got {', '.join(map(str, wanted)) or 'none'}")
    if not values:
        raise InvalidInput(f"sweep: expected values of one option at least: {', '.join(SWEPT)}")
    found = {}
    for combination in itertools.product(*values.values()):
        fields = dict(zip(values, combination, strict=True))
        found[",".join(f"{field}={value}" for field, value in fields.items())] = config.replace(**fields)
    return found


def _widest(config: MergeConfig, points: Sequence[MergeConfig]) -> MergeConfig:
    """What has to be analyzed for all of them."""
    ranks = [point.rank for point in points]
    if len({type(rank) for rank in ranks}) > 1:
        raise InvalidInput(f"rank: expected shares alone or whole numbers alone, got {', '.join(map(str, ranks))}")
    strongest = max(points, key=lambda point: point.eta)
    return strongest.replace(rank=max(ranks))


def _write(
    job: Job,
    analysis: Analysis,
    config: MergeConfig,
    effective: MergeConfig,
    place: Path,
    progress: Callable[[ProgressEvent], None] | None,
) -> dict[str, Any]:
    """One point as a directory that appears when it is whole."""
    started = time.perf_counter()
    with beside(place) as partial:
        output, tensors = partial / "output", partial / "tensors"
        for directory in (output, tensors):
            directory.mkdir()
        directory = output if FORMATS[job.file_format].direct else tensors
        sink = SafetensorsSink(directory, job.metadata_of(effective), job.shard_bytes)
        sink.tie(analysis.plan.aliases)
        analysis.write(sink, effective, dtype=job.torch_dtype, progress=progress)
        report = complete(job, output, tensors, sink, analysis, started, config, effective)
        sync(output)
        os.rename(output, place)
    return report
