"""How long task vectors may be for R²M decorrelated: specialists fine-tuned at other rates, on development seeds.

    python -m bench.quality.lengths [--out FILE]

Fine-tuned gently, a pretrained network moves by a hundredth of its length, and one trained from nothing by a quarter;
rules that gain on one side lose on the other. Between lies the border past which the package warns. It is looked for
with one backbone, so that only the length differs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from r2m.demo.evaluation import auc_by_forgery, ensemble, score_group
from r2m.demo.samples import Group

from bench.machine import RESULTS, write_json
from bench.quality import settings
from bench.quality.groups import groups_of
from bench.quality.methods import all_methods, merged
from bench.quality.models import Models, Run, StateDict
from bench.quality.networks import load_state
from bench.quality.tables import DEFAULT
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    out: Path = parser.parse_args(arguments).out
    torch.set_num_threads(1)
    found = {}
    for seed in settings.MOVED:
        run = Run("mobilenet", seed)
        found[run.name] = study(run)
        for one in found[run.name]:
            print(run.name, json.dumps(one), flush=True)
    write_json(out, json.loads(json.dumps(found), parse_float=lambda number: float(f"{float(number):.5g}")))
    print(out)
    return 0


def study(run: Run) -> list[dict[str, Any]]:
    """One entry for each rate, the usual one first: how far specialists moved, and AUC of every row in every group."""
    models, groups = Models(run), groups_of(run)
    base, usual = models.trained()
    moved = {1: usual} | {rate: [models.moved(kind, rate) for kind in settings.MAIN] for rate in settings.RATES}
    return [{"rate": rate, **_judged(run, base, experts, groups)} for rate, experts in moved.items()]


def _judged(run: Run, base: StateDict, experts: Sequence[StateDict], groups: Mapping[str, Group]) -> dict[str, Any]:
    def scores(states: Sequence[StateDict]) -> list[dict[str, Any]]:
        detectors = [load_state(run.architecture, state, folded=True) for state in states]
        return [{name: score_group(detector, group) for name, group in groups.items()} for detector in detectors]

    def auc(scored: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        together = {name: ensemble([one[name] for one in scored]) for name in groups}
        return {name: float(np.mean(list(auc_by_forgery(group).values()))) for name, group in together.items()}

    methods = {method.name: method for method in all_methods()}
    alone = scores(experts)
    rows = {"ensemble": auc(alone)}
    for row in ROWS:
        (candidate,) = methods[row].candidates.values()
        rows[row] = auc(scores(merged(candidate, base, experts)))
    own = [auc_by_forgery(one["in-distribution"])[kind] for one, kind in zip(alone, settings.MAIN, strict=True)]
    vectors = analyze(base, dict(zip(settings.MAIN, experts, strict=True))).report()["task_vectors"]
    return {
        "relative_to_base": list(vectors["relative_to_base"].values()),
        "cosines": vectors["cosines"],
        "own_families": own,
        "auc": rows,
    }


if __name__ == "__main__":
    raise SystemExit(main())
