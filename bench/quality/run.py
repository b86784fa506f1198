"""Train, choose, judge, and write it down.

    python -m bench.quality [--quick] [--only STAGE [--runs GLOB]] [--again ROW] [--processes N] [--tables]
        [--out DIRECTORY]

Stages, in order: ``choices``: candidates on the validation people of the development seeds; ``protocol``: what
protocol.json names, on the fresh seeds; ``fresh``: all other rows there; ``studies``: further looks at development
seeds. After them come tables: bench/results/quality/summary.json, pictures beside it, and the pages in docs/.
What judging took is in cost.json, where nothing was judged before that was noted, and what judging all fresh runs
takes, where one of each architecture was. Training counts where it was needed, so for that train first, then judge into
an empty directory with validated.json.
``--tables`` makes tables alone, from what was judged. One more stage runs only where it is named: ``development``, all
rows on the development seeds, for who looks for another rule. ``--quick``: one seed of each architecture at a part of
the training, into build/quality/quick; its numbers show how it runs and not more. Trained detectors stay in
build/quality, and neither what was trained nor what was judged or studied is done again, but for rows and studies
(``features``, ``diagnosis``, ``many``, ``robustness``) that ``--again`` names: after a change of how the package
computes what a configuration says.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from r2m.demo.detectors import SPECIALISTS

from bench.machine import machine, write_json
from bench.quality import docs, pictures, protocol, settings, store, studies, tables
from bench.quality.choosing import choose, validate
from bench.quality.groups import groups_of
from bench.quality.judging import Pictures, digest_of_states, identity, made_of
from bench.quality.methods import Candidate, all_methods, merged
from bench.quality.models import CACHE, Models, Run, StateDict, runs_of

Result = TypeVar("Result")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=STAGES)
    parser.add_argument("--runs", default="*", metavar="GLOB", help="of a stage only runs of such a name: cnn-10*")
    parser.add_argument("--again", action="append", default=[], metavar="ROW", help="such rows or studies anew: 'R2M*'")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    out = options.out or (CACHE / "quick" if options.quick else store.STORE)
    stages = [] if options.tables else [options.only] if options.only else QUICK if options.quick else FULL
    start = time.monotonic()
    with ProcessPoolExecutor(
        options.processes, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        for stage in stages:
            every = runs_of(settings.fresh_of) if stage in ("protocol", "fresh") else _development(options.quick)
            runs = [run for run in every if fnmatch(run.name, options.runs)]
            STAGES[stage](pool, Judging(out, tuple(options.again)), runs)
        if stages and (cost := _cost(out)):
            write_json(out / "cost.json", cost)
        content = tables.summarize(out, pool.map)
    content = json.loads(json.dumps(content), parse_float=tables.rounded)
    write_json(out / "summary.json", content)
    pictures.draw_all(content, out)
    tables.print_tables(content)
    if out == store.STORE:
        docs.write(content)
    print(f"{time.monotonic() - start:.0f} s; {out / 'summary.json'} and pictures beside it")
    return 0


def _cost(out: Path) -> dict[str, Any] | None:
    """CPU time of judging all that there is; None where some was judged before that was noted.

    ``fresh``: of judging all fresh runs, from the mean of those of each architecture that are there, one or all: they
    judge as many models on as many pictures. None where an architecture has none.
    """
    judged = {path.stem: store.load(path) for path in sorted((out / "logits").glob("*.npz"))}
    if not judged or any("cpu_seconds" not in one.about for one in judged.values()):
        return None
    runs = {
        name: {
            "models": len(one.logits),
            "pictures": len(next(iter(one.logits.values()))),
            "cpu_seconds": one.about["cpu_seconds"],
        }
        for name, one in judged.items()
    }
    fresh = runs_of(settings.fresh_of)
    taken: dict[str, list[float]] = {architecture: [] for architecture in settings.REGIMES}
    for run in fresh:
        if run.name in runs:
            taken[run.architecture].append(runs[run.name]["cpu_seconds"])
    return {
        "machine": machine(),
        "cpu_seconds": round(sum(one["cpu_seconds"] for one in runs.values()), 1),
        "runs": runs,
        "fresh": {
            "runs": len(fresh),
            "cpu_seconds": round(sum(float(np.mean(taken[run.architecture])) for run in fresh), 1),
        }
        if all(taken.values())
        else None,
    }


class Judging(NamedTuple):
    """Where results are kept, and which rows and studies there count for nothing."""

    out: Path
    again: tuple[str, ...] = ()

    def repeats(self, name: str) -> bool:
        """Whether it is made anew."""
        return any(fnmatch(name, wanted) for wanted in self.again)


def _choose(pool: ProcessPoolExecutor, judging: Judging, runs: Sequence[Run]) -> None:
    quick = all(run.quick for run in runs)  # shows that there is a choice
    methods = [
        replace(one, candidates=dict([*one.candidates.items()][: 2 if quick else None])) for one in all_methods()
    ]
    _add(judging.out / "validated.json", _each(pool, "validated", validate, [(run, methods) for run in runs]))


def _study(pool: ProcessPoolExecutor, judging: Judging, runs: Sequence[Run]) -> None:
    path = judging.out / "studies.json"
    made = json.loads(path.read_text()) if path.exists() else {}
    known = {
        name: {look: found for look, found in of.items() if not judging.repeats(look)} for name, of in made.items()
    }
    _add(path, _each(pool, "studied", studies.study, [(run, known.get(run.name, {})) for run in runs]))


def _add(path: Path, found: Mapping[str, Any]) -> None:
    """Runs to a file of several, in the order of all."""
    every = {**(json.loads(path.read_text()) if path.exists() else {}), **found}
    write_json(path, {name: every[name] for name in sorted(every, key=tables.order)})


def _protocol(pool: ProcessPoolExecutor, judging: Judging, runs: Sequence[Run]) -> None:
    """On fresh seeds, what the protocol names and nothing else: the default is decided by it."""
    content = protocol.read()
    protocol.check(content, {method.name: method for method in all_methods()})
    _judge_all(pool, judging, runs, protocol.rows(content))


def _everything(pool: ProcessPoolExecutor, judging: Judging, runs: Sequence[Run]) -> None:
    _judge_all(pool, judging, runs)


STAGES = {
    "choices": _choose,
    "protocol": _protocol,
    "fresh": _everything,
    "studies": _study,
    "development": _everything,
}
FULL, QUICK = ("choices", "protocol", "fresh", "studies"), ("choices", "development")


def _development(quick: bool) -> list[Run]:
    runs = runs_of(settings.development_of)
    return [replace(run, quick=True) for run in runs if run.seed == settings.DEVELOPMENT[0]] if quick else runs


def _judge_all(
    pool: ProcessPoolExecutor, judging: Judging, runs: Sequence[Run], only: Sequence[str] | None = None
) -> None:
    """By every method, or by some alone."""
    validated = judging.out / "validated.json"
    chosen = choose(json.loads(validated.read_text())) if validated.exists() else {}
    calls = []
    for run in runs:
        of_run = chosen.get(run.architecture, chosen.get("mobilenet", {}))  # a second base takes what the first chose
        rows = {
            one.name: one.picked({one.name: "", **of_run}) for one in all_methods() if only is None or one.name in only
        }
        calls.append((run, rows, judging, only is None))
    _each(pool, "judged", judge, calls)


def judge(run: Run, rows: Mapping[str, Candidate], judging: Judging, whole: bool) -> None:
    """Logits of base, specialists, joint model and every merge on all test pictures, into the file of the run.

    Args:
        run: whose detectors.
        rows: row → how it merges.
        judging: directory of the results, and what in it is judged again.
        whole: these are all rows; what else the file holds goes.

    Raises:
        SystemExit: for a fresh seed, where the protocol is not committed as it is.
    """
    about = {**machine(), **({"protocol": protocol.committed()} if run.seed in settings.FRESH else {})}
    start, cpu, path = time.monotonic(), time.process_time(), store.logits_of(run.name, judging.out)
    models, pictures = Models(run), Pictures(groups_of(run))
    base, experts = models.trained()
    judged = store.load(path) if path.exists() else store.Judged(pictures.places)
    if judged.places != pictures.places:
        judged = store.Judged(pictures.places)
    anew = {row for row in rows if judging.repeats(row)}
    noted = ("seconds", "cpu_seconds")
    spent = {name: judged.about.get(name, 0) for name in noted if name in judged.about or not judged.logits}

    def add(row: str, made_from: str, states: Callable[[], Sequence[StateDict]]) -> None:
        if row in anew or judged.made_of.get(row) != made_from:
            twins = (name for name, made in judged.made_of.items() if made == made_from)  # under another name
            twin = None if row in anew else next(twins, None)
            judged.add(row, judged.logits[twin] if twin else pictures.scores(run, states()), made_from)
            taken = {"seconds": time.monotonic() - start, "cpu_seconds": time.process_time() - cpu}
            judged.about = {**about, **{name: round(before + taken[name], 1) for name, before in spent.items()}}
            store.save(judged, path)

    trained = {"base": base, **dict(zip(SPECIALISTS.values(), experts, strict=True)), "joint training": models.joint()}
    for row, state in trained.items():
        add(row, made_of(digest_of_states([state]), pictures.digest), lambda state=state: [state])
    material = made_of(digest_of_states([base, *experts]), pictures.digest)
    for row, candidate in rows.items():
        add(
            row,
            f"{material} {made_of(identity(candidate))}",
            lambda candidate=candidate: merged(candidate, base, experts),
        )
    if whole and (gone := judged.logits.keys() - trained.keys() - rows.keys()):
        for row in gone:
            del judged.logits[row], judged.made_of[row]
        store.save(judged, path)


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
