"""How long task vectors may be for R²M decorrelated: specialists fine-tuned longer or faster, on development seeds.

    python -m bench.quality.lengths [--out FILE]

Fine-tuned gently, a pretrained network moves by a hundredth of its length, and one trained from nothing by a quarter;
rules that gain on one side lose on the other. The border between is looked for with one backbone, so that only the
length differs: with more steps at the usual rate, which leaves specialists good, and at higher rates, which does not.
What is in the file is not judged again, so that the study can be stopped at any time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from r2m.demo.evaluation import auc_by_forgery, group_auc

from bench.machine import RESULTS, write_json
from bench.quality import settings
from bench.quality.groups import groups_of
from bench.quality.judging import Pictures, mean_of
from bench.quality.methods import all_methods, merged
from bench.quality.models import Models, Run, StateDict
from bench.quality.store import GroupScores
from bench.quality.tables import DEFAULT, rounded
from r2m_kernels import analyze

OUT = RESULTS / "quality" / "lengths.json"
ROWS = (
    "weight average",
    "weight average × 1.2",
    "TSV-M × 1",
    "R2M",
    "R2M decorrelated",
    "R2M decorrelated, by tensor",
    DEFAULT,
)

Numbers = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    out: Path = parser.parse_args(arguments).out
    torch.set_num_threads(1)
    found: dict[str, list[Numbers]] = json.loads(out.read_text()) if out.exists() else {}
    pictures = cache(lambda run: Pictures(groups_of(run)))
    for run, how, times in _missing(found):
        one = {how: times, **study(run, how, times, pictures(run))}
        found.setdefault(run.name, []).append(json.loads(json.dumps(one), parse_float=rounded))
        write_json(out, found)
        print(run.name, json.dumps(found[run.name][-1]), flush=True)
    print(out)
    return 0


def _missing(found: Mapping[str, Sequence[Numbers]]) -> list[tuple[Run, str, int]]:
    """What is to be judged: usual specialists first, then way after way to move them farther, each on every seed."""
    ways = [("rate", 1), *(("steps", times) for times in settings.STEPS), *(("rate", rate) for rate in settings.RATES)]
    runs = [Run("mobilenet", seed) for seed in settings.MOVED]
    return [
        (run, how, times)
        for how, times in ways
        for run in runs
        if not any(entry.get(how) == times for entry in found.get(run.name, ()))
    ]


def study(run: Run, how: str, times: int, pictures: Pictures) -> Numbers:
    """Lengths, and AUC of every row in every group, of specialists with ``times`` the usual ``rate`` or ``steps``."""
    models = Models(run)
    make = models.longer if how == "steps" else models.moved
    experts = [models.specialist(kind) if times == 1 else make(kind, times) for kind in settings.MAIN]
    return _judged(run, models.base(), experts, pictures)


def _judged(run: Run, base: StateDict, experts: Sequence[StateDict], pictures: Pictures) -> Numbers:
    def scores(states: Sequence[StateDict]) -> GroupScores:
        return pictures.split(pictures.scores(run, states))

    methods = {method.name: method for method in all_methods()}
    alone = [scores([expert]) for expert in experts]
    rows = {"ensemble": mean_of(alone)}
    for row in ROWS:
        (candidate,) = methods[row].candidates.values()
        rows[row] = scores(merged(candidate, base, experts))
    own = [auc_by_forgery(one["in-distribution"])[kind] for one, kind in zip(alone, settings.MAIN, strict=True)]
    vectors = analyze(base, dict(zip(settings.MAIN, experts, strict=True))).report()["task_vectors"]
    return {
        "relative_to_base": list(vectors["relative_to_base"].values()),
        "cosines": vectors["cosines"],
        "own_families": own,
        "auc": {row: {name: group_auc(group) for name, group in of.items()} for row, of in rows.items()},
    }


if __name__ == "__main__":
    raise SystemExit(main())
