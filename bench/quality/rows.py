"""A few rows of the table alone, on the fresh runs, from trained detectors: ``python -m bench.quality.rows [ROW …]``.

Minutes with trained detectors in ``build/quality``, where the whole takes an hour.
Rows are those of :mod:`bench.quality.methods` that nothing is chosen for. Writes ``bench/results/quality_rows.json``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from bench.machine import RESULTS, machine, write_json
from bench.quality import settings, tables
from bench.quality.groups import GROUPS
from bench.quality.methods import all_methods
from bench.quality.models import Run
from bench.quality.networks import ARCHITECTURES
from bench.quality.run import _each, _judge

AGAINST = ("weight average", "weight average × 1.2", "R2M, rows on whole residuals")
ROWS = ("R2M", *AGAINST, "R2M, paper's settings", "R2M, centred as summaries have it", "R2M, head merged")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", default=ROWS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "quality_rows.json")
    options = parser.parse_args(arguments)
    fixed = {method.name: method for method in all_methods() if not method.tuned}
    methods = [fixed[name] for name in options.rows]
    configs = {method.name: method.candidates[""] for method in methods}
    runs = [Run(name, seed) for name in ARCHITECTURES for seed in settings.FRESH]
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, context, torch.set_num_threads, (1,)) as pool:
        judged = _each(pool, "judged", _judge, [(run, configs) for run in runs])
    content = {"runs": judged, "fresh": [run.name for run in runs], "development": []}
    content |= {"methods": {method.name: method.kind for method in methods}}
    content["configs"] = {name: config.to_dict() for name, config in configs.items()}
    content["differences"] = {
        other: {group: tables.against(content, "R2M", other, group, content["fresh"]) for group in GROUPS}
        for other in AGAINST
        if {"R2M", other} <= configs.keys()
    }
    content["machine"] = {**machine(), "processes": options.processes}
    content["took_seconds"] = round(time.monotonic() - start)
    rounded = json.loads(json.dumps(content, default=str), parse_float=lambda number: float(f"{float(number):.5g}"))
    write_json(options.out, rounded)
    for other, of_groups in content["differences"].items():
        for group, value in of_groups.items():
            print(f"R2M - {other}, {group}: {tables.difference(value)}")
    print(f"{content['took_seconds']} s; {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
