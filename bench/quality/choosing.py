"""Which candidate of each method is used: the best on the validation people, averaged over the development seeds.

Nothing here can see a test group: this module knows the validation group alone, and a test holds it to that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from r2m.demo.evaluation import group_auc

from bench.machine import write_json
from bench.quality.groups import validation_group
from bench.quality.judging import Pictures, digest_of_states, identity, made_of
from bench.quality.methods import Method, merged
from bench.quality.models import CACHE, Models, Run

Validated = dict[str, dict[str, float]]
"""Method → candidate in words → AUC on the validation people of one run."""


def validate(run: Run, methods: Sequence[Method], cache: Path = CACHE) -> Validated:
    """Every candidate of every method that has a choice, on one run; what is in the cache is not done again."""
    path = cache / run.name / "validated.json"
    known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    base, experts = Models(run).trained()
    pictures = Pictures({"validation": validation_group(run)})
    made_from = digest_of_states([base, *experts]), pictures.digest
    found: Validated = {}
    for method in (one for one in methods if one.tuned):
        found[method.name] = {}
        for words, candidate in method.candidates.items():
            entry = made_of(*made_from, identity(candidate))
            if entry not in known:
                (group,) = pictures.split(pictures.scores(run, merged(candidate, base, experts))).values()
                known[entry] = group_auc(group)
                write_json(path, known)
            found[method.name][words] = known[entry]
    return found


def choose(validated: Mapping[str, Validated]) -> dict[str, dict[str, str]]:
    """Architecture → method → the words of its best candidate; of equal ones the first.

    Args:
        validated: name of a run, which starts with its architecture → what ``validate`` found.
    """
    chosen: dict[str, dict[str, str]] = {}
    for architecture in dict.fromkeys(name.partition("-")[0] for name in validated):
        runs = [of_run for name, of_run in validated.items() if name.partition("-")[0] == architecture]
        chosen[architecture] = {}
        for method, candidates in runs[0].items():
            means = {words: float(np.mean([of_run[method][words] for of_run in runs])) for words in candidates}
            chosen[architecture][method] = max(means, key=lambda words: means[words])
    return chosen
