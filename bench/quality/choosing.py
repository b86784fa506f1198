"""Which candidate of each method is used: the best on the validation people, averaged over the development seeds.

Nothing here can see a test group: this module knows the validation group alone, and a test holds it to that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from r2m.demo.evaluation import ensemble, group_auc, score_group

from bench.quality.groups import validation_group
from bench.quality.methods import Candidate, Method, merged
from bench.quality.models import Models, Run
from bench.quality.networks import load_state

Validated = dict[str, dict[str, float]]
"""Method → candidate in words → AUC on the validation people of one run."""


def validate(run: Run, methods: Sequence[Method]) -> Validated:
    """Every candidate of every method on one run; those without a choice too, since ideas are compared by it."""
    (base, experts), group = Models(run).trained(), validation_group(run)

    def judged(candidate: Candidate) -> float:
        detectors = [load_state(run.architecture, state) for state in merged(candidate, base, experts)]
        return group_auc(ensemble([score_group(detector, group) for detector in detectors]))

    return {m.name: {words: judged(one) for words, one in m.candidates.items()} for m in methods}


def choose(validated: Mapping[str, Validated]) -> dict[str, dict[str, str]]:
    """Architecture → method → the words of its best candidate; of equal ones the first.

    Args:
        validated: name of a run, which starts with its architecture → what ``validate`` found.
    """
    chosen: dict[str, dict[str, str]] = {}
    for architecture in sorted({name.partition("-")[0] for name in validated}):
        runs = [of_run for name, of_run in validated.items() if name.partition("-")[0] == architecture]
        chosen[architecture] = {}
        for method, candidates in runs[0].items():
            means = {words: float(np.mean([of_run[method][words] for of_run in runs])) for words in candidates}
            chosen[architecture][method] = max(means, key=lambda words: means[words])
    return chosen
