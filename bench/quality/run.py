"""Train, merge by every method, judge, and write it down.

    python -m bench.quality [--quick] [--processes N] [--out DIRECTORY]

Everything: two architectures, five development and ten fresh seeds, into bench/results/quality.json, pictures beside
it, and docs/quality.md from them. ``--quick``: one seed of each architecture at a third of the training, into
build/quality/quick, in minutes; its numbers show how it runs and not more. Trained detectors stay in build/quality.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from r2m.demo.detectors import SPECIALISTS

from bench.machine import RESULTS, machine, write_json
from bench.quality import docs, judging, pictures, settings, studies, tables
from bench.quality.choosing import choose, validate
from bench.quality.groups import groups_of
from bench.quality.methods import Candidate, all_methods, merged
from bench.quality.models import CACHE, Models, Run
from r2m_kernels import MergeConfig

# Rows that the studies follow, beside the ensemble.
SCRATCH = tuple(name for name, regime in settings.REGIMES.items() if regime == "scratch")
FOLLOWED = ("weight average", "weight average × 1.2", "TIES", "CART", "R2M")
Result = TypeVar("Result")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    out = options.out or (CACHE / "quick" if options.quick else RESULTS)
    start = time.monotonic()
    with ProcessPoolExecutor(
        options.processes, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        content = measure(pool, options.quick)
    content["machine"] = {**machine(), "processes": options.processes}
    content["took_seconds"] = round(time.monotonic() - start)
    # Five digits: what is printed has three.
    rounded = json.loads(json.dumps(content, default=str), parse_float=lambda number: float(f"{float(number):.5g}"))
    write_json(out / "quality.json", rounded)
    content = json.loads((out / "quality.json").read_text())
    pictures.draw_all(content, out)
    tables.print_tables(content)
    if not options.quick and options.out is None:
        docs.write(content)
    print(f"{content['took_seconds']} s; {out / 'quality.json'} and pictures beside it")
    return 0


def measure(pool: ProcessPoolExecutor, quick: bool) -> dict[str, Any]:
    """All numbers, from validation to studies."""
    development = [Run(name, seed, quick) for name in SCRATCH for seed in settings.DEVELOPMENT]
    fresh = [Run(name, seed, quick) for name in SCRATCH for seed in settings.FIRST_LOOK + settings.SECOND_LOOK]
    if quick:
        development, fresh = [run for run in development if run.seed == 0], []
    methods = all_methods()
    validated = _each(pool, "validated", validate, [(run, methods) for run in development])
    chosen = choose(validated)
    content: dict[str, Any] = {"quick": quick, "validated": validated, "chosen": chosen}
    content["methods"] = {method.name: method.kind for method in methods}
    content["default"] = MergeConfig.r2m().to_dict()
    configs = {name: {method.name: method.picked(chosen[name]) for method in methods} for name in chosen}
    content["runs"] = _each(
        pool, "judged", _judge, [(run, configs[run.architecture]) for run in [*development, *fresh]]
    )
    content["development"], content["fresh"] = [run.name for run in development], [run.name for run in fresh]
    studied = [run for run in fresh if run.seed in settings.SECOND_LOOK]
    looked_at = [run for run in studied if run.seed in settings.SECOND_LOOK[:2]] or development
    content["sweeps"] = _each(pool, "swept", studies.sweeps, [(run,) for run in looked_at])
    if not quick:
        followed = {name: {row: of_name[row] for row in FOLLOWED} for name, of_name in configs.items()}
        bad = [(run, followed[run.architecture]) for run in development if run.seed in settings.MANY]
        content["robustness"] = _each(pool, "robustness", studies.robustness, bad)
        content["many"] = _each(pool, "many", studies.many, bad)
        content["analysis"] = _each(pool, "analysis", studies.analysis, [(run,) for run in studied])
        strangers = [(run, _next(run, runs)) for runs in (development, studied) for run in runs]
        content["diagnosis"] = _each(pool, "diagnosis", studies.diagnosis, strangers)
    return content


def _next(run: Run, runs: Sequence[Run]) -> Run:
    """Another run of its architecture among these."""
    alike = [one for one in runs if one.architecture == run.architecture]
    return alike[(alike.index(run) + 1) % len(alike)]


def _judge(run: Run, candidates: Mapping[str, Candidate]) -> dict[str, Any]:
    models, groups = Models(run), groups_of(run)
    base, experts = models.trained()

    scored = partial(judging.score, run, groups=groups)
    specialists = {row: scored(expert) for row, expert in zip(SPECIALISTS.values(), experts, strict=True)}
    scores = {"base": scored(base), **specialists, "joint training": scored(models.joint())}
    scores |= {"ensemble": judging.mean_of(list(specialists.values()))}
    for row, candidate in candidates.items():
        scores[row] = judging.mean_of([scored(state) for state in merged(candidate, base, experts)])
    return {row: judging.numbers(of_row) for row, of_row in scores.items()}


def _each(
    pool: ProcessPoolExecutor, done: str, function: Callable[..., Result], calls: Sequence[tuple[Any, ...]]
) -> dict[str, Result]:
    """Name of a run → what the function returns for it; calls start with a run."""
    futures = {pool.submit(function, *call): call[0] for call in calls}
    results: dict[str, Result] = {}
    for future in as_completed(futures):
        results[futures[future].name] = future.result()
        print(f"{done} {futures[future].name} ({len(results)} of {len(futures)})", flush=True)
    return {call[0].name: results[call[0].name] for call in calls}
