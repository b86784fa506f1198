"""How long task vectors may be for R²M decorrelated: specialists fine-tuned at other rates, on development seeds.

    python -m bench.quality.lengths [--out FILE]

Fine-tuned gently, a pretrained network moves by a hundredth of its length, and one trained from nothing by a quarter;
rules that gain on one side lose on the other. Between lies the border past which the package warns. It is looked for
with one backbone, so that only the length differs. What is in the file is not judged again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from functools import partial
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
    for seed in settings.MOVED:
        run = Run("mobilenet", seed)
        known = found.setdefault(run.name, [])
        for one in study(run, [entry["rate"] for entry in known]):
            known.append(json.loads(json.dumps(one), parse_float=rounded))
            write_json(out, found)
            print(run.name, json.dumps(known[-1]), flush=True)
    print(out)
    return 0


def study(run: Run, known: Sequence[int] = ()) -> Iterator[Numbers]:
    """One entry for each rate but ``known``, the usual one first: lengths, and AUC of every row in every group."""
    models, pictures = Models(run), Pictures(groups_of(run))
    base = models.base()
    for rate in (1, *settings.RATES):
        if rate not in known:
            made = models.specialist if rate == 1 else partial(models.moved, rate=rate)
            yield {"rate": rate, **_judged(run, base, [made(kind) for kind in settings.MAIN], pictures)}


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
